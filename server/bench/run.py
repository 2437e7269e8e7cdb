"""One run from its first server to its last figure. Does not cover how it is shown (report.py)."""

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from server.bench import machine
from server.bench.columns import Prepared, prepare
from server.bench.effort import Effort, Outcome
from server.bench.footprint import Footprint
from server.bench.load import Column, Served
from server.bench.prompts import NUM_CODES, Prompts
from server.bench.scenarios import SCENARIOS
from server.bench.servers import Checkpoint, Wanted
from server.bench.target import Target, resolved

LONGEST_ANSWER_S = 600.0


@dataclass(frozen=True)
class Run:
    """What was measured, how, on what, and what came of it. targets: as they were asked; machine:
    at its beginning; footprints: of the servers that were started here, by name.
    """

    scenario: str
    wanted: Wanted
    effort: Effort
    prompts: Prompts
    checkpoint: Checkpoint | None
    targets: Sequence[Target]
    machine: dict[str, object]
    footprints: Mapping[str, Footprint]
    outcome: Outcome


def run(
    scenario: str,
    wanted: Wanted,
    effort: Effort,
    prompts: Prompts,
    console: Console,
    *,
    baseline: str | None,
) -> Run:
    """The servers that it starts have ended when it returns. baseline: None is the first column.

    Raises BenchError, ChildError, ConfigError, SteeringError.
    """
    with ExitStack() as stack:
        prepared = prepare(stack, scenario, wanted, effort)
        effort = replace(
            effort,
            baseline=prepared.baseline(baseline),
            budgets=prepared.budgets,
            fleet=prepared.fleet,
        )
        before = machine.describe()
        targets, outcome = asyncio.run(_measure(scenario, prepared, effort, prompts, console))
        before["load_average_after"] = list(os.getloadavg())
        footprints = {
            target.name: footprint
            for target in prepared.started
            if (footprint := Footprint.of(target.pid))
        }
    checkpoint = prepared.checkpoint
    return Run(scenario, wanted, effort, prompts, checkpoint, targets, before, footprints, outcome)


async def _measure(
    scenario: str, prepared: Prepared, effort: Effort, prompts: Prompts, console: Console
) -> tuple[list[Target], Outcome]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    timeout = httpx.Timeout(LONGEST_ANSWER_S, connect=10.0)
    async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as client:
        targets = [
            await resolved(client, target, prompts.about_picture(NUM_CODES - 1 - index))
            for index, target in enumerate(prepared.targets)
        ]
        columns: list[Column] = [*(Served(client, each) for each in targets), *prepared.local]
        chosen = SCENARIOS[scenario]
        with _bar(console, chosen.num_steps(columns, effort)) as step:
            return targets, await chosen.run(columns, prompts, effort, step)


@contextmanager
def _bar(console: Console, num_steps: int) -> Iterator[Callable[[str], None]]:
    """A bar that goes on by one at each call, with what is being done."""
    looks = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*looks, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=num_steps)
        yield lambda what: bar.update(task, description=what, advance=1)
