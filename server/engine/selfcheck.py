"""The start-up self-check: the engine's passes compute what the bare model computes, or no service.

A prompt with pictures goes through the model as transformers runs it, then through the engine's
inputs, embedding and decoder, in chunks and rows. This is what lets a family serve that nobody has
tried (families.py lists those that the conformance suite covers), and what guards the others
against a changed library. Does not look at steering (canary.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from server.engine.batch import Batch, Chunk, Decoder, Rows
from server.engine.cache import PromptCache
from server.engine.families import Family, bidirectional_blocks, embed, encode_image
from server.engine.inputs import InputBuilder
from server.engine.slab import KVShape, Slab
from server.engine.types import EngineError, Prompt
from steering.processors import writes_its_own_bos

# Of the logits' own spread. bfloat16 rounds every layer, and two ways of rounding part by a few
# per cent; a wrong position or mask, or a forgotten picture, is far beyond.
TOLERANCE = {torch.float32: 1e-3}
TOLERANCE_OF_HALVES = 0.15
NUM_STEPS = 2
QUESTION = "What is in this picture?"


class SelfCheck:
    """Construction runs the bare model, so it comes before a decoder takes the weights over.

    Raises EngineError, naming the family, where processor or model raise anything.
    """

    def __init__(self, family: Family, model: Any, processor: Any, inputs: InputBuilder) -> None:
        self._family = family
        self._model = model
        messages = [
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "image"},
                    {"type": "text", "text": QUESTION},
                ],
            }
        ]
        # Two of different sizes: some families cut pictures otherwise when there are several.
        gradient = Image.linear_gradient("L").convert("RGB")
        images = [gradient.resize((96, 64)), gradient.resize((48, 80))]
        with _worded(family):
            prompt = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            batch = processor(
                text=[prompt],
                images=[images],
                add_special_tokens=not writes_its_own_bos(processor, prompt),
                return_tensors="pt",
            ).to(model.device)
            self._reference, self._answer = _reference(model, dict(batch))
            self._prompt = inputs.build(messages, images).prompt

    def compare(self, decoder: Decoder) -> None:
        """Raise EngineError, naming the family, unless `decoder` computes the same."""
        with _worded(self._family):
            logits = self._logits(decoder)
            spread = self._reference.std(dim=-1)
            errors = (logits - self._reference).square().mean(dim=-1).sqrt() / spread
            worst = float(errors.max())
        tolerance = TOLERANCE.get(self._model.dtype, TOLERANCE_OF_HALVES)
        if not worst <= tolerance:
            raise EngineError(
                f"{self._family.name} is not served: the engine's logits differ from the bare "
                f"model's by {worst:.2g} of their spread (at most {tolerance:g} would be rounding)"
            )

    def _logits(self, decoder: Decoder) -> Tensor:
        """(1 + NUM_STEPS, V): at the prompt's last token and at each answer token."""
        prompt = self._prompt
        shape = KVShape.of(self._model)
        features = {image.digest: encode_image(self._model, image) for image in prompt.images}
        embeds = embed(self._model, prompt, features, 0, len(prompt))[0]
        cache = PromptCache(shape, len(prompt))
        middle = prompt.images[-1].end  # after the pictures: some families see them whole
        for start, end in ((0, middle), (middle, len(prompt))):
            chunk = self._chunk(prompt, embeds, cache, start, end)
            hidden = decoder.run(Batch(chunks=(chunk,))).hidden
        logits = [decoder.logits(hidden)]
        slab = Slab(shape, len(prompt) + NUM_STEPS)
        slab.put(0, cache.kv)
        for step, token in enumerate(self._answer):
            logits.append(decoder.logits(self._step(decoder, slab, token, step)))
        return torch.cat(logits)

    def _chunk(
        self, prompt: Prompt, embeds: Tensor, cache: PromptCache, start: int, end: int
    ) -> Chunk:
        return Chunk(
            embeds=embeds[start:end],
            positions=prompt.position_ids[:, start:end].to(embeds.device),
            cache=cache,
            start=start,
            end=end,
            pictures=bidirectional_blocks(self._family, self._model, prompt),
        )

    def _step(self, decoder: Decoder, slab: Slab, token: Tensor, step: int) -> Tensor:
        length = len(self._prompt) + step
        position = torch.tensor([[self._prompt.next_position + step]], device=token.device)
        num_axes = 3 if self._family.has_mrope else 1
        rows = Rows(
            embeds=self._model.get_input_embeddings()(token[None]),
            positions=position.expand(num_axes, -1),
            slab=slab,
            lengths=torch.tensor([length], device=token.device),
            longest=length,
        )
        return decoder.run(Batch(slabs=(rows,))).hidden


@contextmanager
def _worded(family: Family) -> Iterator[None]:
    """Whatever a processor or a model raises here, an operator is told what is not served."""
    try:
        yield
    except Exception as error:  # boundary: a model's own code may raise anything
        first = next(iter(str(error).splitlines()), "")
        raise EngineError(
            f"{family.name} is not served: the self-check failed: {type(error).__name__}: {first}"
        ) from error


def _reference(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The bare model's logits at the prompt's last token and at NUM_STEPS answer tokens,
    (1 + NUM_STEPS, V) float32, and those tokens: any will do, so the prompt's first ones."""
    answer = batch["input_ids"][0, :NUM_STEPS]
    prompt_len = batch["input_ids"].shape[1]
    longer = {
        name: torch.cat([tensor, torch.zeros_like(tensor[:, :NUM_STEPS])], dim=1)
        for name, tensor in batch.items()
        if tensor.shape[:2] == (1, prompt_len)
    }
    longer["input_ids"][0, prompt_len:] = answer
    longer["attention_mask"][:] = 1
    inputs = {
        name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in {**batch, **longer}.items()
    }
    logits = model(**inputs, use_cache=False).logits
    return logits[0, prompt_len - 1 :].float(), answer
