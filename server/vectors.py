"""The shift vectors in force: of every alias, read, checked, swapped whole, kept when a new set
fails.

Does not cover making or publishing them (steering/), which alias points where (sync.py) nor who is
steered (policy.py).
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import Tensor

from server.backoff import backoff
from server.policy import Policy, decide
from steering.errors import PlanError, SteeringError, VectorError
from steering.methods import relative_dose, row_delta
from steering.models import ModelIdentity
from steering.plan import SteeringPlan
from steering.stores.base import Store
from steering.vectors import ShiftVectors

log = logging.getLogger("deshift.vectors")

LOAD_TIMEOUT_S = 30.0
# What failed is tried again: bytes may be mended without a change of the alias.
FIRST_RETRY_S, MAX_RETRY_S = 1.0, 30.0
MAX_LOADS = 4  # at once
MAX_AHEAD = 64  # aliases that no policy uses yet, loaded so that taking one up refuses nobody


@dataclass(frozen=True)
class RowSteering:
    """What a plan subtracts: delta (L, D) float32, None for nothing, and its largest dose."""

    delta: Tensor | None = None
    max_dose: float = 0.0


class VectorCatalogue:
    """Owns the active vector set of each alias; `run` is its one task. Event loop only."""

    def __init__(self, store: Store, identity: ModelIdentity, capacity: int = 64) -> None:
        self._store = store
        self._identity = identity
        self._capacity = capacity
        self._rows: OrderedDict[str, RowSteering] = OrderedDict()
        self._targets: dict[str, str] = {}
        self._in_use: frozenset[str] = frozenset()
        self._active: dict[str, ShiftVectors] = {}
        self._problems: dict[str, str] = {}
        self._unfit: dict[
            str, str
        ] = {}  # ids of sets for other models: no use in reading them again
        self._loads = asyncio.Semaphore(MAX_LOADS)
        self._woken = asyncio.Event()
        self._settled = asyncio.Event()

    def active(self, alias: str) -> ShiftVectors | None:
        """The last good set of an alias. Read it once per request: it is replaced, not changed."""
        return self._active.get(alias)

    def problem(self, alias: str) -> str | None:
        """Why an alias could not be followed at the last look; None when it was."""
        return self._problems.get(alias)

    @property
    def problems(self) -> dict[str, str]:
        """By alias, of those that a policy uses."""
        return {alias: each for alias, each in self._problems.items() if alias in self._in_use}

    @property
    def ids(self) -> dict[str, str]:
        """The vector set in force, by alias in use; an alias without one is not there."""
        return {
            alias: each.id for alias, each in sorted(self._active.items()) if alias in self._in_use
        }

    @property
    def held(self) -> list[ShiftVectors]:
        """Every set that is in force under some alias."""
        return list(self._active.values())

    def problem_of(self, policy: Policy) -> str | None:
        """What keeps pictures from being steered as a policy says: no vectors, or the dose."""
        if not policy.is_active or policy.mode != "dataset":
            return None
        alias = policy.vector_alias
        vectors = self._active.get(alias)
        if vectors is None:
            return self._problems.get(alias, f"no vectors of alias {alias!r} have been read yet")
        try:
            self.steering(decide(replace(policy, rollout=100.0), None, True, vectors), vectors)
        except PlanError as error:
            return str(error)
        return None

    def is_ready_for(self, policy: Policy) -> bool:
        """Whether no request is refused for want of vectors, unless it asks for them itself."""
        return not policy.needs_vectors or self.problem_of(policy) is None

    def follow(self, targets: Mapping[str, str], in_use: frozenset[str]) -> None:
        """Say which set each alias names now; `run` takes them up, the aliases in use first."""
        if targets == self._targets and in_use == self._in_use:
            return
        self._targets, self._in_use = dict(targets), in_use
        self._settled.clear()
        self._woken.set()

    async def run(self) -> None:
        """Take up what `follow` named, and try again what failed, for ever."""
        delays = backoff(FIRST_RETRY_S, MAX_RETRY_S)
        while True:
            self._woken.clear()
            await self.refresh()
            if not self._woken.is_set():
                self._settled.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(next(delays) if self._problems else None):
                    await self._woken.wait()
                delays = backoff(FIRST_RETRY_S, MAX_RETRY_S)

    async def wait_until_settled(self) -> None:
        """Until each alias that was named has been taken up or has failed once."""
        await self._settled.wait()

    async def refresh(self) -> None:
        """Take up each alias's set; where that fails its last good one stays, and it is told why.

        Sets that no alias in question names any more are let go; a request keeps its own.
        """
        wanted = self._wanted()
        self._unfit = {k: v for k, v in self._unfit.items() if k in self._targets.values()}
        for alias in (self._active.keys() | self._problems.keys()) - set(wanted):
            self._active.pop(alias, None)
            self._problems.pop(alias, None)
        aliases_by_id: dict[str, list[str]] = {}
        for alias in wanted:
            vector_id = self._targets.get(alias)
            if vector_id is None:
                missing = f"the store has no alias {alias!r}: make and activate vectors"
                self._report(alias, missing)
            else:
                aliases_by_id.setdefault(vector_id, []).append(alias)
        await asyncio.gather(*(self._take_up(*each) for each in aliases_by_id.items()))

    def steering(self, plan: SteeringPlan, vectors: ShiftVectors | None) -> RowSteering:
        """What `plan`, made with `vectors`, subtracts; cached by fingerprint. Event loop only.

        A sample plan's delta is yet to be measured: it is None here. Raises PlanError when the
        dose is over a dataset plan's cap or a layer does not exist.
        """
        if not plan.is_active:
            return RowSteering()
        if plan.mode == "sample":
            plan.schedule.layers(self._identity.num_layers)  # raises now, not in the engine
            return RowSteering()
        assert vectors is not None, "a dataset plan was made with vectors"
        cached = self._rows.get(plan.fingerprint)
        if cached is None:
            delta = row_delta(plan, vectors)
            cached = RowSteering(delta, float(relative_dose(delta, vectors).max()))
            self._rows[plan.fingerprint] = cached
            if len(self._rows) > self._capacity:
                self._rows.popitem(last=False)
        self._rows.move_to_end(plan.fingerprint)
        return cached

    def _wanted(self) -> list[str]:
        """Those in use, also where the store has none of the name, and some more."""
        ahead = sorted(self._targets.keys() - self._in_use)
        return [*sorted(self._in_use), *ahead[:MAX_AHEAD]]

    async def _take_up(self, vector_id: str, aliases: list[str]) -> None:
        """Put a set in force under the aliases that name it, if they still do when it is there."""
        held = {each.id: each for each in self._active.values()}
        problem: str | None = None
        try:
            vectors = held.get(vector_id) or await self._load(vector_id)
        except TimeoutError:
            problem = f"vector set {vector_id[:12]} did not come within {LOAD_TIMEOUT_S:g} s"
        except SteeringError as error:
            problem = str(error)
        except Exception as error:  # one bad set must not end the task that follows all of them
            log.exception("loading vectors failed")
            problem = f"loading vectors failed: {type(error).__name__}"
        for alias in aliases:
            if self._targets.get(alias) != vector_id:
                continue
            if problem is None and self._active.get(alias) is not vectors:
                self._active[alias] = vectors
                log.info("vectors %s in force (alias %r)", vector_id, alias)
            self._report(alias, problem)

    async def _load(self, vector_id: str) -> ShiftVectors:
        if vector_id in self._unfit:
            raise VectorError(self._unfit[vector_id])
        async with self._loads, asyncio.timeout(LOAD_TIMEOUT_S):
            vectors = await self._store.get_vectors(vector_id)
        try:
            await asyncio.to_thread(vectors.check, self._identity)
        except VectorError as error:
            self._unfit[vector_id] = str(error)
            raise
        return vectors

    def _report(self, alias: str, problem: str | None) -> None:
        """Log a change of state once, not at every look."""
        if problem is None:
            self._problems.pop(alias, None)
            return
        if problem != self._problems.get(alias) and alias in self._in_use:
            kept = self._active.get(alias)
            stays = f"; {kept.id} stays in force" if kept else ""
            log.warning("vectors of alias %r: %s%s", alias, problem, stays)
        self._problems[alias] = problem
