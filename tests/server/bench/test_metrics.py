"""Exported overhead beside the clients' own difference, on scripted columns."""

import asyncio

import httpx
import pytest

from server.bench.load import Burst, Served
from server.bench.metrics import Exported, Scraped, accounts, exported
from server.bench.stream import StreamRecord
from server.bench.target import BenchError, Target

TEXT = """# HELP deshift_steering_overhead_seconds Cost.
# TYPE deshift_steering_overhead_seconds histogram
deshift_steering_overhead_seconds_bucket{model_name="m",tenant="a",mode="sample",le="+Inf"} 9.0
deshift_steering_overhead_seconds_count{model_name="m",tenant="a",mode="sample"} 3
deshift_steering_overhead_seconds_sum{model_name="m",tenant="a",mode="sample"} 0.25
deshift_steering_overhead_seconds_count{model_name="m",tenant="b",mode="dataset"} 1
deshift_steering_overhead_seconds_sum{model_name="m",tenant="b",mode="dataset"} 0.5
"""


def record(e2e_s: float) -> StreamRecord:
    return StreamRecord(
        e2e_s=e2e_s,
        time_to_first_token_s=e2e_s / 2,
        gaps_s=(e2e_s / 2,),
        tokens=2,
        overhead_ms=20.0,
    )


def test_all_tenants_and_modes_are_added_up_and_nothing_else() -> None:
    assert exported(TEXT) == Exported(0.75, 4)
    assert exported("") == Exported(0, 0)


def test_a_burst_counts_what_the_sum_rose_by_for_each_request() -> None:
    assert Exported(0.75, 4).per_request_since(Exported(0.25, 2)) == 0.25
    assert Exported(0.75, 4).per_request_since(Exported(0.75, 4)) == 0, "nothing was steered"


def columns_of(exported_s: float) -> list[Scraped]:
    """Two conditions, one burst of warm-up and six that count."""
    target = Target("off", "http://x", admin_url="http://y")
    client = httpx.AsyncClient()
    off = Scraped(Served(client, target))
    on = Scraped(Served(client, Target("on", "http://x", admin_url="http://y")))
    off.exported = [(2, 0.0)] * 7
    on.exported = [(2, 99.0), *[(2, exported_s)] * 6]
    return [off, on]


@pytest.mark.parametrize(("exported_s", "agrees"), [(0.02, True), (0.002, False), (0.2, False)])
def test_it_agrees_where_the_exported_median_lies_in_the_clients_interval(
    exported_s: float, agrees: bool
) -> None:
    bursts = [
        Burst(name, 2, round_, 1.0, (record(e2e_s), record(e2e_s)))
        for round_ in range(6)
        for name, e2e_s in (("off", 0.5), ("on", 0.515 + 0.002 * round_))
    ]
    (row,) = accounts(columns_of(exported_s), bursts, "off", num_warmups=1)
    assert (row.target, row.exported_s.median, row.exported_s.n) == ("on", exported_s, 6)
    assert row.told_ms is not None and row.told_ms.median == 20
    assert row.more.e2e_more_s is not None
    assert row.more.e2e_more_s.low == pytest.approx(0.015)
    assert row.more.e2e_more_s.high == pytest.approx(0.025)
    assert row.agrees is agrees


def test_a_server_that_was_not_started_here_is_refused() -> None:
    with pytest.raises(BenchError, match="--serve"):
        Scraped(Served(httpx.AsyncClient(), Target("a", "http://x")))


def test_a_burst_is_scraped_before_and_after() -> None:
    sums = iter((1.0, 1.5))

    def answer(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://admin/metrics"
        value = next(sums)
        lines = (f"{name}{{}} {number}" for name, number in
                 (("deshift_steering_overhead_seconds_sum", value),
                  ("deshift_steering_overhead_seconds_count", 10 * value)))  # fmt: skip
        return httpx.Response(200, text="\n".join(lines))

    async def go() -> Scraped:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            column = Scraped(Served(client, Target("a", "http://x", admin_url="http://admin")))
            assert await column.answer([], 4) == []
            return column

    assert asyncio.run(go()).exported == [(0, 0.1)]
