"""Keys and values: of one prompt while it is prefilled, and of the rows that decode together.

Both are what a transformers attention layer calls: `update(key, value, layer)`; masks and
positions are the decoder's. What may be shared between requests is prefix.py's.
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


class PromptCache:
    """The KV of one prompt, filled chunk by chunk: `kv` (L, 2, H, length, Dh)."""

    def __init__(self, shape: KVShape, length: int) -> None:
        self.length = length
        size = (shape.num_layers, 2, shape.num_heads, length, shape.head_dim)
        self.kv = torch.empty(size, dtype=shape.dtype, device=shape.device)
        self._start = 0

    def begin(self, start: int) -> None:
        """The next forward pass writes from token `start` on."""
        self._start = start

    def append(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """kv (2, H, T, Dh): store it and return all keys and values up to its end, (H, end, Dh)."""
        end = self._start + kv.shape[2]
        own = self.kv[layer]
        own[:, :, self._start : end] = kv
        return own[0, :, :end], own[1, :, :end]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """key, value (1, H, T, Dh): store them and return all up to their end."""
        keys, values = self.append(layer, torch.cat([key, value]))
        return keys[None], values[None]


class RowCache:
    """The KV of the running rows 0..B-1, one slab: (L, rows, 2, H, length, Dh).

    A step attends over the longest running row only. The slab is reallocated when it must grow
    and dropped when no row is left, so it never exceeds what admission allowed (a prompt that is
    being prefilled has its own cache beside it). Beyond a row's tokens lies what earlier rows
    left, finite and masked: a masked position still multiplies its value by zero.
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
        """Tokens of memory that the slab takes."""
        return self._kv.shape[1] * self._kv.shape[4]

    def release(self) -> None:
        """Forget everything."""
        self._kv = self._slab(0, 0)

    def fit(self, num_rows: int, length: int) -> None:
        """Make room for `num_rows` rows of `length` tokens, keeping what is there."""
        rows, room = self._kv.shape[1], self._kv.shape[4]
        length = self.footprint(1, length)
        if num_rows <= rows and length <= room:
            return
        grown = self._slab(num_rows, length)
        rows, room = min(rows, num_rows), min(room, length)
        grown[:, :rows, :, :, :room] = self._kv[:, :rows, :, :, :room]
        self._kv = grown

    def insert(self, row: int, prompt: PromptCache) -> None:
        """Copy a prompt's KV into a row."""
        self._kv[:, row, :, :, : prompt.length] = prompt.kv

    def scrub(self, row: int) -> None:
        """Zero a row that holds NaN: the row that comes after it would see it through the mask."""
        self._kv[:, row] = 0.0

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row over another."""
        self._kv[:, target, :, :, :length] = self._kv[:, source, :, :, :length]

    def begin(self, lengths: Tensor, longest: int) -> None:
        """The next pass adds one token to each of the first B rows, at index lengths (B,), of
        which `longest` is the largest."""
        self._write = (torch.arange(len(lengths), device=lengths.device), lengths)
        self._live = longest + 1

    def append(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """kv (B, 2, H, Dh): store it and return keys and values, (B, H, longest + 1, Dh) each."""
        rows, at = self._write
        slab = self._kv[layer]
        slab[rows, :, :, at] = kv
        live = slab[: len(rows), :, :, : self._live]
        return live[:, 0], live[:, 1]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """key, value (B, H, 1, Dh): store them and return all, as `append` does."""
        return self.append(layer, torch.stack([key[:, :, 0], value[:, :, 0]], dim=1))

    def _slab(self, num_rows: int, length: int) -> Tensor:
        """Zeros: uninitialised memory may hold NaN."""
        shape = self._shape
        size = (shape.num_layers, num_rows, 2, shape.num_heads, length, shape.head_dim)
        return torch.zeros(size, dtype=shape.dtype, device=shape.device)
