"""The shift vectors in force: of every alias, read, checked, swapped whole, kept when a new set
fails.

Does not cover making or publishing them (steering/), which alias points where (sync.py) nor who is
steered (policy.py).
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

from server.backoff import backoff
from server.policy import Policy, decide
from server.tasks import ended
from steering.errors import PlanError, SteeringError, VectorError
from steering.methods import RowSteering, row_steering
from steering.models import ModelIdentity
from steering.plan import SteeringPlan
from steering.stores.base import Store
from steering.vectors import ShiftVectors

log = logging.getLogger("deshift.vectors")

LOAD_TIMEOUT_S = 30.0
# What failed is tried again: bytes may be mended without a change of the alias.
FIRST_RETRY_S, MAX_RETRY_S = 1.0, 10.0
MAX_LOADS = 4  # at once
MAX_AHEAD = 64  # aliases that no policy uses yet, loaded so that taking one up refuses nobody


class VectorCatalogue:
    """Owns the active vector set of each alias. Event loop only; `close` ends what it began."""

    def __init__(self, store: Store, identity: ModelIdentity, capacity: int = 64) -> None:
        self._store = store
        self._identity = identity
        self._capacity = capacity
        self._rows: OrderedDict[str, RowSteering] = OrderedDict()
        self._targets: dict[str, str] = {}  # alias to id
        self._in_use: frozenset[str] = frozenset()
        self._active: dict[str, ShiftVectors] = {}  # by alias
        self._failures: dict[str, str] = {}  # by id
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by id; done: it will never fit
        self._trying: set[str] = set()  # ids that have neither come nor failed yet
        self._settled = asyncio.Event()
        self._loads = asyncio.Semaphore(MAX_LOADS)

    def active(self, alias: str) -> ShiftVectors | None:
        """The last good set of an alias. Read it once per request: it is replaced, not changed."""
        return self._active.get(alias)

    def problem(self, alias: str) -> str | None:
        """Why the alias is not followed; None when it is, or its set is just being read."""
        target = self._targets.get(alias)
        if target is not None:
            return self._failures.get(target)
        return f"the store has no alias {alias!r}: make and activate vectors"

    @property
    def problems(self) -> dict[str, str]:
        """By alias, of those that a policy uses."""
        found = {alias: self.problem(alias) for alias in sorted(self._in_use)}
        return {alias: problem for alias, problem in found.items() if problem is not None}

    @property
    def ids(self) -> dict[str, str]:
        """The vector set in force, by alias in use; an alias without one is not there."""
        in_use = sorted(self._active.keys() & self._in_use)
        return {alias: self._active[alias].id for alias in in_use}

    @property
    def held(self) -> list[ShiftVectors]:
        """Every set that is in force under some alias, once."""
        return list({each.id: each for each in self._active.values()}.values())

    def problem_of(self, policy: Policy) -> str | None:
        """What keeps pictures from being steered as a policy says: no vectors, the dose, or a
        layer that the model does not have."""
        if not policy.is_active:
            return None
        alias = policy.vector_alias
        vectors = self._active.get(alias)
        if policy.needs_vectors and vectors is None:
            return self.problem(alias) or f"the vectors of alias {alias!r} are being read"
        try:
            self.steering(decide(replace(policy, rollout=100.0), None, True, vectors), vectors)
        except PlanError as error:
            return str(error)
        return None

    def is_ready_for(self, policy: Policy) -> bool:
        """Whether no request that asks for nothing of its own is refused by `problem_of`."""
        return policy.on_error == "serve-unsteered" or self.problem_of(policy) is None

    def follow(self, targets: Mapping[str, str], in_use: frozenset[str]) -> None:
        """Say which set each alias names now: those that are not here are read, each by itself.

        Until a set has come, and where it fails, the alias's last good one stays. Sets that no
        alias in question names any more are let go; a request keeps its own.
        """
        if targets == self._targets and in_use == self._in_use:
            self._note_settled()  # also where there has been nothing to follow from the first
            return
        known_missing = self._in_use - self._targets.keys()
        self._targets, self._in_use = dict(targets), in_use
        wanted = self._wanted()
        for alias in in_use - targets.keys() - known_missing:
            log.warning("vectors: %s", self.problem(alias))
        ids = list(dict.fromkeys(targets[alias] for alias in wanted if alias in targets))
        for vector_id in self._tasks.keys() - set(ids):
            self._tasks.pop(vector_id).cancel()
            self._failures.pop(vector_id, None)
        held = {each.id: each for each in self._active.values()}
        for alias in self._active.keys() - set(wanted):
            del self._active[alias]
        for vector_id in ids:
            if vector_id in held:
                self._put_in_force(held[vector_id])
            elif vector_id not in self._tasks:
                self._trying.add(vector_id)
                self._tasks[vector_id] = asyncio.create_task(self._obtain(vector_id))
        self._trying &= self._tasks.keys()
        self._note_settled()

    async def wait_until_settled(self) -> None:
        """Until each set that was named has come, or has failed once."""
        await self._settled.wait()

    async def close(self) -> None:
        """End the reading; what is in force stays."""
        await ended(*self._tasks.values())

    def steering(self, plan: SteeringPlan, vectors: ShiftVectors | None) -> RowSteering:
        """What `plan`, made with `vectors`, subtracts; cached by fingerprint. Event loop only.

        Raises PlanError when the dose is over a dataset plan's cap, a layer does not exist, or the
        vector set lacks what the method needs.
        """
        if not plan.is_active:
            return RowSteering()
        cached = self._rows.get(plan.fingerprint)
        if cached is None:
            plan.schedule.layers(self._identity.num_layers)  # raises now, not in the engine
            cached = self._rows[plan.fingerprint] = row_steering(plan, vectors)
            if len(self._rows) > self._capacity:
                self._rows.popitem(last=False)
        self._rows.move_to_end(plan.fingerprint)
        return cached

    def _wanted(self) -> list[str]:
        """Those in use, also where the store has none of the name, and some more."""
        ahead = sorted(self._targets.keys() - self._in_use)
        return [*sorted(self._in_use), *ahead[:MAX_AHEAD]]

    async def _obtain(self, vector_id: str) -> None:
        """Read a set until it comes, and put it in force unless it was made for another model."""
        for delay in backoff(FIRST_RETRY_S, MAX_RETRY_S):
            vectors, problem = await self._read(vector_id)
            if vectors is not None:
                problem = await asyncio.to_thread(_misfit, vectors, self._identity)
            if self._tasks.get(vector_id) is not asyncio.current_task():
                return  # nobody wants it any more, and the cancellation was lost (tasks.py)
            self._trying.discard(vector_id)
            if problem is not None:
                self._fail(vector_id, problem)
            elif vectors is not None:
                del self._tasks[vector_id]
                self._failures.pop(vector_id, None)
                self._put_in_force(vectors)
            self._note_settled()
            if vectors is not None:
                return
            await asyncio.sleep(delay)

    async def _read(self, vector_id: str) -> tuple[ShiftVectors | None, str | None]:
        """A set, or why there is none."""
        try:
            async with self._loads, asyncio.timeout(LOAD_TIMEOUT_S):
                return await self._store.get_vectors(vector_id), None
        except TimeoutError:
            return None, f"vector set {vector_id[:12]} did not come within {LOAD_TIMEOUT_S:g} s"
        except SteeringError as error:
            return None, str(error)
        except Exception as error:  # else it would never be tried again
            log.exception("reading vectors failed")
            return None, f"reading vectors failed: {type(error).__name__}"

    def _put_in_force(self, vectors: ShiftVectors) -> None:
        for alias in self._wanted():
            if self._targets.get(alias) != vectors.id or self._active.get(alias) is vectors:
                continue
            self._active[alias] = vectors
            log.info("vectors %s in force (alias %r)", vectors.id, alias)

    def _fail(self, vector_id: str, problem: str) -> None:
        """Log it once, not at every attempt, and only where it matters."""
        known = self._failures.get(vector_id)
        self._failures[vector_id] = problem
        for alias in sorted(self._in_use):
            if self._targets.get(alias) == vector_id and problem != known:
                kept = self._active.get(alias)
                stays = f"; {kept.id} stays in force" if kept else ""
                log.warning("vectors of alias %r: %s%s", alias, problem, stays)

    def _note_settled(self) -> None:
        if self._trying:
            self._settled.clear()
        else:
            self._settled.set()


def _misfit(vectors: ShiftVectors, identity: ModelIdentity) -> str | None:
    """Why a set cannot be used with a model. It is content, so the verdict is for good."""
    try:
        vectors.check(identity)
    except VectorError as error:
        return str(error)
    return None
