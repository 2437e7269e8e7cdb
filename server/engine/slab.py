"""A slab of KV: rows of one length class as a decode step's attention reads them; KV's shape.

Does not know which request a row belongs to, nor how long it will get (cache.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.engine.memory import paged_zeros
from steering.layers import text_config


@dataclass(frozen=True)
class KVShape:
    """The KV of one token: num_layers x 2 x num_heads x head_dim of dtype."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: Any) -> "KVShape":
        config = text_config(model)
        head_dim = getattr(config, "head_dim", None)
        return cls(
            num_layers=config.num_hidden_layers,
            num_heads=config.num_key_value_heads,
            head_dim=head_dim or config.hidden_size // config.num_attention_heads,
            dtype=model.dtype,
            device=model.device,
        )


class Slab:
    """The KV of rows of one length class, dense from row 0 on.

    keys (L, capacity, H, Dh, width), values (L, capacity, H, width, Dh): a decode step's two
    products read both as they lie, for all rows and heads in one call. A product would copy what
    does not lie densely, so `width`, the tokens of each row that attention is given, follows the
    longest row, and the rows are laid out anew when it changes. Beyond a row's tokens lie zeros or
    what earlier rows left, finite and masked: a masked position still multiplies its value by zero.
    """

    # Of widths: the processor's library compiles a kernel for each shape of a product and keeps it,
    # so a new one should be rare: at least so much, and an eighth of the next power of two.
    STEP = 32
    SLACK = 64  # so much too wide is narrowed; laying out costs about what ten steps lose by it

    def __init__(self, shape: KVShape, length: int, capacity: int = 1) -> None:
        self._shape = shape
        self.length = length
        self.capacity = capacity
        self._num_rows = 0
        self._write: tuple[Tensor, Tensor] | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []  # what attention is given, by layer
        self._seen_rows = 0
        self._memory = self._make()
        self._set_width(self._width_for(0))

    @property
    def width(self) -> int:
        return self.keys.shape[-1]

    def fit(self, num_rows: int, max_rows: int) -> None:
        """Make room for `num_rows` rows, of at most `max_rows` ever; keeps what is there."""
        if num_rows <= self.capacity:
            return
        self.capacity = max(num_rows, min(2 * self.capacity, max_rows))
        held, self._memory = self._memory, self._make()
        self._memory[:, :, : held.shape[-1]] = held
        self._set_width(self.width)

    def put(self, row: int, kv: Tensor) -> None:
        """Write a row's first tokens: kv (L, 2, H, T, Dh)."""
        length = kv.shape[3]
        if length > self.width:
            self._lay_out(self._width_for(length))
        self._num_rows = max(self._num_rows, row + 1)
        self.keys[:, row, :, :, :length] = kv[:, 0].transpose(-1, -2)
        self.values[:, row, :, :length] = kv[:, 1]

    def get(self, row: int, length: int) -> Tensor:
        """A copy of a row's first tokens, (L, 2, H, length, Dh)."""
        keys = self.keys[:, row, :, :, :length].transpose(-1, -2)
        return torch.stack([keys, self.values[:, row, :, :length]], dim=1)

    def clear(self, row: int, start: int = 0) -> None:
        """Zero a row from token `start` on."""
        self.keys[:, row, :, :, start:] = 0.0
        self.values[:, row, :, start:] = 0.0

    def begin(self, lengths: Tensor, longest: int) -> None:
        """The next pass adds one token to each of the first B rows, at index lengths (B,), of
        which `longest` is the largest."""
        self._num_rows = len(lengths)
        width = self._width_for(longest + 1)
        if width > self.width or width <= self.width - self.SLACK:
            self._lay_out(width)
        self._write = (torch.arange(len(lengths), device=lengths.device), lengths)
        if self._seen_rows != len(lengths):
            self._seen_rows = len(lengths)
            self._seen = [
                (keys[: len(lengths)].flatten(0, 1), values[: len(lengths)].flatten(0, 1))
                for keys, values in self._by_layer
            ]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value (B, H, Dh): store them and return the B rows, each head's by itself:
        keys (B * H, Dh, width), values (B * H, width, Dh)."""
        assert self._write is not None, "begin comes first"
        rows, at = self._write
        keys, values = self._by_layer[layer]
        keys[rows, :, :, at] = key
        values[rows, :, at] = value
        return self._seen[layer]

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """keys (capacity, H, Dh, width) and values (capacity, H, width, Dh), to be written to."""
        return self._by_layer[layer]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """key, value (B, H, 1, Dh): store them and return the B rows, (B, H, width, Dh) each."""
        keys, values = self.append(layer, key[:, :, 0], value[:, :, 0])
        size = key.shape[:2]
        return keys.unflatten(0, size).transpose(-1, -2), values.unflatten(0, size)

    def _width_for(self, num_tokens: int) -> int:
        step = max(self.STEP, (1 << num_tokens.bit_length()) // 8)
        return min(max(1, -(-num_tokens // step)) * step, self.length)

    def _make(self) -> Tensor:
        """Memory for every layer's keys and values at their widest, (L, 2, numbers)."""
        shape = self._shape
        size = self.capacity * shape.num_heads * self.length * shape.head_dim
        return paged_zeros((shape.num_layers, 2, size), shape.dtype, shape.device)

    def _set_width(self, width: int) -> None:
        """See the memory's beginning as rows of that width."""
        heads, dim = self._shape.num_heads, self._shape.head_dim
        used = self._memory[:, :, : self.capacity * heads * dim * width]
        self.keys = used[:, 0].unflatten(1, (self.capacity, heads, dim, width))
        self.values = used[:, 1].unflatten(1, (self.capacity, heads, width, dim))
        self._by_layer = list(zip(self.keys, self.values, strict=True))
        self._seen_rows = 0

    def _lay_out(self, width: int) -> None:
        """Change the width, layer by layer, so that only one layer's rows are held twice."""
        num_rows, kept = self._num_rows, min(width, self.width)
        old = self._by_layer
        self._set_width(width)
        for (old_keys, old_values), (keys, values) in zip(old, self._by_layer, strict=True):
            held_keys = old_keys[:num_rows, :, :, :kept].clone()
            held_values = old_values[:num_rows, :, :kept].clone()
            keys[:num_rows, :, :, kept:] = 0.0
            values[:num_rows, :, kept:] = 0.0
            keys[:num_rows, :, :, :kept] = held_keys
            values[:num_rows, :, :kept] = held_values
