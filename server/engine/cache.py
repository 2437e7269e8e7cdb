"""Keys and values: of one prompt while it is prefilled, and of the rows that decode together.

Both are what a transformers attention layer calls: `update(key, value, layer)`; masks and
positions are the decoder's. What may be shared between requests is prefix.py's.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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


class PromptCache:
    """The KV of one prompt, filled chunk by chunk: `kv` (L, 2, H, length, Dh).

    On a CPU there is room behind it, of zeros that take no memory until they are touched: attention
    over many keys takes them in multiples of STEP.
    """

    STEP = 256

    def __init__(self, shape: KVShape, length: int) -> None:
        self.length = length
        room = self.room(length) if shape.device.type == "cpu" else length
        size = (shape.num_layers, 2, shape.num_heads, room, shape.head_dim)
        self._memory = paged_zeros(size, shape.dtype, shape.device)
        self.kv = self._memory[..., :length, :]
        self._start = 0

    @classmethod
    def room(cls, length: int) -> int:
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
        own = self._memory[layer]
        own[:, :, self._start : self._start + kv.shape[2]] = kv
        return own[0], own[1]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """key, value (1, H, T, Dh): store them and return all up to their end."""
        keys, values = self.append(layer, torch.cat([key, value]))
        end = self._start + key.shape[2]
        return keys[None, :, :end], values[None, :, :end]


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


Row = TypeVar("Row", bound=Hashable)


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
