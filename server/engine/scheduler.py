"""Who runs next: waiting -> prefilling -> a row of the batch -> finished. Plain Python, no torch.

First come, first served, within `max_rows` and a budget of KV tokens. A step prefills at most
`prefill_chunk` tokens, so that a long prompt does not freeze the streams.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.sequences import ActiveRequest, Sequence


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens [start, end) of one prompt."""

    active: ActiveRequest
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == self.active.prompt_len


@dataclass(frozen=True)
class RowMove:
    """After a row was freed: the row `source` now lives in `target`."""

    source: int
    target: int


class Scheduler:
    """`footprint(num_rows, length)` is the KV tokens that rows of that length take together."""

    def __init__(
        self,
        max_rows: int,
        kv_tokens: int,
        prefill_chunk: int,
        footprint: Callable[[int, int], int],
    ) -> None:
        self._max_rows = max_rows
        self._kv_tokens = kv_tokens
        self._prefill_chunk = prefill_chunk
        self._footprint = footprint
        self.waiting: deque[ActiveRequest] = deque()
        self.prefilling: list[ActiveRequest] = []
        self.rows: list[Sequence] = []

    def add(self, active: ActiveRequest) -> None:
        self.waiting.append(active)

    def schedule(self) -> list[PrefillChunk]:
        """This step's prefill: chunks of admitted prompts in order, then of newly admitted ones.

        All rows decode after it. Whoever runs the chunks reports each finished prompt by `join`.
        """
        chunks: list[PrefillChunk] = []
        budget = self._prefill_chunk
        pending = deque(self.prefilling)
        while budget > 0 and (active := pending.popleft() if pending else self._admit()):
            start = active.num_prefilled
            active.num_prefilled = min(active.prompt_len, start + budget)
            budget -= active.num_prefilled - start
            chunks.append(PrefillChunk(active, start, active.num_prefilled))
        return chunks

    def join(self, active: ActiveRequest) -> int:
        """Give rows to the sequences of a prefilled request; returns the first row."""
        self.prefilling.remove(active)
        first = len(self.rows)
        self.rows.extend(active.sequences)
        return first

    def leave(self, sequence: Sequence) -> RowMove | None:
        """Free a sequence's row; the last row moves into the gap."""
        row = self.rows.index(sequence)
        last = self.rows.pop()
        if row == len(self.rows):
            return None
        self.rows[row] = last
        return RowMove(source=len(self.rows), target=row)

    def drop(self, active: ActiveRequest) -> None:
        """Forget a request that has no row yet."""
        if active in self.prefilling:
            self.prefilling.remove(active)
        elif active in self.waiting:
            self.waiting.remove(active)

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.prefilling or self.rows)

    def reserved(self, *candidates: ActiveRequest) -> tuple[int, int]:
        """(rows, longest row) that the admitted requests and `candidates` may come to need."""
        arriving = [*self.prefilling, *candidates]
        num_rows = len(self.rows) + sum(active.num_rows for active in arriving)
        lengths = [active.max_len for active in arriving] + [s.active.max_len for s in self.rows]
        return num_rows, max(lengths, default=0)

    def _admit(self) -> ActiveRequest | None:
        """Take the first waiting request if its rows fit beside those admitted before."""
        if not self.waiting:
            return None
        num_rows, length = self.reserved(self.waiting[0])
        if num_rows > self._max_rows or self._footprint(num_rows, length) > self._kv_tokens:
            return None
        self.prefilling.append(self.waiting.popleft())
        return self.prefilling[-1]
