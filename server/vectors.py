"""The shift vectors in force: read, checked, swapped whole, kept when a new set fails.

Does not cover making or publishing them (steering/) nor who is steered (policy.py).
"""

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from server.policy import Policy, decide
from steering.errors import NotFoundError, SteeringError
from steering.methods import relative_dose, row_delta
from steering.models import ModelIdentity
from steering.plan import SteeringPlan
from steering.stores import Store
from steering.vectors import ShiftVectors

log = logging.getLogger("deshift.vectors")


@dataclass(frozen=True)
class RowSteering:
    """What a plan subtracts: delta (L, D) float32, None for nothing, and its largest dose."""

    delta: Tensor | None = None
    max_dose: float = 0.0


class VectorCatalogue:
    """Owns the active vector set of one alias. `refresh` may run in any thread, one at a time."""

    def __init__(
        self, store: Store, policy: Policy, identity: ModelIdentity, capacity: int = 64
    ) -> None:
        self._store = store
        self._policy = policy
        self._identity = identity
        self._capacity = capacity
        self._rows: OrderedDict[str, RowSteering] = OrderedDict()
        self._active: ShiftVectors | None = None
        self._problem: str | None = None

    @property
    def active(self) -> ShiftVectors | None:
        """The last good set. Read it once per request: it is replaced, never changed."""
        return self._active

    @property
    def problem(self) -> str | None:
        """Why the alias could not be followed at the last look; None when it was."""
        return self._problem

    @property
    def is_ready(self) -> bool:
        """Whether no request is refused for want of vectors, unless it asks for them itself."""
        return self._active is not None or not self._policy.needs_vectors

    def refresh(self) -> None:
        """Follow the alias; on any failure keep the last good set and remember why. Blocks."""
        try:
            vectors = self._load_new()
        except SteeringError as error:
            self._report(str(error))
            return
        if vectors is not None:
            self._active = vectors
            log.info("vectors %s in force (alias %r)", vectors.id, self._policy.vector_alias)
        self._report(None)

    async def poll(self, interval_s: float = 1.0) -> None:
        """Refresh for ever, off the event loop's thread."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await asyncio.to_thread(self.refresh)
            except Exception as error:  # a poll that ends would leave this replica behind for good
                log.exception("looking for new vectors failed")
                self._problem = f"looking for new vectors failed: {type(error).__name__}"

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

    def _load_new(self) -> ShiftVectors | None:
        """The alias's set, checked against model and policy; None when it is the active one."""
        alias = self._policy.vector_alias
        vector_id = self._store.aliases().get(alias)
        if vector_id is None:
            raise NotFoundError(f"the store has no alias {alias!r}: make and activate vectors")
        if self._active is not None and self._active.id == vector_id:
            return None
        vectors = self._store.get_vectors(vector_id)
        vectors.check(self._identity)
        plan = decide(self._policy, None, has_images=True, vectors=vectors)
        if plan.mode == "dataset":
            row_delta(plan, vectors)  # raises when the policy's own dose is over its cap
        return vectors

    def _report(self, problem: str | None) -> None:
        """Log a change of state once, not once a second."""
        if problem is not None and problem != self._problem:
            kept = f"; {self._active.id} stays in force" if self._active else ""
            log.warning("vectors: %s%s", problem, kept)
        self._problem = problem
