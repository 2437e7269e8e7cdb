"""Scenario `scrapes`: what a scrape of a replica with many tenants takes, and what it does to the
answers that are being written. Says nothing of what the figures in it are worth (metrics.py).
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import httpx
from rich.table import Table

from server.bench import tables
from server.bench.effort import Effort, Outcome, Progress
from server.bench.fleet import Fleet
from server.bench.load import Column, Served, servers_of, steady_gaps
from server.bench.prompts import Prompts
from server.bench.stream import StreamRecord, chat
from server.bench.summary import Interval, Spread
from server.bench.target import BenchError

NUM_TENANTS = 200
NUM_IDLE = 40  # scrapes while nothing else is done
EVERY_S = 1.0
_SHORT = 2  # tokens of the answers that give each tenant its series
# Every tenant's policy, and what else its requests can ask for: a mode has series of its own.
_STEERING: tuple[dict[str, Any], ...] = (
    {},
    {"steering": {"mode": "sample"}},
    {"steering": {"mode": "off"}},
)
_OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0"}


@dataclass(frozen=True)
class Scrape:
    seconds: float
    num_bytes: int
    num_lines: int


@dataclass(frozen=True)
class Scrapes:
    """Seconds. first: the first scrape after every tenant's first traffic; idle: the others before
    the load; beside: those during it.

    quiet, scraped: gaps between tokens while all answers were being written, without and with a
    scrape each second. slower, worst: mean and p99 of the gaps with over without, within rounds.
    """

    num_tenants: int
    num_lines: int
    num_bytes: int
    first_s: float
    idle: Spread | None
    beside: Spread | None
    num_streams: int
    quiet: Spread | None
    scraped: Spread | None
    slower: Interval | None
    worst: Interval | None
    num_failed: int
    first_error: str


def num_steps(_columns: Sequence[Column], effort: Effort) -> int:
    return NUM_TENANTS * len(_STEERING) + 2 * effort.num_rounds


async def run(
    columns: Sequence[Column], prompts: Prompts, effort: Effort, progress: Progress
) -> Outcome:
    assert effort.fleet is not None  # it is of this scenario
    [replica] = servers_of("scrapes", columns)
    result = await measure(effort.fleet, replica, prompts, effort, progress)
    return Outcome(tables_of(result), {"scrapes": asdict(result)}, result.num_failed)


async def measure(
    fleet: Fleet, served: Served, prompts: Prompts, effort: Effort, progress: Progress
) -> Scrapes:
    """Gives each tenant of the fleet's first replica traffic, scrapes it idle, and then while
    answers are written, and not, in turn. Raises BenchError where /metrics cannot be read.
    """
    num_streams = max(effort.streams)
    numbers = itertools.count()
    records = await _traffic(fleet, served, prompts, numbers, num_streams, progress)
    url = f"{fleet.admin_urls[0]}/metrics"
    first, *idle = [await _scrape(served.client, url) for _ in range(1 + NUM_IDLE)]
    beside: list[Scrape] = []
    pairs: list[tuple[list[float], list[float]]] = []
    for round_ in range(-effort.warmup, effort.rounds):
        halves: dict[bool, list[float]] = {}
        for is_scraped in (round_ % 2 == 0, round_ % 2 == 1):
            progress("with scrapes" if is_scraped else "without")
            chats = [prompts.about_picture(next(numbers), n) for n in range(num_streams)]
            async with _scraping(served.client, url, beside if is_scraped else None):
                answers = await served.answer(chats, effort.max_tokens, every_token=True)
            records += answers
            halves[is_scraped] = steady_gaps(answers)
        if round_ >= 0:
            pairs.append((halves[False], halves[True]))
    return _result(fleet, num_streams, first, idle, beside, pairs, records)


async def _traffic(
    fleet: Fleet,
    served: Served,
    prompts: Prompts,
    numbers: Iterator[int],
    at_once: int,
    progress: Progress,
) -> list[StreamRecord]:
    waiting = iter(list(itertools.product(fleet.tenant_keys, _STEERING)))
    records: list[StreamRecord] = []

    async def client() -> None:
        for key, steering in waiting:
            target = replace(served.target, api_key=key, extra=steering)
            body = target.body(prompts.about_picture(next(numbers)), _SHORT)
            records.append(await chat(served.client, target, body))
            progress("traffic of every tenant")

    await asyncio.gather(*(client() for _ in range(at_once)))
    return records


@asynccontextmanager
async def _scraping(
    client: httpx.AsyncClient, url: str, scrapes: list[Scrape] | None
) -> AsyncIterator[None]:
    """A scrape each second meanwhile, appended to `scrapes`; none where that is None."""
    if scrapes is None:
        yield
        return

    is_over = asyncio.Event()

    async def go_on() -> None:
        while not is_over.is_set():
            scrapes.append(await _scrape(client, url))
            with suppress(TimeoutError):
                await asyncio.wait_for(is_over.wait(), EVERY_S)

    task = asyncio.create_task(go_on())
    try:
        yield
    finally:
        is_over.set()
        await task  # one that is under way counts, too


async def _scrape(client: httpx.AsyncClient, url: str) -> Scrape:
    start = time.perf_counter()
    try:
        response = await client.get(url, headers=_OPENMETRICS)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise BenchError(f"{url}: {error!r}") from error
    seconds = time.perf_counter() - start
    return Scrape(seconds, len(response.content), response.content.count(b"\n"))


def _result(
    fleet: Fleet,
    num_streams: int,
    first: Scrape,
    idle: Sequence[Scrape],
    beside: Sequence[Scrape],
    pairs: Sequence[tuple[list[float], list[float]]],
    records: Sequence[StreamRecord],
) -> Scrapes:
    both = [(quiet, scraped) for quiet, scraped in pairs if quiet and scraped]
    spreads = [(Spread.of(quiet), Spread.of(scraped)) for quiet, scraped in both]
    return Scrapes(
        num_tenants=len(fleet.tenant_keys),
        num_lines=first.num_lines,
        num_bytes=first.num_bytes,
        first_s=first.seconds,
        idle=Spread.of(each.seconds for each in idle),
        beside=Spread.of(each.seconds for each in beside),
        num_streams=num_streams,
        quiet=Spread.of(gap for quiet, _ in pairs for gap in quiet),
        scraped=Spread.of(gap for _, scraped in pairs for gap in scraped),
        slower=Interval.of(_mean(scraped) / _mean(quiet) for quiet, scraped in both),
        worst=Interval.of(
            scraped.p99 / quiet.p99 for quiet, scraped in spreads if quiet and scraped
        ),
        num_failed=sum(bool(record.error) for record in records),
        first_error=next((record.error for record in records if record.error), ""),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def tables_of(result: Scrapes) -> list[Table]:
    """What a scrape takes, and what it does to the answers beside it."""
    scrape = tables.table(
        "A scrape of /metrics in OpenMetrics, ms: the first after every tenant's first traffic, "
        "the others;\nmedian (interquartile range) / p99",
        ("tenants", "lines", "KiB", "first", "idle", "beside answers"),
        num_names=0,
    )
    scrape.add_row(
        str(result.num_tenants),
        str(result.num_lines),
        f"{result.num_bytes / 1024:.0f}",
        f"{1000 * result.first_s:.1f}",
        *(
            f"{tables.spread(each, 1000, '{:.1f}')} / {1000 * each.p99:.1f}" if each else "-"
            for each in (result.idle, result.beside)
        ),
    )
    answers = tables.table(
        "Gaps between tokens of running answers, without and with a scrape each second: "
        "median / p99, ms\nRatios within rounds: median (95 % interval of the median)",
        ("streams", "server", "without", "with", "mean with / without", "p99 with / without")
        + ("rounds",),
    )
    answers.add_row(
        str(result.num_streams),
        tables.name("deshift", result.num_failed, result.first_error),
        tables.median_and_p99(result.quiet),
        tables.median_and_p99(result.scraped),
        tables.interval(result.slower, 1, "{:.3f}"),
        tables.interval(result.worst, 1, "{:.3f}"),
        str(result.slower.n if result.slower else 0),
    )
    return [scrape, answers]
