"""Medians, quartiles and paired ratios against values worked out by hand."""

from server.bench.load import Burst
from server.bench.stream import StreamRecord
from server.bench.summary import Spread, cells, comparisons


def burst(target: str, round_: int, wall_s: float, *records: StreamRecord) -> Burst:
    return Burst(target, len(records), round_, wall_s, records)


def chat(ttft: float, gap: float, tokens: int = 5) -> StreamRecord:
    return StreamRecord(
        time_to_first_token_s=ttft, tokens=tokens, gaps_s=(gap,) * (tokens - 1), counted_by="usage"
    )


def test_quartiles_of_few_values_are_the_extremes() -> None:
    assert Spread.of([]) is None
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 1)
    assert Spread.of([1.0, 9.0, 2.0]) == Spread(2.0, 1.0, 9.0, 3)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 2.0, 4.0, 5)


def test_a_cell_counts_tokens_of_a_round_over_its_wall_time() -> None:
    [cell] = cells(
        [
            burst("a", 0, 2.0, chat(0.1, 0.01), chat(0.3, 0.03)),
            burst("a", 1, 4.0, chat(0.2, 0.02), chat(0.4, 0.04)),
        ]
    )
    assert cell.tokens_per_s == Spread(3.75, 2.5, 5.0, 2)
    assert cell.time_to_first_token_s is not None
    assert round(cell.time_to_first_token_s.median, 9) == 0.25
    assert cell.num_failed == 0


def test_a_round_with_a_failure_gives_no_throughput_and_is_counted() -> None:
    failed = StreamRecord(error="503: no room")
    [cell] = cells([burst("a", 0, 1.0, chat(0.1, 0.1), failed), burst("a", 1, 1.0, failed, failed)])
    assert cell.tokens_per_s is None
    assert (cell.num_failed, cell.first_error) == (3, "503: no room")


def test_ratios_are_taken_within_rounds_so_that_drift_cancels() -> None:
    """The machine is twice as slow in the second round; b is always half as fast as a."""
    bursts = [
        burst("a", 0, 1.0, chat(0.1, 0.1)),
        burst("b", 0, 2.0, chat(0.3, 0.2)),
        burst("a", 1, 2.0, chat(0.2, 0.2)),
        burst("b", 1, 4.0, chat(0.6, 0.4)),
    ]
    [result] = comparisons(bursts, "a")
    assert (result.target, result.baseline) == ("b", "a")
    assert result.tokens_per_s == Spread(0.5, 0.5, 0.5, 2)
    assert result.time_to_first_token is not None
    assert round(result.time_to_first_token.median, 9) == 3.0
    assert comparisons(bursts[:2], "b")[0].tokens_per_s == Spread(2.0, 2.0, 2.0, 1)
