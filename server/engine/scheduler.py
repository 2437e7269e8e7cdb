"""Who runs next: waiting -> prefilling -> a row of the batch -> finished. Plain Python, no torch.

First come, first served, within `max_rows` and a budget of KV tokens. A step prefills only so
many tokens, so that a long prompt does not freeze the streams; how many is pacing.py's.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.sequences import ActiveRequest, PromptState, Sequence


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens [start, end) of one of a request's prompts."""

    active: ActiveRequest
    state: PromptState
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == len(self.state.prompt)


@dataclass(frozen=True)
class RowMove:
    """After a row was freed: the row `source` now lives in `target`."""

    source: int
    target: int


class Scheduler:
    """`footprint(num_rows, length)` is the KV tokens that rows of that length take together;
    `on_admit` may move a prompt forward by what a cache has of it. With `keep_pictures_whole` no
    chunk ends inside a picture.
    """

    def __init__(
        self,
        max_rows: int,
        kv_tokens: int,
        footprint: Callable[[int, int], int],
        on_admit: Callable[[ActiveRequest], None] = lambda _active: None,
        keep_pictures_whole: bool = False,
    ) -> None:
        self._max_rows = max_rows
        self._kv_tokens = kv_tokens
        self._footprint = footprint
        self._on_admit = on_admit
        self._keep_pictures_whole = keep_pictures_whole
        self.waiting: deque[ActiveRequest] = deque()
        self.prefilling: list[ActiveRequest] = []
        self.rows: list[Sequence] = []

    def add(self, active: ActiveRequest) -> None:
        self.waiting.append(active)

    def schedule(self, budget: int) -> list[PrefillChunk]:
        """This step's prefill, about `budget` tokens: of admitted requests in order, then of newly
        admitted ones.

        All rows decode beside it. Whoever runs the chunks reports each finished request by `join`.
        """
        chunks: list[PrefillChunk] = []
        pending = deque(self.prefilling)
        while budget > 0 and (active := pending.popleft() if pending else self._admit()):
            taken = self._advance(active, budget)
            budget -= sum(chunk.end - chunk.start for chunk in taken)
            chunks.extend(taken)
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
        active = self.waiting.popleft()
        self.prefilling.append(active)
        self._on_admit(active)
        return active

    def _advance(self, active: ActiveRequest, budget: int) -> list[PrefillChunk]:
        """The next chunks of a request's prompts.

        The last tokens of all its prompts run in one pass, because the own prompt's subtracts what
        the pair's show. So none is run to its end before all can be.
        """
        prompts = active.prompts
        num_left = sum(state.num_left for state in prompts)
        is_end = num_left <= budget or num_left == len(prompts)
        chunks = []
        for state in prompts:
            start = state.num_done
            if is_end:
                end = start + state.num_left
            else:
                end = self._cut(state, start + min(state.num_left - 1, budget))
            if end > start:
                state.num_done = end
                budget -= end - start
                chunks.append(PrefillChunk(active, state, start, end))
        return chunks

    def _cut(self, state: PromptState, end: int) -> int:
        """Where a chunk that may end at `end` does."""
        if self._keep_pictures_whole:
            for picture in state.prompt.images:
                if picture.start < end < picture.end:
                    return picture.end
        return end
