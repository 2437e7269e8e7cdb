"""Bursts -> figures: medians with their interquartile range, and ratios of paired rounds. Pure."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from server.bench.load import Burst

LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and 99th percentile of `n` values."""

    median: float
    low: float
    high: float
    p99: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """None of no values; the quartiles of few values are the smallest and largest."""
        ordered = sorted(values)
        if not ordered:
            return None
        low, high = ordered[0], ordered[-1]
        if len(ordered) >= 4:
            low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
        p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
        return cls(statistics.median(ordered), low, high, p99, len(ordered))


@dataclass(frozen=True)
class Interval:
    """A median and the interval that holds the true one with probability `level`.

    Between two of the ordered values, so nothing is assumed about their distribution. Under six
    values none reaches 95 %: then it is the smallest and the largest, and `level` says so.
    """

    median: float
    low: float
    high: float
    level: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Interval | None":
        """The narrowest symmetric one of at least 95 %; None of no values."""
        ordered = sorted(values)
        n = len(ordered)
        if not n:
            return None
        cut, level = 0, 1 - 2 * 0.5**n
        outside = 2 * 0.5**n
        while 2 * (cut + 1) < n:
            outside += 2 * math.comb(n, cut + 1) * 0.5**n
            if 1 - outside < LEVEL:
                break
            cut, level = cut + 1, 1 - outside
        return cls(statistics.median(ordered), ordered[cut], ordered[-1 - cut], level, n)


@dataclass(frozen=True)
class Cell:
    """One column at one number of streams. Throughput is per round, gaps each token's, the rest
    per chat.

    `inter_token_latency_s`: a chat's mean gap, prefills of its neighbours included. `step_s`: a
    decode step while all chats were decoding, per round. `steering`: what the server says it did,
    each distinct header once. `overhead_ms`, `shift_ms`: what it says that cost.
    """

    target: str
    num_streams: int
    tokens_per_s: Spread | None
    time_to_first_token_s: Spread | None
    inter_token_latency_s: Spread | None
    gap_s: Spread | None
    step_s: Spread | None
    tokens_per_chat: Spread | None
    prompt_tokens: Spread | None
    cached_tokens: Spread | None
    overhead_ms: Spread | None
    shift_ms: Spread | None
    counted_by: tuple[str, ...]
    steering: tuple[str, ...]
    num_failed: int
    first_error: str


@dataclass(frozen=True)
class Comparison:
    """A column against the baseline: ratios and differences within each round, so that drift
    cancels out. Differences are this column minus the baseline, in seconds.
    """

    target: str
    baseline: str
    num_streams: int
    tokens_per_s: Interval | None
    time_to_first_token: Interval | None
    inter_token_latency: Interval | None
    step: Interval | None
    time_to_first_token_more_s: Interval | None
    e2e_more_s: Interval | None


def cells(bursts: Sequence[Burst]) -> list[Cell]:
    """One cell for each column and number of streams, columns in order of appearance."""
    names = list(dict.fromkeys(b.target for b in bursts))
    keys = sorted(
        {(b.num_streams, b.target) for b in bursts}, key=lambda key: (key[0], names.index(key[1]))
    )
    return [_cell([b for b in bursts if (b.num_streams, b.target) == key]) for key in keys]


def comparisons(bursts: Sequence[Burst], baseline: str) -> list[Comparison]:
    """Every other column over `baseline`; rounds in which either has a failure are left out."""
    by_key = {(b.target, b.num_streams, b.round): b for b in bursts if not b.is_failed}
    others = [name for name in dict.fromkeys(b.target for b in bursts) if name != baseline]
    rounds = sorted({b.round for b in bursts})
    result = []
    for num_streams in sorted({b.num_streams for b in bursts}):
        for other in others:
            pairs = [
                (by_key[other, num_streams, r], by_key[baseline, num_streams, r])
                for r in rounds
                if (other, num_streams, r) in by_key and (baseline, num_streams, r) in by_key
            ]
            result.append(_comparison(other, baseline, num_streams, pairs))
    return result


def _cell(bursts: Sequence[Burst]) -> Cell:
    records = [record for burst in bursts for record in burst.records]
    whole = [burst for burst in bursts if not burst.is_failed]
    good = [record for record in records if not record.error]
    return Cell(
        target=bursts[0].target,
        num_streams=bursts[0].num_streams,
        tokens_per_s=Spread.of(burst.tokens_per_s for burst in whole),
        time_to_first_token_s=Spread.of(record.time_to_first_token_s for record in good),
        inter_token_latency_s=Spread.of(r.inter_token_latency_s for r in good if r.tokens > 1),
        gap_s=Spread.of(gap for record in good for gap in record.gaps_s),
        step_s=Spread.of(burst.step_s for burst in whole if burst.step_s > 0),
        tokens_per_chat=Spread.of(record.tokens for record in good),
        prompt_tokens=Spread.of(record.prompt_tokens for record in good),
        cached_tokens=Spread.of(record.cached_tokens for record in good),
        overhead_ms=Spread.of(r.overhead_ms for r in good if r.overhead_ms is not None),
        shift_ms=Spread.of(r.shift_ms for r in good if r.shift_ms is not None),
        counted_by=tuple(sorted({record.counted_by for record in good})),
        steering=tuple(sorted({record.steering for record in good if record.steering})),
        num_failed=len(records) - len(good),
        first_error=next((record.error for record in records if record.error), ""),
    )


def _comparison(
    target: str, baseline: str, num_streams: int, pairs: Sequence[tuple[Burst, Burst]]
) -> Comparison:
    def ratio(figure: Callable[[Burst], float]) -> Interval | None:
        both = [(figure(ours), figure(base)) for ours, base in pairs]
        return Interval.of(ours / base for ours, base in both if ours > 0 and base > 0)

    def more(figure: Callable[[Burst], float]) -> Interval | None:
        return Interval.of(figure(ours) - figure(base) for ours, base in pairs)

    return Comparison(
        target=target,
        baseline=baseline,
        num_streams=num_streams,
        tokens_per_s=ratio(lambda burst: burst.tokens_per_s),
        time_to_first_token=ratio(lambda burst: burst.time_to_first_token_s),
        inter_token_latency=ratio(lambda burst: burst.inter_token_latency_s),
        step=ratio(lambda burst: burst.step_s),
        time_to_first_token_more_s=more(lambda burst: burst.time_to_first_token_s),
        e2e_more_s=more(lambda burst: burst.e2e_s),
    )
