"""What passes cost, booked on the requests that were in them, once the device tells.

Seconds on a CPU are known at once; those of a GPU when it has come past the work, so they are
booked some steps later, and nothing ever waits for them. Does not decide what is timed.
"""

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

import torch

from server.engine.batch import Output
from server.engine.scheduler import PrefillChunk
from server.engine.sequences import ActiveRequest, Sequence
from server.engine.stats import Counters
from steering.stopwatch import Reading, stopwatch_of

_WEIGHT = 0.2  # of the newest measurement in the running means


class Costs:
    """Engine thread only."""

    def __init__(self, device: torch.device, counters: Counters) -> None:
        self._device = device
        self._counters = counters
        self._rows_s: dict[int, float] = {}  # passes without prompts, by number of rows
        self._unread: deque[tuple[Reading, Callable[[float], None]]] = deque()

    @contextmanager
    def timed(self, book: Callable[[float], None]) -> Iterator[None]:
        """Give `book` the seconds that the block took the device; nothing where it raises."""
        stopwatch = stopwatch_of(self._device)
        stopwatch.start()
        yield
        stopwatch.stop()
        self.when_known(stopwatch.take(), book)

    def when_known(self, reading: Reading, book: Callable[[float], None]) -> None:
        self._unread.append((reading, book))
        self.settle()

    def settle(self) -> None:
        """Book what is known by now. A request whose newest tokens have been looked at has all of
        its own: the device has come past them."""
        while self._unread and (seconds := self._unread[0][0].seconds()) is not None:
            self._unread.popleft()[1](seconds)

    def book_pass(
        self,
        chunks: Seq[PrefillChunk],
        rows: Seq[Sequence],
        probes: Seq[ActiveRequest],
        seconds: float,
    ) -> None:
        """The pair's prompts, and the token that a gate reads, bear what their tokens add to a
        pass; what it takes without any prompt, reading all weights once, it takes anyway."""
        self._counters.prefill_tokens["probe"] += len(probes)
        num_prefilled = sum(chunk.end - chunk.start for chunk in chunks)
        token_s = self._token_s(seconds, len(rows), num_prefilled + len(probes))
        for chunk in chunks:
            num_tokens = chunk.end - chunk.start
            self._counters.prefill_tokens[chunk.state.asker] += num_tokens
            if chunk.state.role != "own":
                chunk.active.book_shift(token_s * num_tokens)
            elif chunk.reads_gate:
                chunk.active.book_shift(token_s)

    def _token_s(self, seconds: float, num_rows: int, num_prefilled: int) -> float:
        """What each prefilled token has added to a pass; a pass of rows alone is remembered."""
        if num_prefilled == 0:
            before = self._rows_s.get(num_rows, seconds)
            self._rows_s[num_rows] = before + _WEIGHT * (seconds - before)
            return 0.0
        nearest = min(self._rows_s, key=lambda seen: abs(seen - num_rows), default=None)
        without = 0.0 if nearest is None else self._rows_s[nearest]
        return max(seconds - without, 0.1 * seconds) / num_prefilled

    def book_injection(
        self, chunks: Seq[PrefillChunk], rows: Seq[Sequence], output: Output
    ) -> None:
        """Every request in a pass has waited for all that was subtracted in it."""
        actives = [chunk.active for chunk in chunks] + [row.active for row in rows]
        once = {id(active): active for active in actives}.values()

        def book(seconds: float) -> None:
            for active in once:
                active.inject_s += seconds

        self.when_known(output.injected, book)
