"""Scenario `toggle`: how soon a tenant's new alpha is in force on every replica, under load.

One clock for all: operators, Redis and the replicas run on one machine. What the replicas say of
the moment is checked against the answers: a chat that is sent after it must have that revision.
"""

import asyncio
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import httpx
from redis.exceptions import RedisError

from server.bench import admission
from server.bench.admission import Admission
from server.bench.fleet import TENANT, Fleet, add_tenants
from server.bench.load import Served
from server.bench.prompts import Prompts
from server.bench.store_cost import StoreCost, store_cost
from server.bench.stream import StreamRecord, chat
from server.bench.summary import Spread
from server.bench.target import BenchError
from server.bench.ways import ByApi, ByCommand, ByConsole, ByProcess, Way
from server.control import Control
from steering.stores import Store, opened_store

NUM_TENANTS = 1000  # beside the one that is changed
NUM_PROCESSES = 3  # starting Python 200 times would measure Python
NUM_COUNTED = 20  # changes whose traffic with the store is counted
_IN_FORCE_S, _POLL_S = 30.0, 0.02
_LONGEST_PAUSE_S = 0.2  # so that changes meet the replicas' own rounds at any moment
_COMMITS_A_PAGE = 1000


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


def num_steps(num_changes: int) -> int:
    return num_changes + NUM_PROCESSES


async def run(
    fleet: Fleet,
    columns: Sequence[Served],
    prompts: Prompts,
    *,
    num_changes: int,
    num_streams: int,
    max_tokens: int,
    progress: Callable[[str], None],
    num_tenants: int = NUM_TENANTS,
    num_processes: int = NUM_PROCESSES,
) -> Toggle:
    """`num_changes` by all ways in turn and a few by whole processes, while `num_streams` chats are
    under way, shared by the replicas (`columns`, in the fleet's order). Raises BenchError,
    SteeringError.
    """
    admissions = tuple(admission.measure(fleet.policy, n) for n in (1, 1 + num_tenants))
    async with AsyncExitStack() as stack:
        stack.enter_context(_explained())
        store = await stack.enter_async_context(opened_store(fleet.store_url))
        watch = await stack.enter_async_context(_watched(fleet))
        ways = await _ways(stack, fleet, store)
        alphas = itertools.cycle((fleet.policy.alpha / 2, fleet.policy.alpha))

        async def make(way: Way) -> Change:
            sent = await way.change(next(alphas))
            applied = await asyncio.gather(*(_applied(each, sent.revision) for each in watch))
            return Change(way.name, sent.revision, sent.at, math.nan, tuple(applied))

        costs = []
        for more in (0, num_tenants):
            await add_tenants(store, fleet.policy, more)
            command = ByCommand(Control(store))
            await make(command)  # now everybody has taken up the tenants, too
            url = fleet.store_url
            costs.append(await store_cost(url, 1 + more, NUM_COUNTED, partial(make, command)))
        started = time.monotonic()
        async with _load(columns, prompts, num_streams, max_tokens) as answers:
            made = []
            for number in range(num_changes):
                progress("changes of alpha")
                await asyncio.sleep(random.uniform(0, _LONGEST_PAUSE_S))
                made.append(await make(ways[number % len(ways)]))
            processes = []
            for _ in range(num_processes):
                progress("changes by new processes")
                processes.append(await make(ByProcess(fleet.store_url)))
        load_s = time.monotonic() - started
        committed = await _commit_times(store)
    # Read at the end, so that reading is no part of what is counted.
    changes, by_process = (
        tuple(replace(each, committed_at=committed[each.revision]) for each in group)
        for group in (made, processes)
    )
    errors = [each.record.error for each in answers if each.record.error]
    good = [each for each in answers if not each.record.error]
    return Toggle(
        changes=changes,
        processes=by_process,
        num_streams=num_streams,
        load_s=load_s,
        num_answered=len(good),
        num_failed=len(errors),
        first_error=errors[0] if errors else "",
        num_mixed=sum(is_mixed(each) for each in good),
        num_behind=sum(is_behind(each, (*changes, *by_process)) for each in good),
        store_costs=tuple(costs),
        admissions=admissions,
    )


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, RedisError) as error:
        raise BenchError(f"the fleet does not answer: {type(error).__name__}") from error


def is_mixed(asked: Asked) -> bool:
    return len(asked.record.revisions) != 1 or None in asked.record.revisions


def is_behind(asked: Asked, changes: Sequence[Change]) -> bool:
    """Whether an older revision than the newest that its replica had in force when it was sent."""
    in_force = [c.revision for c in changes if c.applied_at[asked.replica] <= asked.sent_at]
    newest = max(in_force, default=0)
    return any(each is not None and each < newest for each in asked.record.revisions)


async def _ways(stack: AsyncExitStack, fleet: Fleet, store: Store) -> list[Way]:
    """API and console at different replicas, so that both hear of others' changes."""
    first, last = fleet.admin_urls[0], fleet.admin_urls[-1]
    with_key = httpx.AsyncClient(base_url=first, headers=_key(fleet), trust_env=False, timeout=30)
    browser = httpx.AsyncClient(base_url=last, trust_env=False, timeout=30)
    console = ByConsole(await stack.enter_async_context(browser))
    await console.sign_in(fleet.admin_key)
    api = ByApi(await stack.enter_async_context(with_key))
    return [api, ByCommand(Control(store)), console]


@asynccontextmanager
async def _watched(fleet: Fleet) -> AsyncIterator[list[httpx.AsyncClient]]:
    """A client for each replica's admin listener."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                httpx.AsyncClient(base_url=url, headers=_key(fleet), trust_env=False, timeout=30)
            )
            for url in fleet.admin_urls
        ]


def _key(fleet: Fleet) -> dict[str, str]:
    return {"authorization": f"Bearer {fleet.admin_key}"}


async def _applied(client: httpx.AsyncClient, revision: int) -> float:
    """When this replica put the revision in force, by its own word; asks until it has."""
    deadline = time.monotonic() + _IN_FORCE_S
    while time.monotonic() < deadline:
        response = await client.get(f"/admin/v1/tenants/{TENANT}/in-force")
        view = response.json() if response.status_code == 200 else {"revision": 0}
        if view["revision"] == revision:
            return float(view["applied_at"])
        await asyncio.sleep(_POLL_S)
    raise BenchError(f"revision {revision} was not in force within {_IN_FORCE_S:g} s")


@asynccontextmanager
async def _load(
    columns: Sequence[Served], prompts: Prompts, num_streams: int, max_tokens: int
) -> AsyncIterator[list[Asked]]:
    """Each stream begins a chat when its last one is answered; the block is entered when all have
    had one answer, and at its end every chat is waited for."""
    answers: list[Asked] = []
    numbers, is_over = itertools.count(), asyncio.Event()
    warm: set[int] = set()

    async def stream(index: int) -> None:
        replica = index % len(columns)
        column = columns[replica]
        while not is_over.is_set():
            number = next(numbers)
            body = column.target.body(prompts.about_picture(number, number), max_tokens)
            sent_at = time.time()
            record = await chat(column.client, column.target, body)
            answers.append(Asked(replica, sent_at, record))
            warm.add(index)
            if record.error:
                await asyncio.sleep(_LONGEST_PAUSE_S)  # refusals at full speed would be a flood

    streams = [asyncio.create_task(stream(index)) for index in range(num_streams)]
    try:
        while len(warm) < num_streams and not any(task.done() for task in streams):
            await asyncio.sleep(_POLL_S)
        yield answers
    finally:
        is_over.set()
        await asyncio.gather(*streams)


async def _commit_times(store: Store) -> dict[int, float]:
    """Revision to the store's moment of it."""
    times: dict[int, float] = {}
    before = None
    while page := await store.audit(_COMMITS_A_PAGE, before):
        times |= {record.revision: record.at for record in page}
        before = page[-1].revision
    return times
