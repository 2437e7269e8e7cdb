"""Bursts -> figures: medians with their interquartile range, and ratios of paired rounds. Pure."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.bench.load import Burst


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `n` values."""

    median: float
    low: float
    high: float
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
        return cls(statistics.median(ordered), low, high, len(ordered))


@dataclass(frozen=True)
class Cell:
    """One target at one number of streams. Throughput is per round, latencies per chat.

    `longest_gap_s`: the longest silence within one answer, a stall that the mean gap hides.
    `steering`: what the server says it did, each distinct header once.
    """

    target: str
    num_streams: int
    tokens_per_s: Spread | None
    time_to_first_token_s: Spread | None
    inter_token_latency_s: Spread | None
    longest_gap_s: Spread | None
    tokens_per_chat: Spread | None
    prompt_tokens: Spread | None
    counted_by: tuple[str, ...]
    steering: tuple[str, ...]
    num_failed: int
    first_error: str


@dataclass(frozen=True)
class Comparison:
    """A target against the baseline: ratios within each round, so that drift cancels out."""

    target: str
    baseline: str
    num_streams: int
    tokens_per_s: Spread | None
    time_to_first_token: Spread | None
    inter_token_latency: Spread | None


def cells(bursts: Sequence[Burst]) -> list[Cell]:
    """One cell for each target and number of streams, in order of appearance."""
    keys = sorted({(b.num_streams, b.target) for b in bursts}, key=lambda key: key[0])
    order = list(dict.fromkeys(b.target for b in bursts))
    keys.sort(key=lambda key: (key[0], order.index(key[1])))
    return [_cell([b for b in bursts if (b.num_streams, b.target) == key]) for key in keys]


def comparisons(bursts: Sequence[Burst], baseline: str) -> list[Comparison]:
    """Every other target over `baseline`; rounds in which either has a failure are left out."""
    by_key = {(b.target, b.num_streams, b.round): b for b in bursts if not _failed(b)}
    others = [name for name in dict.fromkeys(b.target for b in bursts) if name != baseline]
    streams = sorted({b.num_streams for b in bursts})
    rounds = sorted({b.round for b in bursts})
    result = []
    for num_streams in streams:
        for other in others:
            pairs = [
                (by_key[other, num_streams, r], by_key[baseline, num_streams, r])
                for r in rounds
                if (other, num_streams, r) in by_key and (baseline, num_streams, r) in by_key
            ]
            result.append(_comparison(other, baseline, num_streams, pairs))
    return result


def _failed(burst: Burst) -> bool:
    return any(record.error for record in burst.records)


def _cell(bursts: Sequence[Burst]) -> Cell:
    records = [record for burst in bursts for record in burst.records]
    good = [record for record in records if not record.error]
    return Cell(
        target=bursts[0].target,
        num_streams=bursts[0].num_streams,
        tokens_per_s=Spread.of(burst.tokens_per_s for burst in bursts if not _failed(burst)),
        time_to_first_token_s=Spread.of(record.time_to_first_token_s for record in good),
        inter_token_latency_s=Spread.of(r.inter_token_latency_s for r in good if r.tokens > 1),
        longest_gap_s=Spread.of(max(record.gaps_s) for record in good if record.gaps_s),
        tokens_per_chat=Spread.of(record.tokens for record in good),
        prompt_tokens=Spread.of(record.prompt_tokens for record in good),
        counted_by=tuple(sorted({record.counted_by for record in good})),
        steering=tuple(sorted({record.steering for record in good if record.steering})),
        num_failed=len(records) - len(good),
        first_error=next((record.error for record in records if record.error), ""),
    )


def _comparison(
    target: str, baseline: str, num_streams: int, pairs: Sequence[tuple[Burst, Burst]]
) -> Comparison:
    return Comparison(
        target=target,
        baseline=baseline,
        num_streams=num_streams,
        tokens_per_s=Spread.of(ours.tokens_per_s / base.tokens_per_s for ours, base in pairs),
        time_to_first_token=Spread.of(
            _median_ttft(ours) / _median_ttft(base) for ours, base in pairs
        ),
        inter_token_latency=Spread.of(
            _median_gap(ours) / _median_gap(base) for ours, base in pairs if _median_gap(base) > 0
        ),
    )


def _median_ttft(burst: Burst) -> float:
    return statistics.median(record.time_to_first_token_s for record in burst.records)


def _median_gap(burst: Burst) -> float:
    return statistics.median(record.inter_token_latency_s for record in burst.records)
