"""What is measured: servers that are started here, servers that run already, a library."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from server.bench import fleet, servers
from server.bench.effort import Effort
from server.bench.fleet import Fleet
from server.bench.footprint import Budget
from server.bench.load import Column
from server.bench.scenarios import SCENARIOS
from server.bench.servers import Checkpoint, Wanted
from server.bench.target import BenchError, Target, variants


@dataclass(frozen=True)
class Prepared:
    """started: the servers that were started here; targets: these and the others, once for each
    steering condition; local: columns of this process. budgets, fleet: see Effort.
    """

    checkpoint: Checkpoint | None
    started: Sequence[Target]
    targets: Sequence[Target]
    local: Sequence[Column] = ()
    budgets: Mapping[int, Budget] = field(default_factory=dict)
    fleet: Fleet | None = None

    def baseline(self, name: str | None) -> str:
        """The column of that name, by default the first. Raises BenchError where there is none."""
        names = [target.name for target in self.targets] + [each.name for each in self.local]
        if not names:
            raise BenchError("nothing to measure: give --serve, --demo, --shape or --url")
        chosen = name or names[0]
        if chosen not in names:
            raise BenchError(f"--baseline {chosen} is none of: {', '.join(names)}")
        return chosen


def prepare(stack: ExitStack, scenario: str, wanted: Wanted, effort: Effort) -> Prepared:
    """What is started ends with `stack`. Raises BenchError, ChildError, ConfigError, SteeringError.

    A scenario with a fleet measures that and nothing else.
    """
    checkpoint = servers.checkpoint(wanted.serve, wanted.demo, wanted.shape)
    if size := SCENARIOS[scenario].fleet:
        if wanted.has_others:
            raise BenchError(f"--scenario {scenario} measures replicas and nothing else")
        replicas = fleet.start(stack, checkpoint, wanted, size, num_rows=max(effort.streams))
        targets = _configured(replicas.targets, wanted)
        return Prepared(checkpoint, replicas.targets, targets, fleet=replicas)
    arrivals = effort.arrivals if scenario == "stalls" else 0
    started = servers.start(stack, checkpoint, wanted, num_rows=max(effort.streams) + arrivals)
    named = [Target(name, url.rstrip("/").removesuffix("/v1")) for name, url in wanted.urls]
    conditions = dict(wanted.steering)
    if checkpoint and checkpoint.conditions:
        conditions.setdefault(servers.OURS, checkpoint.conditions)
    targets = variants(_configured([*started.targets, *named], wanted), conditions)
    local = _generate(checkpoint, wanted.dtype) if wanted.generate else []
    return Prepared(checkpoint, started.targets, targets, local, started.budgets)


def _configured(targets: Sequence[Target], wanted: Wanted) -> list[Target]:
    """With the models and keys that are given for them. Raises BenchError."""
    names = [target.name for target in targets]
    for name in [*wanted.models, *wanted.api_keys]:
        if name not in names:
            raise BenchError(f"{name} is none of the servers: {', '.join(names)}")
    if len(set(names)) < len(names):
        raise BenchError(f"two servers have the same name: {', '.join(names)}")
    return [
        replace(
            target,
            model=wanted.models.get(target.name, target.model),
            api_key=wanted.api_keys.get(target.name, target.api_key),
        )
        for target in targets
    ]


def _generate(checkpoint: Checkpoint | None, dtype: str) -> list[Column]:
    from server.bench.generate import Generated  # torch: seconds

    if checkpoint is None:
        raise BenchError("--generate needs a checkpoint: give --serve, --demo or --shape")
    return [Generated(checkpoint.model, dtype)]
