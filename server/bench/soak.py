"""Scenario `memory`: many unlike requests, some abandoned, and what the server's process keeps."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from server.bench import exposition, tables
from server.bench.effort import Effort, Outcome, Progress
from server.bench.footprint import Budget, Footprint
from server.bench.load import Column, Served, Switch, servers_of
from server.bench.prompts import Prompts
from server.bench.stream import chat
from server.bench.summary import Spread
from server.bench.target import BenchError

CACHE_BYTES = "deshift_cache_bytes"
SAMPLES = 200  # readings of the memory over the whole run
_SHARES = {"text": 0.3, "several choices": 0.1, "cancelled": 0.2, "new size": 0.2, "again": 0.2}
_LONGEST_WORDS = 400
_LONGEST_ANSWER = 32
_MOST_CHOICES = 4
_CANCEL_WITHIN_S = 2.0


@dataclass(frozen=True)
class Sample:
    """A reading after so many finished requests. caches_bytes: what the prefix and vision caches
    hold of it, by the server's own metrics; None where these are not known."""

    num_requests: int
    now_bytes: int
    caches_bytes: int | None = None


@dataclass(frozen=True)
class Soak:
    """One server process. ready: before the first request; peak: the most since it started,
    loading included; samples: while it served.

    ratio: peak over the budget (weights, KV cache, caches), None where that is not known;
    serving_ratio: each sample over it. slope: bytes a request over the second half, by least
    squares, slope_beyond: of what the caches do not hold. num_cancelled: sockets that were closed
    before the answer's end; num_failed: answers that were none.
    """

    target: str
    num_requests: int
    num_cancelled: int
    num_failed: int
    first_error: str
    ready_bytes: int
    peak_bytes: int
    budget: Budget | None
    slope_bytes: float
    slope_beyond_bytes: float | None
    samples: tuple[Sample, ...]

    @property
    def ratio(self) -> float | None:
        return self.peak_bytes / self.budget.total_bytes if self.budget else None

    @property
    def serving_ratio(self) -> Spread | None:
        if self.budget is None:
            return None
        return Spread.of(each.now_bytes / self.budget.total_bytes for each in self.samples)


def num_steps(columns: Sequence[Column], effort: Effort) -> int:
    return effort.num_requests * len({column.target.pid for column in started_here(columns)})


async def run(
    columns: Sequence[Column], prompts: Prompts, effort: Effort, progress: Progress
) -> Outcome:
    rows = await measure(started_here(columns), prompts, effort, progress)
    figures = {"memory": [figures_of(row) for row in rows]}
    return Outcome([table_of(rows)], figures, sum(row.num_failed for row in rows))


def started_here(columns: Sequence[Column]) -> list[Served]:
    """The columns, if all are servers whose memory can be read. Raises BenchError."""
    servers = servers_of("memory", columns)
    for column in servers:
        if not column.target.pid:
            raise BenchError(
                f"--scenario memory reads the memory of servers that it starts itself, and "
                f"{column.name} is a URL: use --serve, --demo or --shape"
            )
    return servers


async def measure(
    columns: Sequence[Served], prompts: Prompts, effort: Effort, progress: Progress
) -> list[Soak]:
    """`num_requests` to each server process, as many under way at once as the largest of `streams`;
    a process that has several columns (steering settings) gets requests of all. Raises BenchError.
    """
    switch = Switch(effort.pause_s)
    by_process: dict[int, list[Served]] = {}
    for column in columns:
        by_process.setdefault(column.target.pid, []).append(column)
    soaks = []
    for of_process in by_process.values():
        await switch.to(of_process[0])
        soaks.append(await _soak(of_process, prompts, effort, progress))
    return soaks


async def _soak(
    columns: Sequence[Served], prompts: Prompts, effort: Effort, progress: Progress
) -> Soak:
    pid, num_requests = columns[0].target.pid, effort.num_requests
    numbers = iter(range(num_requests))
    samples: list[Sample] = []
    outcomes: list[str] = []  # of each finished request: "", "cancelled" or the error
    ready = _footprint(pid)

    async def client() -> None:
        for number in numbers:
            outcomes.append(await _one(columns, prompts, number))
            progress(columns[0].target.name)
            if len(outcomes) % max(1, num_requests // SAMPLES) == 0:
                samples.append(await _sample(columns[0], len(outcomes)))

    await asyncio.gather(*(client() for _ in range(max(effort.streams))))
    errors = [each for each in outcomes if each not in ("", "cancelled")]
    half = samples[len(samples) // 2 :]
    return Soak(
        target=", ".join(column.name for column in columns),
        num_requests=num_requests,
        num_cancelled=outcomes.count("cancelled"),
        num_failed=len(errors),
        first_error=errors[0] if errors else "",
        ready_bytes=ready.now_bytes,
        peak_bytes=max(_footprint(pid).peak_bytes, *(sample.now_bytes for sample in samples)),
        budget=effort.budgets.get(pid),
        slope_bytes=slope([s.num_requests for s in half], [s.now_bytes for s in half]),
        slope_beyond_bytes=_slope_beyond(half),
        samples=tuple(samples),
    )


async def _sample(column: Served, num_requests: int) -> Sample:
    caches = None
    if column.target.admin_url:
        caches = exposition.total(await exposition.read(column), CACHE_BYTES)
    now = _footprint(column.target.pid).now_bytes
    return Sample(num_requests, now, None if caches is None else round(caches))


async def _one(columns: Sequence[Served], prompts: Prompts, number: int) -> str:
    """Send request `number`; what becomes of it depends on the number alone."""
    rng = random.Random(f"{prompts.first}/{number}")
    column = rng.choice(columns)
    body = _body(column, prompts, number, rng)
    give_up_s = rng.uniform(0, _CANCEL_WITHIN_S) if _is(rng, "cancelled") else None
    try:
        async with asyncio.timeout(give_up_s):
            return (await chat(column.client, column.target, body)).error
    except TimeoutError:
        return "cancelled"


def _body(column: Served, prompts: Prompts, number: int, rng: random.Random) -> dict[str, Any]:
    if _is(rng, "text"):
        messages = prompts.text(number, rng.randint(1, _LONGEST_WORDS))
    else:
        shown = rng.randint(0, number) if _is(rng, "again") else number
        messages = prompts.about_picture(shown, number, new_size=_is(rng, "new size"))
    body = column.target.body(messages, rng.randint(1, _LONGEST_ANSWER))
    most = min(_MOST_CHOICES, column.target.max_choices)
    if most > 1 and _is(rng, "several choices"):
        body |= {"n": rng.randint(2, most), "temperature": 1.0}
    return body


def _is(rng: random.Random, kind: str) -> bool:
    return rng.random() < _SHARES[kind]


def _footprint(pid: int) -> Footprint:
    found = Footprint.of(pid)
    if found is None:
        raise BenchError(f"the memory of process {pid} cannot be read: it has ended, or no /proc")
    return found


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """dy/dx of the least-squares line; 0.0 of fewer than two different x."""
    if len(set(xs)) < 2:
        return 0.0
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    over = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return over / sum((x - mean_x) ** 2 for x in xs)


def _slope_beyond(samples: Sequence[Sample]) -> float | None:
    beyond = [s.now_bytes - s.caches_bytes for s in samples if s.caches_bytes is not None]
    return slope([s.num_requests for s in samples], beyond) if len(beyond) == len(samples) else None


def figures_of(row: Soak) -> dict[str, Any]:
    serving = row.serving_ratio
    return asdict(row) | {"ratio": row.ratio, "serving_ratio": serving and asdict(serving)}


def table_of(rows: Sequence[Soak]) -> Table:
    table = tables.table(
        "Memory of the server's process over unlike requests, MiB\n"
        "Budget: weights + KV cache + other caches. Serving: median (interquartile range) of "
        "readings between requests. Growth: over the second half; beyond: of what no cache holds",
        ("server", "requests", "cancelled", "ready", "peak", "budget", "peak / budget")
        + ("serving / budget", "readings", "growth per 1000", "beyond caches"),
        num_names=1,
    )
    for row in rows:
        table.add_row(
            tables.name(row.target, row.num_failed, row.first_error),
            str(row.num_requests),
            str(row.num_cancelled),
            tables.mib(row.ready_bytes),
            tables.mib(row.peak_bytes),
            _budget(row.budget) if row.budget else "-",
            f"{row.ratio:.2f}" if row.ratio else "-",
            tables.spread(row.serving_ratio, 1, "{:.2f}"),
            str(len(row.samples)),
            _growth(row.slope_bytes),
            "-" if row.slope_beyond_bytes is None else _growth(row.slope_beyond_bytes),
        )
    return table


def _growth(slope_bytes: float) -> str:
    return f"{1000 * slope_bytes / tables.MIB:+.1f}"


def _budget(budget: Budget) -> str:
    parts = (budget.weights_bytes, budget.kv_bytes, budget.caches_bytes)
    return " + ".join(map(tables.mib, parts))
