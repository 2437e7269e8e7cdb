"""The library without a server, as a column: `transformers`' own generate on the same checkpoint.

All chats of a burst are one padded batch, known in advance: what a program of one's own reaches.
Runs in this process.
"""

import base64
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from server.bench.prompts import Message
from server.bench.stream import StreamRecord
from steering.models import load_model


class Generated:
    """Loads the checkpoint; raises ModelError."""

    name = "generate"
    new_sizes = False
    process = "here"

    def __init__(self, directory: Path, dtype: str) -> None:
        loaded = load_model(str(directory), dtype=dtype)
        self._model, self._processor = loaded.model, loaded.processor
        self._processor.tokenizer.padding_side = "left"

    async def answer(
        self, chats: Sequence[Sequence[Message]], max_tokens: int
    ) -> list[StreamRecord]:
        start = time.perf_counter()
        inputs = self._inputs(chats)
        moments: list[float] = []

        def stamp(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """Called before a token is chosen: waits until the device has its logits."""
            if scores.is_cuda:
                torch.cuda.synchronize()
            moments.append(time.perf_counter() - start)
            return scores

        with torch.inference_mode():
            self._model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                logits_processor=[stamp],
            )
        gaps = tuple(after - before for before, after in zip(moments, moments[1:], strict=False))
        prompt_lens = inputs["attention_mask"].sum(dim=1).tolist()
        return [
            StreamRecord(
                start_s=start,
                time_to_first_token_s=moments[0],
                e2e_s=time.perf_counter() - start,
                tokens=max_tokens,
                prompt_tokens=int(prompt_len),
                counted_by="usage",
                gaps_s=gaps,
            )
            for prompt_len in prompt_lens
        ]

    def _inputs(self, chats: Sequence[Sequence[Message]]) -> Any:
        texts, images = [], []
        for messages in chats:
            texts.append(
                self._processor.apply_chat_template(
                    _with_image_parts(messages), add_generation_prompt=True, tokenize=False
                )
            )
            images.extend(_images(messages))
        inputs = self._processor(text=texts, images=images, padding=True, return_tensors="pt")
        return inputs.to(self._model.device, self._model.dtype)


def _with_image_parts(messages: Sequence[Message]) -> list[Message]:
    """The wire's image_url parts as a chat template knows them."""
    return [
        message
        | {
            "content": [
                {"type": "image"} if part["type"] == "image_url" else part
                for part in message["content"]
            ]
        }
        for message in messages
    ]


def _images(messages: Sequence[Message]) -> list[Image.Image]:
    urls = [
        part["image_url"]["url"]
        for message in messages
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    return [
        Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
        for url in urls
    ]
