"""What the engine counts about itself while it works: plain numbers, read by whoever asks.

The engine thread writes, without locks; other threads read snapshots (`Engine.stats`). Does not
know where the numbers go (server/metrics).
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Asker = Literal[
    "own", "shift"
]  # whose prompt: the request's own, or one of the sample level's pair
PromptKind = Literal["own", "shift", "probe"]
StepKind = Literal["decode", "prefill", "mixed"]
FailureCount = Literal["steps", "hooks"]

GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
VISION_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


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
    (rows only), `prefill` (prompts only) or `mixed`; on a GPU a step in which no prompt ends waits
    for nothing, and the next one shows its time. vision_encode_s: of pictures that no cache had.
    prefill_tokens: computed, by whose they were, `own` (requests' own prompts), `shift`
    (the sample level's pairs) or `probe` (last tokens run again to see how shifted they are).
    prefix: by whose prompt it was, `own` or `shift`, bytes only in `own`. failures: passes that
    broke and were run apart, and requests that failed before or after theirs, `steps`; steering
    that did not have its turn, `hooks`.
    is_canary_passed: None before it ran.
    """

    inter_token_s: Distribution
    step_s: Mapping[StepKind, Distribution]
    vision_encode_s: Distribution
    prefill_tokens: Mapping[PromptKind, int] = field(default_factory=dict)
    generated_tokens: int = 0
    prefix: Mapping[Asker, CacheUse] = field(default_factory=dict)
    vision: CacheUse = CacheUse()
    failures: Mapping[FailureCount, int] = field(default_factory=dict)
    is_canary_passed: bool | None = None


class Counters:
    """What the engine thread has counted so far; what the caches count themselves is theirs.

    Nobody else writes. Another thread's snapshot may be of the midst of a step.
    """

    def __init__(self) -> None:
        self.inter_token_s = Histogram(*GAP_S)
        self.step_s: dict[StepKind, Histogram] = {
            "decode": Histogram(*STEP_S),
            "prefill": Histogram(*STEP_S),
            "mixed": Histogram(*STEP_S),
        }
        self.vision_encode_s = Histogram(*VISION_S)
        self.prefill_tokens: dict[PromptKind, int] = {"own": 0, "shift": 0, "probe": 0}
        self.generated_tokens = 0
        self.failures: dict[FailureCount, int] = {"steps": 0, "hooks": 0}
        self.is_canary_passed: bool | None = None

    def token_made(self, since: float | None, now: float) -> None:
        """Of one sequence, whose token before came at `since` (monotonic); None for its first."""
        if since is not None:
            self.inter_token_s.observe(now - since)
        self.generated_tokens += 1

    def snapshot(self, prefix: Mapping[Asker, CacheUse], vision: CacheUse) -> EngineStats:
        return EngineStats(
            inter_token_s=self.inter_token_s.snapshot(),
            step_s={kind: histogram.snapshot() for kind, histogram in self.step_s.items()},
            vision_encode_s=self.vision_encode_s.snapshot(),
            prefill_tokens=dict(self.prefill_tokens),
            generated_tokens=self.generated_tokens,
            prefix=prefix,
            vision=vision,
            failures=dict(self.failures),
            is_canary_passed=self.is_canary_passed,
        )
