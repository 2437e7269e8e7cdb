"""How much prefill a step may do while streams wait for it. Plain arithmetic on measured times."""

from dataclasses import dataclass, field

# A step with prefill may take this many times as long as one without. Below 3, since step times
# scatter, and prefill of a long prompt gets dearer towards its end.
MAX_STRETCH = 1.75
MIN_CHUNK = 8
# A step that brings this many times the running rows into the batch may take as long as it does: it
# holds up few for many, and a row sees few of them, since each time the batch grows threefold.
MANY = 2
# Other bursts of prompts may take long steps too: one in so many, so that the 99th percentile of
# the gaps does not see them; after a while without any, a few in a row, since clients that begin
# together do not arrive together.
LONG_STEP_EVERY = 128
MAX_LONG_STEPS = 3
MIN_BURST = 4  # prompts that wait, and half as many as rows that run
_WEIGHT = 0.2  # of the newest measurement in the running means


@dataclass
class Pacer:
    """Learns what a decode step and a prefilled token cost, and allots prefill accordingly.

    max_chunk: tokens of prefill in one step when nobody waits for it; also the upper bound.
    """

    max_chunk: int
    _decode_s: dict[int, float] = field(default_factory=dict)  # by number of rows
    _token_s: float | None = None
    _paced: int = 0  # what the last budget would have been without a long step
    _long_steps: float = MAX_LONG_STEPS  # that are granted at this moment

    def budget(self, num_rows: int, num_waiting: int, num_ready: int) -> int:
        """Tokens of prefill for the next step, which `num_rows` running rows have to wait for.

        num_ready: of the waiting requests, those that would all begin to decode after `max_chunk`
        tokens. 0 where no decode step has been seen yet: one by itself shows what it costs.
        """
        self._paced = self._affordable(num_rows)
        if num_ready >= max(MIN_BURST, MANY * num_rows):
            self._paced = self.max_chunk
        is_burst = num_waiting >= min(MANY * num_rows, max(MIN_BURST, num_rows / 2))
        if is_burst and self._long_steps >= 1:
            return self.max_chunk
        return self._paced

    def observe(self, step_s: float, num_prefilled: int, num_rows: int) -> None:
        """A step took `step_s` seconds, from its scheduling to its last token."""
        is_long = num_rows > 0 and num_prefilled > max(self._paced, MIN_CHUNK)
        refilled = min(self._long_steps + 1 / LONG_STEP_EVERY, MAX_LONG_STEPS)
        # Not below none: a picture that is kept whole makes a step long that was not granted.
        self._long_steps = max(self._long_steps - 1, 0.0) if is_long else refilled
        if not num_prefilled:
            before = self._decode_s.get(num_rows, step_s)
            self._decode_s[num_rows] = before + _WEIGHT * (step_s - before)
            return
        decode_s = self._decode_step_s(num_rows) or 0.0
        token_s = max(step_s - decode_s, 0.1 * step_s) / num_prefilled
        before = token_s if self._token_s is None else self._token_s
        self._token_s = before + _WEIGHT * (token_s - before)

    def _affordable(self, num_rows: int) -> int:
        if num_rows == 0:
            return self.max_chunk
        decode_s = self._decode_step_s(num_rows)
        if decode_s is None:
            return 0
        if self._token_s is None:
            return min(self.max_chunk, 4 * MIN_CHUNK)
        affordable = int((MAX_STRETCH - 1) * decode_s / self._token_s)
        return min(self.max_chunk, max(MIN_CHUNK, affordable))

    def _decode_step_s(self, num_rows: int) -> float | None:
        """What a step of so many rows takes, or of the nearest number that was seen."""
        if num_rows == 0 or not self._decode_s:
            return None
        return self._decode_s[min(self._decode_s, key=lambda seen: abs(seen - num_rows))]
