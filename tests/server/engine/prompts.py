"""Conversations and the builders of their prompts, for the tests of inputs and of pairs."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from server.engine.families import family_of
from server.engine.inputs import InputBuilder
from tests.server.engine.conftest import picture
from tests.server.engine.under_test import conversation
from tests.tiny_models import TinyModel

TURNS = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {
        "role": "user",
        "content": [{"type": "text", "text": "And "}, {"type": "image"}, {"type": "image"}],
    },
]
TEXT_TURNS = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "text", "text": "And "}]},
]
IMAGES = [picture(1), picture(2, (48, 20)), picture(3, (16, 40))]
CASES: dict[str, tuple[list[dict[str, Any]], list[Image.Image]]] = {
    "text": (conversation("Hello"), []),
    "one picture": (conversation("What is it?", 1), IMAGES[:1]),
    "two of different sizes": (conversation("Compare.", 2), IMAGES[:2]),
    "the same twice": (conversation("Compare.", 2), [IMAGES[1], IMAGES[1]]),
    "several turns": (TURNS, IMAGES),
}


class CountingProcessor:
    """The processor itself, with the sizes of the pictures that it was asked to read."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.sizes: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, **kwargs: Any) -> Any:
        self.sizes += [image.size for image in kwargs["images"]]
        return self._processor(**kwargs)


def builder_of(tiny: TinyModel, processor: Any = None, **kept: int) -> InputBuilder:
    return InputBuilder(family_of(tiny.model), tiny.model, processor or tiny.processor, **kept)


def whole(tiny: TinyModel, messages: Any, images: list[Image.Image]) -> dict[str, Tensor]:
    """The processor's own call on the whole conversation."""
    text = tiny.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return dict(tiny.processor(text=[text], images=images or None, return_tensors="pt"))


def own_positions(tiny: TinyModel, processed: dict[str, Tensor]) -> Tensor:
    """(P, T) as the bare model makes them."""
    num_tokens = processed["input_ids"].shape[1]
    if not tiny.name.startswith("qwen"):
        return torch.arange(num_tokens)[None]
    if "image_grid_thw" not in processed:
        return torch.arange(num_tokens).expand(3, -1)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    ids, _ = tiny.model.model.get_rope_index(**{name: processed[name] for name in names})
    return ids[:, 0]


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
