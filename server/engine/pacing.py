"""How much prefill a step may do while streams wait for it. Plain arithmetic on measured times."""

from dataclasses import dataclass, field

# A step with prefill may take this many times as long as one without. Below 3, since step times
# scatter, and prefill of a long prompt gets dearer towards its end.
MAX_STRETCH = 2.25
MIN_CHUNK = 16
LONG_STEP_EVERY = 128  # steps, so that the 99th percentile of the gaps does not see the long ones
_WEIGHT = 0.2  # of the newest measurement in the running means


@dataclass
class Pacer:
    """Learns what a decode step and a prefilled token cost, and allots prefill accordingly.

    max_chunk: tokens of prefill in one step when nobody waits for it; also the upper bound.
    """

    max_chunk: int
    _decode_s: dict[int, float] = field(default_factory=dict)  # by number of rows
    _token_s: float | None = None
    _num_since_long: int = LONG_STEP_EVERY

    def budget(self, num_rows: int, num_waiting: int) -> int:
        """Tokens of prefill for the next step, which `num_rows` running rows have to wait for.

        When a burst of requests meets a few early streams, one long step in LONG_STEP_EVERY serves
        the many at the price of one gap of the few.
        """
        self._num_since_long += 1
        if num_rows == 0:
            return self.max_chunk
        if num_waiting >= 2 * num_rows and self._num_since_long > LONG_STEP_EVERY:
            self._num_since_long = 0
            return self.max_chunk
        decode_s = self._decode_s.get(num_rows)
        if decode_s is None or self._token_s is None:
            return min(self.max_chunk, 4 * MIN_CHUNK)
        affordable = int((MAX_STRETCH - 1) * decode_s / self._token_s)
        return min(self.max_chunk, max(MIN_CHUNK, affordable))

    def observe(self, step_s: float, num_prefilled: int, num_rows: int) -> None:
        """A step took `step_s` seconds."""
        if not num_prefilled:
            before = self._decode_s.get(num_rows, step_s)
            self._decode_s[num_rows] = before + _WEIGHT * (step_s - before)
            return
        decode_s = self._decode_s.get(num_rows, 0.0) if num_rows else 0.0
        token_s = max(step_s - decode_s, 0.1 * step_s) / num_prefilled
        before = token_s if self._token_s is None else self._token_s
        self._token_s = before + _WEIGHT * (token_s - before)
