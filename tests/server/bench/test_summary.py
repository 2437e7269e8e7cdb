"""Medians, quartiles, intervals and paired ratios against values worked out by hand."""

import random
import statistics

import pytest

from server.bench.load import Burst
from server.bench.stream import StreamRecord
from server.bench.summary import Interval, Spread, cells, comparisons


def burst(target: str, round_: int, wall_s: float, *records: StreamRecord) -> Burst:
    return Burst(target, len(records), round_, wall_s, records)


def chat(ttft: float, gap: float, tokens: int = 5) -> StreamRecord:
    return StreamRecord(
        time_to_first_token_s=ttft,
        e2e_s=ttft + gap * (tokens - 1),
        tokens=tokens,
        gaps_s=(gap,) * (tokens - 1),
        counted_by="usage",
    )


def test_quartiles_of_few_values_are_the_extremes() -> None:
    assert Spread.of([]) is None
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 3.0, 1)
    assert Spread.of([1.0, 9.0, 2.0]) == Spread(2.0, 1.0, 9.0, 9.0, 3)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 2.0, 4.0, 100.0, 5)


def test_the_99th_percentile_is_reached_by_99_of_100_values() -> None:
    spread = Spread.of(float(value) for value in range(1, 101))
    assert spread is not None and spread.p99 == 99.0


@pytest.mark.parametrize(
    ("n", "cut", "level"),
    # Chances that a fair coin falls on one side at most `cut` times of n, either way.
    [(1, 0, 0.0), (5, 0, 1 - 2 / 32), (6, 0, 1 - 2 / 64), (9, 1, 1 - 20 / 512)],
)
def test_the_interval_of_the_median_lies_between_ordered_values(
    n: int, cut: int, level: float
) -> None:
    values = [float(value) for value in range(n)]
    found = Interval.of(reversed(values))
    assert found == Interval(statistics.median(values), values[cut], values[-1 - cut], level, n)
    assert Interval.of([]) is None


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    rng = random.Random(0)
    held = 0
    for _ in range(1000):
        found = Interval.of(rng.expovariate(1.0) for _ in range(25))
        assert found is not None and found.level >= 0.95
        held += found.low <= 0.693147 <= found.high  # ln 2
    assert held / 1000 == pytest.approx(found.level, abs=0.02)


def test_a_cell_counts_tokens_of_a_round_over_its_wall_time() -> None:
    [cell] = cells(
        [
            burst("a", 0, 2.0, chat(0.1, 0.01), chat(0.3, 0.03)),
            burst("a", 1, 4.0, chat(0.2, 0.02), chat(0.4, 0.04)),
        ]
    )
    assert cell.tokens_per_s == Spread(3.75, 2.5, 5.0, 5.0, 2)
    assert cell.time_to_first_token_s is not None
    assert cell.time_to_first_token_s.median == pytest.approx(0.25)
    assert cell.gap_s is not None
    assert (cell.gap_s.n, cell.gap_s.p99) == (16, 0.04)
    assert cell.num_failed == 0
    assert cell.overhead_ms is None


def test_a_round_with_a_failure_gives_no_throughput_and_is_counted() -> None:
    failed = StreamRecord(error="503: no room")
    [cell] = cells([burst("a", 0, 1.0, chat(0.1, 0.1), failed), burst("a", 1, 1.0, failed, failed)])
    assert cell.tokens_per_s is None
    assert (cell.num_failed, cell.first_error) == (3, "503: no room")


def test_ratios_are_taken_within_rounds_so_that_drift_cancels() -> None:
    """The machine is twice as slow in the second round; b is always half as fast as a."""
    bursts = [
        burst("a", 0, 1.0, chat(0.125, 0.125)),
        burst("b", 0, 2.0, chat(0.375, 0.25)),
        burst("a", 1, 2.0, chat(0.25, 0.25)),
        burst("b", 1, 4.0, chat(0.75, 0.5)),
    ]
    [result] = comparisons(bursts, "a")
    assert (result.target, result.baseline) == ("b", "a")
    assert result.tokens_per_s == Interval(0.5, 0.5, 0.5, 0.5, 2)
    assert result.time_to_first_token == Interval(3.0, 3.0, 3.0, 0.5, 2)
    assert result.step == result.inter_token_latency == Interval(2.0, 2.0, 2.0, 0.5, 2)
    assert result.time_to_first_token_more_s == Interval(0.375, 0.25, 0.5, 0.5, 2)
    assert result.e2e_more_s == Interval(1.125, 0.75, 1.5, 0.5, 2)
    assert comparisons(bursts[:2], "b")[0].tokens_per_s == Interval(2.0, 2.0, 2.0, 0.0, 1)


def test_a_round_with_a_failure_is_in_no_ratio() -> None:
    failed = burst("b", 0, 1.0, StreamRecord(error="503"))
    [result] = comparisons([burst("a", 0, 1.0, chat(0.1, 0.1)), failed], "a")
    assert result.tokens_per_s is None and result.time_to_first_token_more_s is None
