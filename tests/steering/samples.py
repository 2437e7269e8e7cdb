"""Small artefacts and models whose values a test can compute by hand."""

from typing import Any

import torch
from torch import Tensor, nn

from steering.models import ModelIdentity
from steering.vectors import Manifest, ShiftVectors


def identity(**changes: Any) -> ModelIdentity:
    values: dict[str, Any] = {
        "model_id": "tiny",
        "revision": None,
        "weights_digest": "a" * 64,
        "dtype": "float32",
        "quantisation": None,
        "processor_digest": "b" * 64,
        "chat_template_digest": "c" * 64,
        "num_layers": 3,
        "hidden_size": 8,
    }
    return ModelIdentity(**values | changes)


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "model": identity(),
        "corruption": "blank",
        "image_size": "336x336",
        "anchor_set": "few",
        "anchor_set_digest": "d" * 64,
        "num_anchors": 4,
        "versions": (("deshift", "0"), ("torch", "2")),
        "created_at": "2026-01-02T03:04:05+00:00",
    }
    return Manifest(**values | changes)


def shift_vectors(seed: int = 0, **changes: Any) -> ShiftVectors:
    """All tensors, the optional ones too; 3 layers of width 8."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    values: dict[str, Any] = {
        "manifest": manifest(),
        "mean": normal(3, 8),
        "hidden_norm": normal(3).abs() + 1,
        "consistency": normal(3).clamp(-1, 1),
        "basis": normal(3, 2, 8),
        "singular_values": normal(3, 2).abs(),
        "refusal_direction": normal(3, 8),
        "text_mean": normal(3, 8),
    }
    return ShiftVectors(**values | changes)


class AddsConstant(nn.Module):
    """A decoder layer that adds the same known vector to every token."""

    def __init__(self, constant: Tensor, *, returns_tuple: bool) -> None:
        super().__init__()
        self.constant = constant
        self.returns_tuple = returns_tuple

    def forward(self, hidden: Tensor) -> Any:
        hidden = hidden + self.constant
        return (hidden, "cache") if self.returns_tuple else hidden


class AddingModel(nn.Module):
    """Layer k adds `constants[k]`; a final norm of a kind follows, so the end is not h_{L-1}."""

    def __init__(self, constants: Tensor, *, returns_tuple: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            AddsConstant(constant, returns_tuple=returns_tuple) for constant in constants
        )

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            output = layer(hidden)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden * 100
