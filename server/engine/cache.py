"""Keys and values: of one prompt while it is prefilled, and of the rows that decode together.

Both are what a transformers attention layer calls: `update(key, value, layer)`. Masks and
positions are the runner's. KV above a steered layer depends on the plan, so nothing here is
shared between requests.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    def slab(self, num_rows: int, length: int) -> Tensor:
        """(num_rows, num_heads, length, head_dim) of zeros: a masked position still multiplies
        its value by zero, and uninitialised memory may hold NaN."""
        size = (num_rows, self.num_heads, length, self.head_dim)
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def slabs(self, num_rows: int, length: int) -> list[Tensor]:
        """One slab a layer."""
        return [self.slab(num_rows, length) for _ in range(self.num_layers)]


class PromptCache:
    """The KV of one prompt, filled chunk by chunk."""

    def __init__(self, shape: KVShape, length: int) -> None:
        self.length = length
        self.keys = shape.slabs(1, length)
        self.values = shape.slabs(1, length)
        self._start = 0

    def begin(self, start: int) -> None:
        """The next forward pass writes from token `start` on."""
        self._start = start

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """key, value (1, H, T, Dh): store them and return all up to their end."""
        end = self._start + key.shape[2]
        self.keys[layer][:, :, self._start : end] = key
        self.values[layer][:, :, self._start : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class RowCache:
    """The KV of the running rows 0..B-1, one slab a layer: (rows, H, length, Dh).

    A step attends over the longest running row only. The slabs are reallocated when they must
    grow and dropped when no row is left, so they never exceed what admission allowed (a prompt
    that is being prefilled has its own cache beside them). Beyond a row's tokens lies what
    earlier rows left, finite and masked.
    """

    LENGTH_STEP = 64

    def __init__(self, shape: KVShape) -> None:
        self._shape = shape
        self.release()

    @classmethod
    def footprint(cls, num_rows: int, length: int) -> int:
        """Tokens of memory that `num_rows` rows of up to `length` tokens take."""
        return num_rows * -(-length // cls.LENGTH_STEP) * cls.LENGTH_STEP

    @classmethod
    def longest(cls, num_rows: int, num_tokens: int) -> int:
        """The longest rows of which `num_rows` fit into `num_tokens` tokens of memory."""
        return num_tokens // num_rows // cls.LENGTH_STEP * cls.LENGTH_STEP

    @property
    def size(self) -> int:
        """Tokens of memory that the slabs take."""
        return self._rows * self._length

    def release(self) -> None:
        """Forget everything."""
        self._rows, self._length = 0, 0
        self._keys = self._shape.slabs(0, 0)
        self._values = self._shape.slabs(0, 0)

    def fit(self, num_rows: int, length: int) -> None:
        """Make room for `num_rows` rows of `length` tokens, keeping what is there."""
        length = self.footprint(1, length)
        if num_rows <= self._rows and length <= self._length:
            return
        keep_rows, keep = min(self._rows, num_rows), min(self._length, length)
        for slabs in (self._keys, self._values):
            for layer, slab in enumerate(slabs):
                slabs[layer] = self._shape.slab(num_rows, length)
                slabs[layer][:keep_rows, :, :keep] = slab[:keep_rows, :, :keep]
        self._rows, self._length = num_rows, length

    def insert(self, row: int, prompt: PromptCache) -> None:
        """Copy a prompt's KV into a row."""
        for slabs, filled in ((self._keys, prompt.keys), (self._values, prompt.values)):
            for slab, source in zip(slabs, filled, strict=True):
                slab[row, :, : prompt.length] = source[0]

    def scrub(self, row: int) -> None:
        """Zero a row that holds NaN: the row that comes after it would see it through the mask."""
        for slabs in (self._keys, self._values):
            for slab in slabs:
                slab[row] = 0.0

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row over another."""
        for slabs in (self._keys, self._values):
            for slab in slabs:
                slab[target, :, :length] = slab[source, :, :length]

    def begin(self, lengths: Tensor) -> Tensor:
        """The next pass adds one token to each of the first B rows, at index lengths (B,).

        Returns the attention mask, (B, 1, 1, longest + 1), True where a token may be seen.
        """
        self._write = (torch.arange(len(lengths), device=lengths.device), lengths)
        self._live = int(lengths.max()) + 1
        seen = torch.arange(self._live, device=lengths.device)
        return (seen <= lengths[:, None])[:, None, None]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """key, value (B, H, 1, Dh): store them and return (B, H, longest + 1, Dh) of each."""
        rows, at = self._write
        keys, values = self._keys[layer], self._values[layer]
        keys[rows, :, at] = key[:, :, 0]
        values[rows, :, at] = value[:, :, 0]
        return keys[: len(rows), :, : self._live], values[: len(rows), :, : self._live]
