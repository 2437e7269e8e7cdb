"""Keys and values: of one prompt while it is prefilled, and of the rows that decode together.

Both are what a transformers attention layer calls: `update(key, value, layer)`; masks and
positions are the decoder's. How rows lie in memory is slab.py's, what may be shared between
requests prefix.py's.
"""

from collections.abc import Hashable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from server.engine.memory import paged_zeros
from server.engine.slab import KVShape, Slab

Row = TypeVar("Row", bound=Hashable)


class PromptCache:
    """The KV of one prompt, filled chunk by chunk: `kv` (L, 2, H, length, Dh).

    That is the beginning of `memory` (L, 2, H, room, Dh). The room behind it is there on a CPU
    only, of zeros that take no memory until they are touched: attention over many keys takes them
    in multiples of STEP.
    """

    STEP = 256

    def __init__(self, shape: KVShape, length: int) -> None:
        self.length = length
        self.room = self.room_for(length) if shape.device.type == "cpu" else length
        size = (shape.num_layers, 2, shape.num_heads, self.room, shape.head_dim)
        self.memory = paged_zeros(size, shape.dtype, shape.device)
        self.kv = self.memory[..., :length, :]
        self._start = 0

    @classmethod
    def room_for(cls, length: int) -> int:
        """Tokens that there is room for in a cache of `length`."""
        return -(-length // cls.STEP) * cls.STEP

    def begin(self, start: int) -> None:
        """The next forward pass writes from token `start` on."""
        self._start = start

    def clear(self, start: int) -> None:
        """Zero what was written from token `start` on: attention is given it before it is written
        anew, and a NaN shows through the mask."""
        self.kv[..., start:, :] = 0.0

    def append(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """kv (2, H, T, Dh): store it and return all keys and values with the room behind them,
        (H, room, Dh) each."""
        own = self.memory[layer]
        own[:, :, self._start : self._start + kv.shape[2]] = kv
        return own[0], own[1]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """key, value (1, H, T, Dh): store them and return all up to their end."""
        keys, values = self.append(layer, torch.cat([key, value]))
        end = self._start + key.shape[2]
        return keys[None, :, :end], values[None, :, :end]


class RowCache(Generic[Row]):
    """The KV of the running rows, each in the slab of the shortest class that holds it.

    Attention looks at one slab after the other, so that a long row costs the short ones nothing.
    Classes double from SHORTEST up to `max_len`. A row that outgrows its class moves to the next. A
    slab without rows stays for those to come, because fresh memory is slow to touch, as long as all
    slabs together have used no more than `max_tokens`.
    """

    SHORTEST = 256

    def __init__(self, shape: KVShape, max_len: int, max_rows: int, max_tokens: int) -> None:
        self._shape = shape
        self._max_len = max_len
        self._max_tokens = max_tokens
        self._most_rows: dict[int, int] = {}  # that a slab has had, by class
        self._max_rows = max_rows
        # On a CPU room costs nothing until it is used.
        self._first_capacity = max_rows if shape.device.type == "cpu" else 1
        self._slabs: dict[int, Slab] = {}  # by class
        self._rows: dict[int, list[Row]] = {}
        self._classes: dict[Row, int] = {}
        self._lengths: dict[Row, int] = {}

    @classmethod
    def footprint(cls, length: int, max_len: int) -> int:
        """Tokens of memory that a row of up to `length` tokens takes: its class."""
        return max(length, min(max(cls.SHORTEST, 1 << (length - 1).bit_length()), max_len))

    @classmethod
    def longest(cls, num_rows: int, num_tokens: int, max_len: int) -> int:
        """The longest rows of which `num_rows` fit into `num_tokens` tokens of memory."""
        each = num_tokens // num_rows
        if each >= max_len:
            return max_len
        return 1 << (each.bit_length() - 1) if each >= cls.SHORTEST else 0

    @property
    def num_used(self) -> int:
        """Tokens of memory that the slabs have used: each as many rows as it has had at once."""
        return sum(length * most for length, most in self._most_rows.items())

    @property
    def size(self) -> int:
        """Tokens of memory that the rows take."""
        return sum(self._classes.values())

    def join(self, row: Row, prompt: PromptCache) -> None:
        """Copy a prompt's KV into a new row, with room for one token more."""
        self._enter(row, prompt.kv)

    def leave(self, row: Row, is_clean: bool = True) -> None:
        """Free a row, if it has joined; the last one of its slab moves into the gap.

        Not clean: it holds NaN, which the row that comes after it would see through the mask.
        """
        if row not in self._classes:
            return
        length = self._classes.pop(row)
        del self._lengths[row]
        slab, rows = self._slabs[length], self._rows[length]
        at = rows.index(row)
        last = rows.pop()
        if at < len(rows):
            rows[at] = last
            filled = self._lengths[last] + 1
            slab.put(at, slab.get(len(rows), filled))
            if not is_clean:
                slab.clear(at, start=filled)
        if not is_clean:
            slab.clear(len(rows))  # the place that is free now: `last` may be unclean as well
        if not rows:
            del self._rows[length]
            self._trim()

    def arrange(self, lengths: Mapping[Row, int]) -> list[tuple[Slab, list[Row]]]:
        """Make room for one token more in every row, of now lengths[row] tokens; returns the slabs
        with their rows, in the order in which a pass takes them."""
        for row, length in lengths.items():
            self._lengths[row] = length
            if length >= self._classes[row]:
                slab, rows = self._slabs[self._classes[row]], self._rows[self._classes[row]]
                held = slab.get(rows.index(row), length)
                self.leave(row)
                self._enter(row, held)
        return [(self._slabs[length], self._rows[length]) for length in sorted(self._rows)]

    def _enter(self, row: Row, kv: Tensor) -> None:
        """A new row with room for one token more: kv (L, 2, H, length, Dh)."""
        length = kv.shape[3]
        row_class = self.footprint(length + 1, self._max_len)
        slab = self._slabs.get(row_class)
        if slab is None:
            slab = self._slabs[row_class] = Slab(self._shape, row_class, self._first_capacity)
        rows = self._rows.setdefault(row_class, [])
        slab.fit(len(rows) + 1, self._max_rows)
        self._most_rows[row_class] = max(self._most_rows.get(row_class, 0), len(rows) + 1)
        slab.put(len(rows), kv)
        rows.append(row)
        self._classes[row], self._lengths[row] = row_class, length

    def _trim(self) -> None:
        """Drop slabs without rows, the longest first, until what was used fits the budget."""
        for length in sorted(self._slabs.keys() - self._rows.keys(), reverse=True):
            if self.num_used <= self._max_tokens:
                return
            del self._slabs[length], self._most_rows[length]
