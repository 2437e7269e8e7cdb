"""What the engine counts about itself while it works: plain numbers, read by whoever asks.

The engine thread writes, without locks; other threads read snapshots (`Engine.stats`). Does not
know where the numbers go (server/metrics).
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Distribution:
    """A histogram at one moment: counts[i] values were at most bounds[i] and above the bound
    before it, counts[-1] above all; `total` is the sum of all values."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def num(self) -> int:
        return sum(self.counts)


class Histogram:
    """Counts values by fixed bounds; cheap enough for the step loop."""

    def __init__(self, *bounds: float) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def snapshot(self) -> Distribution:
        return Distribution(self._bounds, tuple(self._counts), self._total)


@dataclass(frozen=True)
class CacheUse:
    """A cache under a byte budget; hits and misses in tokens (of pictures: in features)."""

    hit_tokens: int = 0
    missed_tokens: int = 0
    num_bytes: int = 0
    budget_bytes: int = 0


@dataclass(frozen=True)
class EngineStats:
    """Since the start of the engine, but for what a cache holds now. Times in seconds.

    inter_token_s: gaps between the tokens of one sequence. step_s: by what a step ran, `decode`
    (rows only), `prefill` (prompts only) or `mixed`. vision_encode_s: of pictures that no cache
    had. prefill_tokens: computed, by whose they were, `own` (requests' own prompts), `shift`
    (the sample level's pairs) or `probe` (last tokens run again to see how shifted they are).
    prefix: by whose prompt it was, `own` or `shift`, bytes only in `own`. failures: passes that
    broke and were run apart, `steps`; steering that did not have its turn, `hooks`.
    is_canary_passed: None before it ran.
    """

    inter_token_s: Distribution
    step_s: Mapping[str, Distribution]
    vision_encode_s: Distribution
    prefill_tokens: Mapping[str, int] = field(default_factory=dict)
    generated_tokens: int = 0
    prefix: Mapping[str, CacheUse] = field(default_factory=dict)
    vision: CacheUse = CacheUse()
    failures: Mapping[str, int] = field(default_factory=dict)
    is_canary_passed: bool | None = None
