"""What scenario `toggle` finds, as figures and as tables: changes, answers, the cost of tenants."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from server.bench import tables
from server.bench.admission import Admission
from server.bench.store_cost import StoreCost
from server.bench.stream import StreamRecord
from server.bench.summary import Spread


@dataclass(frozen=True)
class Change:
    """Unix seconds: sent by the operator, committed by the store, in force on each replica."""

    way: str
    revision: int
    sent_at: float
    committed_at: float
    applied_at: tuple[float, ...]

    @property
    def from_sent_s(self) -> float:
        """Until it was in force everywhere."""
        return max(self.applied_at) - self.sent_at

    @property
    def from_commit_s(self) -> float:
        return max(self.applied_at) - self.committed_at


@dataclass(frozen=True)
class Asked:
    """A chat of the load: to which replica, when (unix seconds), and what came."""

    replica: int
    sent_at: float
    record: StreamRecord

    @property
    def is_mixed(self) -> bool:
        return len(self.record.revisions) != 1 or None in self.record.revisions

    def is_behind(self, changes: Sequence[Change]) -> bool:
        """Whether an older revision than the newest that its replica had in force when sent."""
        in_force = [c.revision for c in changes if c.applied_at[self.replica] <= self.sent_at]
        newest = max(in_force, default=0)
        return any(each is not None and each < newest for each in self.record.revisions)


@dataclass(frozen=True)
class Latency:
    """Seconds."""

    median: float
    p99: float
    maximum: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Latency | None":
        found = list(values)
        spread = Spread.of(found)
        return None if spread is None else cls(spread.median, spread.p99, max(found), spread.n)


@dataclass(frozen=True)
class Toggle:
    """changes: those by the ways that count; processes: by whole processes of the command.

    num_mixed: answers whose chunks name more than one revision, or none; num_behind: answers with
    an older one than was in force on their replica, as it says, when they were sent.
    """

    changes: tuple[Change, ...]
    processes: tuple[Change, ...]
    num_streams: int
    load_s: float
    num_answered: int
    num_failed: int
    first_error: str
    num_mixed: int
    num_behind: int
    store_costs: tuple[StoreCost, ...]
    admissions: tuple[Admission, ...]

    @property
    def by_way(self) -> dict[str, tuple[Change, ...]]:
        """The ways in order of appearance, all of them, and the processes."""
        ways = dict.fromkeys(change.way for change in self.changes)
        groups = {way: tuple(c for c in self.changes if c.way == way) for way in ways}
        groups["all"] = self.changes
        return groups | ({self.processes[0].way: self.processes} if self.processes else {})


def tables_of(result: Toggle) -> list[Table]:
    """How soon changes were in force, what became of the load, what many tenants cost."""
    return [_change_table(result), _load_table(result), _tenant_table(result)]


def figures_of(result: Toggle) -> dict[str, Any]:
    """Every change, and the figures of the tables."""

    def figures(made: Sequence[Change]) -> dict[str, Any]:
        sent, commit = (c.from_sent_s for c in made), (c.from_commit_s for c in made)
        both = {"from_sent_s": Latency.of(sent), "from_commit_s": Latency.of(commit)}
        return {name: latency and asdict(latency) for name, latency in both.items()}

    return asdict(result) | {"in_force": {way: figures(c) for way, c in result.by_way.items()}}


def _change_table(result: Toggle) -> Table:
    table = tables.table(
        "A tenant's alpha in force on every replica: median / p99 / maximum, ms\n"
        "Not in `all`: processes of their own, whose start is in their time from sending",
        ("changes", "by", "from sending", "from the store's commit"),
    )
    for way, made in result.by_way.items():
        times = (Latency.of(c.from_sent_s for c in made), Latency.of(c.from_commit_s for c in made))
        table.add_row(str(len(made)), escape(way), *map(_latency, times))
    return table


def _load_table(result: Toggle) -> Table:
    table = tables.table(
        "Answers meanwhile. Mixed: more than one revision in an answer's chunks. Behind: an older "
        "one than was in force when the chat was sent",
        ("streams", "seconds", "answered", "dropped", "mixed", "behind"),
        num_names=0,
    )
    dropped = f"{result.num_failed}: {result.first_error}" if result.num_failed else "0"
    table.add_row(
        str(result.num_streams),
        f"{result.load_s:.0f}",
        str(result.num_answered),
        escape(dropped),
        str(result.num_mixed),
        str(result.num_behind),
    )
    return table


def _tenant_table(result: Toggle) -> Table:
    table = tables.table(
        "What tenants cost. In the bench's own process, median / p99 in microseconds: to admit a "
        "request, to take up a change\nRedis for a change, to all replicas and the operator, "
        f"without load, mean of {result.store_costs[0].num_changes}",
        ("tenants", "admit", "take up", "Redis: commands", "Redis: bytes sent"),
        num_names=0,
    )
    for there, cost in zip(result.admissions, result.store_costs, strict=True):
        micro = [f"{1e6 * s.median:.1f} / {1e6 * s.p99:.1f}" for s in (there.admit, there.take_up)]
        redis = (f"{cost.commands:.1f}", f"{cost.sent_bytes:.0f}")
        table.add_row(str(there.num_tenants), *micro, *redis)
    return table


def _latency(value: Latency | None) -> str:
    if value is None:
        return "-"
    return " / ".join(f"{1000 * each:.1f}" for each in (value.median, value.p99, value.maximum))
