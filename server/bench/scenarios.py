"""The kinds of measurement by name: each runs on columns and gives tables and figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from rich.table import Table

from server.bench import load, metrics, report, scrapes, second_turn, soak, stalls, toggle
from server.bench.fleet import Fleet
from server.bench.footprint import Budget
from server.bench.load import Column, Served
from server.bench.prompts import Prompts
from server.bench.target import BenchError

Scenario = Literal["throughput", "stalls", "second-turn", "memory", "toggle", "metrics", "scrapes"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
# Of replicas with tenants, started for it: how many of each (tenants: beside the load's own).
FLEETS: Mapping[Scenario, tuple[int, int]] = {"toggle": (2, 0), "scrapes": (1, scrapes.NUM_TENANTS)}
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How much is measured. arrivals: long prompts at once in `stalls`; pause_s: before each burst
    of another process; budgets: what the process of that id may fill with its memory. fleet: what
    the columns are replicas of in scenarios of FLEETS; num_changes: of its tenant's alpha.
    """

    streams: Sequence[int]
    rounds: int
    warmup: int
    max_tokens: int
    num_requests: int
    baseline: str
    arrivals: int
    pause_s: float
    budgets: Mapping[int, Budget] = field(default_factory=dict)
    fleet: Fleet | None = None
    num_changes: int = 0


@dataclass(frozen=True)
class Outcome:
    tables: list[Table]
    figures: dict[str, Any]
    num_failed: int


def num_steps(scenario: Scenario, columns: Sequence[Column], effort: Effort) -> int:
    """How often `run` will report progress."""
    if scenario == "memory":
        processes = {column.target.pid for column in served(scenario, columns)}
        return effort.num_requests * len(processes)
    if scenario == "toggle":
        return toggle.num_steps(effort.num_changes)
    if scenario == "scrapes":
        return scrapes.num_steps(effort.rounds, effort.warmup)
    if scenario == "second-turn":
        return (effort.rounds + effort.warmup) * len(columns)
    bursts = (effort.rounds + effort.warmup) * len(effort.streams) * len(columns)
    return 2 * bursts if scenario == "stalls" else bursts


async def run(
    scenario: Scenario,
    columns: Sequence[Column],
    prompts: Prompts,
    effort: Effort,
    progress: Progress,
) -> Outcome:
    """Raises BenchError where a column cannot be measured so."""
    if scenario == "throughput":
        return await _throughput(columns, prompts, effort, progress)
    servers = served(scenario, columns)
    if scenario == "stalls":
        gaps = await stalls.run(
            servers,
            prompts,
            streams=effort.streams,
            rounds=effort.rounds,
            max_tokens=effort.max_tokens,
            arrivals_at_once=effort.arrivals,
            warmup=effort.warmup,
            pause_s=effort.pause_s,
            progress=progress,
        )
        failed = sum(row.num_failed for row in gaps)
        figures = [asdict(row) for row in gaps]
        return Outcome([report.stalls_table(gaps)], {"stalls": figures}, failed)
    if scenario == "second-turn":
        turns = await second_turn.run(
            servers,
            prompts,
            rounds=effort.rounds,
            max_tokens=effort.max_tokens,
            warmup=effort.warmup,
            pause_s=effort.pause_s,
            progress=progress,
        )
        failed = sum(row.num_failed for row in turns)
        figures = [asdict(row) for row in turns]
        return Outcome([report.second_turn_table(turns)], {"second_turn": figures}, failed)
    if scenario == "metrics":
        return await _metrics(servers, prompts, effort, progress)
    if scenario == "toggle":
        return await _toggle(servers, prompts, effort, progress)
    if scenario == "scrapes":
        return await _scrapes(servers, prompts, effort, progress)
    soaks = await soak.run(
        servers,
        prompts,
        num_requests=effort.num_requests,
        num_streams=max(effort.streams),
        budgets=effort.budgets,
        pause_s=effort.pause_s,
        progress=progress,
    )
    failed = sum(row.num_failed for row in soaks)
    figures = [
        asdict(row)
        | {"ratio": row.ratio, "serving_ratio": row.serving_ratio and asdict(row.serving_ratio)}
        for row in soaks
    ]
    return Outcome([report.soak_table(soaks)], {"memory": figures}, failed)


def served(scenario: Scenario, columns: Sequence[Column]) -> list[Served]:
    """The columns, if all are servers (for `memory`: started here). Raises BenchError."""
    result = []
    for column in columns:
        if not isinstance(column, Served):
            raise BenchError(f"--scenario {scenario} measures servers, not {column.name}")
        if scenario == "memory" and not column.target.pid:
            raise BenchError(
                f"--scenario memory reads the memory of servers that it starts itself, and "
                f"{column.name} is a URL: use --serve, --demo or --shape"
            )
        result.append(column)
    return result


async def _toggle(
    replicas: Sequence[Served], prompts: Prompts, effort: Effort, progress: Progress
) -> Outcome:
    if effort.fleet is None:
        raise BenchError("--scenario toggle measures replicas that it starts itself")
    result = await toggle.run(
        effort.fleet,
        replicas,
        prompts,
        num_changes=effort.num_changes,
        num_streams=max(effort.streams),
        max_tokens=effort.max_tokens,
        progress=progress,
    )
    failed = result.num_failed + result.num_mixed + result.num_behind
    return Outcome(report.toggle_tables(result), report.toggle_json(result), failed)


async def _scrapes(
    replicas: Sequence[Served], prompts: Prompts, effort: Effort, progress: Progress
) -> Outcome:
    if effort.fleet is None:
        raise BenchError("--scenario scrapes measures a replica that it starts itself")
    result = await scrapes.run(
        effort.fleet,
        replicas[0],
        prompts,
        num_streams=max(effort.streams),
        rounds=effort.rounds,
        max_tokens=effort.max_tokens,
        warmup=effort.warmup,
        progress=progress,
    )
    return Outcome(report.scrapes_tables(result), {"scrapes": asdict(result)}, result.num_failed)


async def _metrics(
    servers: Sequence[Served], prompts: Prompts, effort: Effort, progress: Progress
) -> Outcome:
    columns = [metrics.Scraped(each) for each in servers]
    bursts = await load.measure(
        columns,
        prompts,
        streams=effort.streams,
        rounds=effort.rounds,
        max_tokens=effort.max_tokens,
        warmup=effort.warmup,
        pause_s=effort.pause_s,
        progress=progress,
    )
    num_warmups = effort.warmup * len(effort.streams)
    found = metrics.accounts(columns, bursts, effort.baseline, num_warmups)
    figures = [asdict(each) | {"agrees": each.agrees} for each in found]
    return Outcome(
        [report.accounts_table(found, effort.baseline)],
        {"metrics": figures},
        sum(bool(record.error) for burst in bursts for record in burst.records),
    )


async def _throughput(
    columns: Sequence[Column], prompts: Prompts, effort: Effort, progress: Progress
) -> Outcome:
    bursts = await load.measure(
        columns,
        prompts,
        streams=effort.streams,
        rounds=effort.rounds,
        max_tokens=effort.max_tokens,
        warmup=effort.warmup,
        pause_s=effort.pause_s,
        progress=progress,
    )
    return Outcome(
        report.throughput_tables(bursts, effort.baseline, effort.max_tokens),
        report.throughput_json(bursts, effort.baseline),
        sum(bool(record.error) for burst in bursts for record in burst.records),
    )
