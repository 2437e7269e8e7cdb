"""The kinds of measurement by name. What each measures and shows is in the module of its name."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from server.bench import load, metrics, scrapes, second_turn, soak, stalls, throughput, toggle
from server.bench.effort import Effort, Outcome, Progress
from server.bench.fleet import Size
from server.bench.load import Column
from server.bench.prompts import Prompts


@dataclass(frozen=True)
class Scenario:
    """run: raises BenchError where a column cannot be measured so. num_steps: how often `run` will
    report progress; raises the same. fleet: the replicas that it measures, and nothing else.
    """

    run: Callable[[Sequence[Column], Prompts, Effort, Progress], Awaitable[Outcome]]
    num_steps: Callable[[Sequence[Column], Effort], int]
    fleet: Size | None = None


SCENARIOS: Mapping[str, Scenario] = {
    "throughput": Scenario(throughput.run, load.num_steps),
    "stalls": Scenario(stalls.run, stalls.num_steps),
    "second-turn": Scenario(second_turn.run, second_turn.num_steps),
    "memory": Scenario(soak.run, soak.num_steps),
    "toggle": Scenario(toggle.run, toggle.num_steps, Size(num_replicas=2)),
    "metrics": Scenario(metrics.run, load.num_steps),
    "scrapes": Scenario(scrapes.run, scrapes.num_steps, Size(1, scrapes.NUM_TENANTS)),
}
