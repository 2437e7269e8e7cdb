"""What is asked of the fleet and what each replica has in force: rows of the fleet page.

The store says what operators ask; a heartbeat says what a replica has read and cannot do.
"""

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from server.console.diffs import number
from server.control import Control, StoreState, TenantState
from server.documents import TENANT_PREFIX, KillAction, PolicyFields

# in-force: what is asked; behind: an older revision; killed: overridden; failing: asked and not
# possible; unreachable: the replica has lost the store.
State = Literal["in-force", "behind", "killed", "failing", "unreachable"]
STALE_AFTER_S = 10.0  # a snapshot this old was not renewed several times in a row


@dataclass(frozen=True)
class Replica:
    """A heartbeat. age_s: since the store last confirmed the revision, None before it has once.

    kill: what the store says; local_kill: what was set on this replica alone.
    """

    name: str
    revision: int
    epoch: str
    age_s: float | None
    store: str
    problem: str
    model: str
    version: str
    started_at: float
    kill: KillAction
    local_kill: KillAction
    vectors: Mapping[str, str]
    problems: tuple[str, ...]
    num_problems: int
    running: int
    waiting: int

    @property
    def kill_in_force(self) -> KillAction:
        """Refusing is the stronger one."""
        asked = {self.kill, self.local_kill}
        return "reject" if "reject" in asked else "unsteered" if "unsteered" in asked else "none"

    @property
    def has_store(self) -> bool:
        """Whether it has heard from the store just now."""
        return self.store == "ok" and self.age_s is not None and self.age_s < STALE_AFTER_S


@dataclass(frozen=True)
class InForce:
    """What one replica does for one tenant; text: a few words, e.g. `0.8` or `at 41`."""

    replica: str
    state: State
    text: str


@dataclass(frozen=True)
class TenantRow:
    """asked: alpha, or `off`. ends_at, changed_at: unix seconds."""

    name: str
    asked: str
    mode: str
    rollout: str
    revision: int
    ends_at: float | None
    replicas: tuple[InForce, ...]
    changed_at: float | None = None

    @property
    def in_force(self) -> list[str]:
        """The replicas that do what is asked."""
        return [each.replica for each in self.replicas if each.state == "in-force"]

    @property
    def others(self) -> list[InForce]:
        return [each for each in self.replicas if each.state != "in-force"]


@dataclass(frozen=True)
class Page:
    """One page of tenants; number counts from 1."""

    rows: Sequence[TenantRow]
    number: int
    num_pages: int
    num_found: int
    num_tenants: int
    query: str = ""


@dataclass(frozen=True)
class FleetView:
    replicas: Sequence[Replica]
    unreadable: Sequence[str] = field(default_factory=tuple)  # heartbeats of another version


async def read_fleet(control: Control) -> tuple[StoreState, FleetView]:
    """Heartbeats first: whoever says to have a revision has it when the revision is read."""
    view = replicas_of(await control.store.replicas())
    return await control.state(), view


async def with_ages(control: Control, rows: Iterable[TenantRow]) -> list[TenantRow]:
    """The rows, with the time of the commit that each revision is of."""

    async def at(row: TenantRow) -> TenantRow:
        records = await control.store.audit(1, row.revision + 1)
        return replace(row, changed_at=records[0].at) if records else row

    return list(await asyncio.gather(*map(at, rows)))


def replicas_of(heartbeats: Mapping[str, str]) -> FleetView:
    """By name. A heartbeat that cannot be read is named, not hidden."""
    replicas, unreadable = [], []
    for name in sorted(heartbeats):
        try:
            replicas.append(_replica(name, json.loads(heartbeats[name])))
        except (ValueError, TypeError, KeyError, AttributeError):
            unreadable.append(name)
    return FleetView(replicas, unreadable)


def tenant_page(
    state: StoreState, replicas: Sequence[Replica], now: float, query: str, number: int, size: int
) -> Page:
    """The tenants whose names contain `query`, in any case, by name."""
    wanted = query.strip().casefold()
    names = sorted(name for name in state.tenants if wanted in name.casefold())
    num_pages = max(1, -(-len(names) // size))
    number = min(max(1, number), num_pages)
    rows = [
        tenant_row(state.tenants[name], state, replicas, now)
        for name in names[(number - 1) * size : number * size]
    ]
    return Page(rows, number, num_pages, len(names), len(state.tenants), query.strip())


def tenant_row(
    tenant: TenantState, state: StoreState, replicas: Sequence[Replica], now: float
) -> TenantRow:
    policy = tenant.document.in_force(now)
    until = tenant.document.until
    each = tuple(in_force(tenant, policy, state, replica) for replica in replicas)
    return TenantRow(
        name=tenant.name,
        asked=asked_of(policy),
        mode=policy.mode,
        rollout="" if policy.rollout == 100 else f"{policy.rollout:g} %",
        revision=tenant.revision,
        ends_at=until.at if until is not None and now < until.at else None,
        replicas=each,
    )


def in_force(
    tenant: TenantState, policy: PolicyFields, state: StoreState, replica: Replica
) -> InForce:
    """The first thing that keeps the replica from doing what is asked, if there is one."""

    def is_(what: State, text: str) -> InForce:
        return InForce(replica.name, what, text)

    if replica.kill_in_force == "reject":
        return is_("killed", "refuses pictures")
    if replica.kill_in_force == "unsteered":
        return is_("killed", "unsteered")
    if replica.epoch != state.epoch:
        return is_("behind", "has other data")
    if replica.revision < tenant.revision:
        return is_("behind" if replica.has_store else "unreachable", f"at {replica.revision}")
    # It may have the revision and not have been able to read it: an older version, say.
    if any(repr(TENANT_PREFIX + tenant.name) in told for told in replica.problems):
        return is_("failing", "cannot read it")
    if replica.num_problems > len(replica.problems):
        return is_("failing", f"unsure: {replica.num_problems} problems")
    if policy.mode == "dataset" and policy.alpha > 0:
        held = replica.vectors.get(policy.vector_alias)
        if held is None:
            return is_("failing", f"no vectors {policy.vector_alias}")
        if held != state.aliases.get(policy.vector_alias):
            return is_("behind", f"older vectors {policy.vector_alias}")
    return is_("in-force", asked_of(policy))


def asked_of(policy: PolicyFields) -> str:
    return "off" if policy.mode == "off" else number(policy.alpha)


def _replica(name: str, values: Mapping[str, Any]) -> Replica:
    return Replica(
        name=name,
        revision=int(values["revision"]),
        epoch=str(values["epoch"]),
        age_s=None if values["age_s"] is None else float(values["age_s"]),
        store=str(values["store"]),
        problem=str(values.get("problem") or ""),
        model=str(values.get("model") or ""),
        version=str(values.get("version") or ""),
        started_at=float(values.get("started_at") or 0.0),
        kill=values.get("kill") or "none",
        local_kill=values.get("local_kill") or "none",
        vectors={str(k): str(v) for k, v in (values.get("vectors") or {}).items()},
        problems=(problems := _texts(values.get("problems"))),
        num_problems=max(len(problems), int(values.get("num_problems") or 0)),
        running=int(values.get("running") or 0),
        waiting=int(values.get("waiting") or 0),
    )


def _texts(problems: Any) -> tuple[str, ...]:
    """A list of texts, or an object of them by what they are about."""
    if isinstance(problems, Mapping):
        return tuple(f"{name}: {text}" for name, text in problems.items())
    return tuple(str(each) for each in problems or ())
