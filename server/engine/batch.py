"""What one forward pass computes: chunks of prompts and one token of every running row.

The decoders (eager.py, fused.py) run it; the runner makes it. A pass steers at most one token of
each chunk, its last, and every row's. Does not decide what runs (scheduler.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from server.engine.cache import PromptCache
from server.engine.slab import Slab
from steering.plan import SteeringPlan
from steering.stopwatch import Reading, Seconds


@dataclass(frozen=True)
class Shift:
    """A shift that the pass measures for one of its own chunks, and applies by `plan`.

    corrupted, text_only: indices of the chunks whose last tokens show it, before this one.
    directions (L, D) float32: unit vectors onto which it is projected first.
    """

    plan: SteeringPlan
    corrupted: int
    text_only: int
    directions: Tensor | None = None


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of one prompt: embeds (T, D), positions (P, T).

    What its last token subtracts at each layer: `delta` (L, D) float32, or a `shift` that this
    pass measures, or its own part in the subspace of `basis` (L, k, D) float32 (`RowSteering`), or
    nothing. `pictures`: spans of tokens that see each other both ways.
    wants_hidden: its last token's normed state is asked for; wants_states: what that token's state
    is after each layer, in a chunk that subtracts nothing.
    """

    embeds: Tensor
    positions: Tensor
    cache: PromptCache
    start: int
    end: int
    delta: Tensor | None = None
    basis: Tensor | None = None
    shift: Shift | None = None
    pictures: tuple[tuple[int, int], ...] = ()
    wants_hidden: bool = True
    wants_states: bool = False

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Rows:
    """One token of each of the B rows of a slab: embeds (B, D), positions (P, B), lengths (B,)
    before it, of which `longest` is the largest."""

    embeds: Tensor
    positions: Tensor
    slab: Slab
    lengths: Tensor
    longest: int


@dataclass(frozen=True)
class Batch:
    """Chunks and slabs of rows of one pass; either may be absent, not both.

    deltas (L, rows, D): what the rows of all slabs, in order, subtract, in the decoder's steering
    dtype, zero for rows that are not steered so; None when none is. bases (L, rows, k, D) float32:
    likewise, of the rows whose own part in a subspace is subtracted.
    """

    chunks: tuple[Chunk, ...] = ()
    slabs: tuple[Rows, ...] = ()
    deltas: Tensor | None = None
    bases: Tensor | None = None

    @property
    def embeds(self) -> Tensor:
        """(N, D): of all tokens, the chunks' before the rows'."""
        parts = [chunk.embeds for chunk in self.chunks] + [rows.embeds for rows in self.slabs]
        return torch.cat(parts)

    @property
    def positions(self) -> Tensor:
        """(P, N)."""
        parts = [chunk.positions for chunk in self.chunks]
        return torch.cat(parts + [rows.positions for rows in self.slabs], dim=-1)


@dataclass
class Output:
    """hidden (S, D): the normed last states of the chunks that want them, then of the rows.

    shifts: by chunk index, what a measured shift came to: delta (L, D) float32 and its doses (L,).
    states: by chunk index, (L, D) float32 of each that wants them. fired: at how many layers
    steering had its turn, over `forwards` runs through all of them. injected: what subtracting
    took.
    """

    hidden: Tensor
    shifts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    fired: int = 0
    forwards: int = 1
    injected: Reading = field(default_factory=Seconds)


def stacked_bases(bases: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """(L, N, k, D) of N bases (L, k, D), None for none: rows of zeros fill up to the largest k."""
    given = [basis for basis in bases if basis is not None]
    if not given:
        return None
    num_layers, _, size = given[0].shape
    rank = max(basis.shape[1] for basis in given)
    table = torch.zeros(num_layers, len(bases), rank, size, device=device)
    for number, basis in enumerate(bases):
        if basis is not None:
            table[:, number, : basis.shape[1]] = basis.to(device)
    return table


class Decoder(Protocol):
    """Runs the language model's layers under steering; owns no request state."""

    num_layers: int
    steering_dtype: torch.dtype  # of Batch.deltas

    def run(self, batch: Batch) -> Output: ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(S, D) -> (S, V) float32."""
        ...

    def trace(self, batch: Batch) -> tuple[Tensor, Output]:
        """Run it, and return too what each layer's *reader* (the next layer, the final norm) was
        given at the last token of every chunk and of every row: (L, chunks + rows, D) float32.

        The batch measures no shift.
        """
        ...
