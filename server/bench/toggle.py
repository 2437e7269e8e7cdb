"""Scenario `toggle`: how soon a tenant's new alpha is in force on every replica, under load.

One clock for all: operators, Redis and the replicas run on one machine. What the replicas say of
the moment is checked against the answers: a chat that is sent after it must have that revision.
"""

import asyncio
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import httpx
from redis.exceptions import RedisError

from server.bench import admission
from server.bench.effort import Effort, Outcome, Progress
from server.bench.fleet import TENANT, Fleet, add_tenants
from server.bench.load import Column, Served, servers_of
from server.bench.prompts import Prompts
from server.bench.store_cost import StoreCost, store_cost
from server.bench.target import BenchError
from server.bench.toggle_figures import Asked, Change, Toggle, figures_of, tables_of
from server.bench.ways import ByApi, ByCommand, ByConsole, ByProcess, Way
from server.control import Control
from steering.stores import Store, opened_store

NUM_TENANTS = 1000  # beside the one that is changed
NUM_PROCESSES = 3  # starting Python 200 times would measure Python
NUM_COUNTED = 20  # changes whose traffic with the store is counted
_IN_FORCE_S, _POLL_S = 30.0, 0.02
_LONGEST_PAUSE_S = 0.2  # so that changes meet the replicas' own rounds at any moment
_COMMITS_A_PAGE = 1000


def num_steps(_columns: Sequence[Column], effort: Effort) -> int:
    return effort.num_changes + NUM_PROCESSES


async def run(
    columns: Sequence[Column], prompts: Prompts, effort: Effort, progress: Progress
) -> Outcome:
    assert effort.fleet is not None  # it is of this scenario
    replicas = servers_of("toggle", columns)
    result = await measure(effort.fleet, replicas, prompts, effort, progress)
    failed = result.num_failed + result.num_mixed + result.num_behind
    return Outcome(tables_of(result), {"toggle": figures_of(result)}, failed)


async def measure(
    fleet: Fleet,
    columns: Sequence[Served],
    prompts: Prompts,
    effort: Effort,
    progress: Progress,
    *,
    num_tenants: int = NUM_TENANTS,
    num_processes: int = NUM_PROCESSES,
    num_counted: int = NUM_COUNTED,
) -> Toggle:
    """`num_changes` by all ways in turn and a few by whole processes, while as many chats as the
    largest of `streams` are under way, shared by the replicas (`columns`, in the fleet's order).
    Raises BenchError, SteeringError.
    """
    admissions = tuple(admission.measure(fleet.policy, n) for n in (1, 1 + num_tenants))
    async with AsyncExitStack() as stack:
        stack.enter_context(_explained())
        store = await stack.enter_async_context(opened_store(fleet.store_url))
        watch = await stack.enter_async_context(_watched(fleet))
        operator = _Operator(watch, itertools.cycle((fleet.policy.alpha / 2, fleet.policy.alpha)))
        ways = await _ways(stack, fleet, store)
        costs = [
            await _cost(fleet, store, operator, more, num_counted) for more in (0, num_tenants)
        ]
        started = time.monotonic()
        async with _load(columns, prompts, max(effort.streams), effort.max_tokens) as answers:
            made = await _in_turn(operator, ways, effort.num_changes, progress)
            processes = []
            for _ in range(num_processes):
                progress("changes by new processes")
                processes.append(await operator.change(ByProcess(fleet.store_url)))
        load_s = time.monotonic() - started
        # Read at the end, so that reading is no part of what is counted.
        changes, by_process = [await _committed(store, each) for each in (made, processes)]
    errors = [each.record.error for each in answers if each.record.error]
    good = [each for each in answers if not each.record.error]
    return Toggle(
        changes=changes,
        processes=by_process,
        num_streams=max(effort.streams),
        load_s=load_s,
        num_answered=len(good),
        num_failed=len(errors),
        first_error=errors[0] if errors else "",
        num_mixed=sum(each.is_mixed for each in good),
        num_behind=sum(each.is_behind((*changes, *by_process)) for each in good),
        store_costs=tuple(costs),
        admissions=admissions,
    )


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, RedisError) as error:
        raise BenchError(f"the fleet does not answer: {type(error).__name__}") from error


@dataclass(frozen=True)
class _Operator:
    """Changes the tenant's alpha, to the next of `alphas` each time. watch: of each replica."""

    watch: Sequence[httpx.AsyncClient]
    alphas: Iterator[float]

    async def change(self, way: Way) -> Change:
        """Returns when it is in force on every replica; when it was committed is not known yet."""
        sent = await way.change(next(self.alphas))
        applied = await asyncio.gather(*(_applied(each, sent.revision) for each in self.watch))
        return Change(way.name, sent.revision, sent.at, math.nan, tuple(applied))


async def _in_turn(
    operator: _Operator, ways: Sequence[Way], num: int, progress: Progress
) -> list[Change]:
    made = []
    for way in itertools.islice(itertools.cycle(ways), num):
        progress("changes of alpha")
        await asyncio.sleep(random.uniform(0, _LONGEST_PAUSE_S))
        made.append(await operator.change(way))
    return made


async def _cost(
    fleet: Fleet, store: Store, operator: _Operator, num_more: int, num_counted: int
) -> StoreCost:
    """Of `num_counted` changes when there are so many tenants more."""
    await add_tenants(store, fleet.policy, num_more)
    change = partial(operator.change, ByCommand(Control(store)))
    await change()  # now everybody has taken up the tenants, too
    return await store_cost(fleet.store_url, 1 + num_more, num_counted, change)


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
            messages = prompts.about_picture(number, number)
            sent_at = time.time()
            [record] = await column.answer([messages], max_tokens, every_token=True)
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


async def _committed(store: Store, changes: Sequence[Change]) -> tuple[Change, ...]:
    """The changes with the store's own moment of each."""
    times: dict[int, float] = {}
    before = None
    while page := await store.audit(_COMMITS_A_PAGE, before):
        times |= {record.revision: record.at for record in page}
        before = page[-1].revision
    return tuple(replace(each, committed_at=times[each.revision]) for each in changes)
