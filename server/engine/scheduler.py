"""Who runs next: waiting -> prefilling -> a row of the batch -> finished. Plain Python, no torch.

First come, first served, within `max_rows` and a budget of KV tokens. A step prefills only so
many tokens, so that a long prompt does not freeze the streams; how many is pacing.py's.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from server.engine.sequences import ActiveRequest, PromptState, Sequence

FEW_TOKENS = 16  # an answer of fewer has no row for long


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens [start, end) of one of a request's prompts.

    reads_gate: its last token runs unsteered, for the request's gate to read.
    """

    active: ActiveRequest
    state: PromptState
    start: int
    end: int
    reads_gate: bool = False

    @property
    def is_last(self) -> bool:
        return self.end == len(self.state.prompt)

    @property
    def was_taken_back(self) -> bool:
        """Whether its request has given its shift up since: its pair is needed no more, and its own
        prompt begins anew, without what went before this chunk."""
        return self.state not in self.active.prompts or self.state.num_done < self.end

    @property
    def ends_prefill(self) -> bool:
        """Whether the answer's first token comes of it."""
        return self.is_last and self.state.role == "own" and not self.reads_gate


class Scheduler:
    """`footprint(length)` is the KV tokens that a row of up to `length` tokens takes.

    `on_admit` may move a prompt forward by what a cache has of it. With `keep_pictures_whole` no
    chunk ends inside a picture.
    """

    def __init__(
        self,
        max_rows: int,
        kv_tokens: int,
        footprint: Callable[[int], int],
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

    def join(self, active: ActiveRequest) -> None:
        """The sequences of a prefilled request become rows."""
        self.prefilling.remove(active)
        self.rows.extend(active.sequences)

    def leave(self, sequence: Sequence) -> None:
        """Free a sequence's row."""
        self.rows.remove(sequence)

    def drop(self, active: ActiveRequest) -> None:
        """Forget a request that has no row yet."""
        if active in self.prefilling:
            self.prefilling.remove(active)
        elif active in self.waiting:
            self.waiting.remove(active)

    @property
    def num_waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self.waiting) + len(self.prefilling)

    def num_within(self, num_tokens: int) -> int:
        """How many of these have room and would begin to decode after so many tokens of prefill,
        in their order; without answers of a few tokens, which are over before anybody gains by
        them. What a cache has of a waiting one's prompt is not known yet."""
        if not self.num_waiting:
            return 0  # most steps: nothing of the rows is looked at
        free, reserved, num = self._max_rows - len(self.rows), self.reserved, 0
        admitted = ((active, 0) for active in self.prefilling)
        waiting = ((active, self._needs(active)) for active in self.waiting)
        for active, needs in chain(admitted, waiting):
            num_tokens -= sum(state.num_left for state in active.prompts)
            free -= active.num_rows
            reserved += needs
            if num_tokens < 0 or free < 0 or reserved > self._kv_tokens:
                break
            num += active.max_tokens >= FEW_TOKENS
        return num

    @property
    def num_rows(self) -> int:
        """Rows that are taken, and those that what prefills will take."""
        return len(self.rows) + sum(active.num_rows for active in self.prefilling)

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.prefilling or self.rows)

    @property
    def reserved(self) -> int:
        """KV tokens that the admitted requests may come to need."""
        arriving = sum(self._needs(active) for active in self.prefilling)
        return arriving + sum(self._footprint(row.active.max_len) for row in self.rows)

    def _needs(self, active: ActiveRequest) -> int:
        return active.num_rows * self._footprint(active.max_len)

    def _admit(self) -> ActiveRequest | None:
        """Take the first waiting request if its rows fit beside those admitted before."""
        while self.waiting:
            first = self.waiting[0]
            num_rows = self.num_rows + first.num_rows
            if num_rows > self._max_rows or self.reserved + self._needs(first) > self._kv_tokens:
                return None
            self.prefilling.append(self.waiting.popleft())
            self._on_admit(first)
            if first in self.prefilling:  # else it failed there
                return first
        return None

    def _advance(self, active: ActiveRequest, budget: int) -> list[PrefillChunk]:
        """The next chunks of a request's prompts.

        The last tokens of all its prompts run in one pass, because the own prompt's subtracts what
        the pair's show. So none is run to its end before all can be. Where a gate is to be read
        first, the end of the own prompt may lie before its last token (`PromptState.end`).
        """
        prompts = [state for state in active.prompts if state.num_left]
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
                reads_gate = end == len(state.prompt) and state is active.gate_prompt
                chunks.append(PrefillChunk(active, state, start, end, reads_gate))
        return chunks

    def _cut(self, state: PromptState, end: int) -> int:
        """Where a chunk that may end at `end` does."""
        if self._keep_pictures_whole:
            for picture in state.prompt.images:
                if picture.start < end < picture.end:
                    return min(picture.end, state.end)
        return end
