"""Keeps this replica's documents in step with the store.

On each (re)subscription, each wake-up and at least every interval it reads what is new and puts it
in force at once; vector sets follow (vectors.py). A lost message heals with the interval, a lost
store leaves the last good documents in force. Which store is followed at all: succession.py.
Does not tell others about this replica (heartbeat.py).
"""

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from server.backoff import backoff
from server.directory import TenantDirectory
from server.errors import InvalidRequestError
from server.succession import InForce, Restoration
from server.tasks import ended
from server.vectors import VectorCatalogue
from steering.errors import ConflictError, StoreError
from steering.stores.base import Store

log = logging.getLogger("deshift.sync")

READ_TIMEOUT_S = 3.0  # a store that does not answer at all
FIRST_DELAY_S, MAX_DELAY_S = 0.05, 1.0

StoreState = Literal["ok", "unreachable", "foreign"]


@dataclass(frozen=True)
class SyncStatus:
    """How this replica stands to the store.

    revision, epoch: in force here. age_s: since the store last confirmed them, None before it has
    once; synced_at: the same as unix seconds.
    """

    store: StoreState
    problem: str | None
    revision: int
    epoch: str
    age_s: float | None
    synced_at: float | None


class Sync:
    """Owns what is in force; `run` is its one task. Event loop only."""

    def __init__(
        self,
        store: Store,
        directory: TenantDirectory,
        vectors: VectorCatalogue,
        interval_s: float,
    ) -> None:
        self._store = store
        self._directory = directory
        self._vectors = vectors
        self._interval_s = interval_s
        self._in_force = InForce()
        self._state: StoreState = "unreachable"
        self._problem: str | None = "the store has not been read yet"
        self._confirmed: tuple[float, float] | None = None  # monotonic, wall
        self._compares_all = True
        self._is_deaf = False
        self.changed = asyncio.Event()  # set when something new is in force; others clear it
        self._woken = asyncio.Event()
        self._looked = asyncio.Event()

    @property
    def status(self) -> SyncStatus:
        monotonic, wall = self._confirmed or (None, None)
        late = f"changes are not announced; they are in force within {self._interval_s:g} s"
        return SyncStatus(
            store=self._state,
            problem=self._problem or (late if self._is_deaf else None),
            revision=self._in_force.revision,
            epoch=self._in_force.epoch,
            age_s=None if monotonic is None else time.monotonic() - monotonic,
            synced_at=wall,
        )

    async def run(self) -> None:
        """Follow the store for ever."""
        tasks = [asyncio.create_task(each) for each in (self._listen(), self._follow())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await ended(*tasks)

    async def wait_for_first_look(self) -> None:
        """Until the store has been asked once, whatever came of it."""
        await self._looked.wait()

    async def look(self) -> None:
        """Read the store once and put in force what continues what is in force."""
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                await self._read()
        except TimeoutError:
            self._lost(f"the store did not answer within {READ_TIMEOUT_S:g} s")
        except StoreError as error:
            self._lost(str(error))
        except Exception as error:  # a task that ends would leave this replica behind for good
            if self._state != "unreachable" or not self._looked.is_set():
                log.exception("reading the store failed")
            self._lost(f"reading the store failed: {type(error).__name__}")
        self._looked.set()

    def adoption(self) -> dict[str, str | None]:
        """The writes by which an operator lets the foreign store's documents succeed these.

        The whole fleet follows the commit. Raises InvalidRequestError while nothing is foreign.
        """
        self._check_foreign()
        return self._in_force.adoption()

    async def restoration(self) -> Restoration:
        """What makes the foreign store say again what is in force here.

        Raises InvalidRequestError while nothing is foreign, ConflictError when another operator
        was faster, StoreError.
        """
        self._check_foreign()
        held = await self._store.changes()
        if self._in_force.is_succeeded_by(held):
            # What is in force here may be older than what was restored from another replica.
            raise ConflictError(
                "an operator has said already what becomes of the store's data",
                {"the store": held.revision},
            )
        restoration = self._in_force.restoration(held)
        sets = self._vectors.held
        vectors = await asyncio.to_thread(lambda: tuple(each.to_bytes() for each in sets))
        return replace(restoration, vectors=vectors)

    def _check_foreign(self) -> None:
        if self._state != "foreign":
            raise InvalidRequestError(
                f"the store is {self._state}, not foreign: there is nothing to adopt or restore",
                code="store_not_foreign",
            )

    async def _listen(self) -> None:
        delays = backoff(FIRST_DELAY_S, MAX_DELAY_S)
        while True:
            started = time.monotonic()
            try:
                await self._hear()
            except StoreError as error:
                self._report_deaf(str(error))
            except Exception as error:  # as in `look`
                self._report_deaf(type(error).__name__)
            self._compares_all = True  # what ended the listening may have ended more
            self._woken.set()
            if time.monotonic() - started > MAX_DELAY_S:
                delays = backoff(FIRST_DELAY_S, MAX_DELAY_S)
            await asyncio.sleep(next(delays))

    async def _hear(self) -> None:
        is_first = True  # says that it listens (again); what came before may be other data
        async for _ in self._store.wakeups():
            if is_first and self._is_deaf:
                log.info("the store's announcements are heard again")
            self._is_deaf = False
            self._compares_all |= is_first
            is_first = False
            self._woken.set()

    def _report_deaf(self, problem: str) -> None:
        if not self._is_deaf:
            log.warning("the store's announcements are not heard: %s", problem)
        self._is_deaf = True

    async def _follow(self) -> None:
        delays = backoff(FIRST_DELAY_S, MAX_DELAY_S)
        while True:
            self._woken.clear()
            await self.look()
            if self._state != "unreachable":
                delays = backoff(FIRST_DELAY_S, MAX_DELAY_S)
            delay = next(delays) if self._state == "unreachable" else self._interval_s
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._woken.wait()

    async def _read(self) -> None:
        in_force = self._in_force
        is_whole = self._compares_all or self._state != "ok"
        self._compares_all = False
        changes = await self._store.changes(0 if is_whole else in_force.revision)
        problem = in_force.contradiction(changes, is_whole)
        if problem is not None and not is_whole:
            is_whole = True
            changes = await self._store.changes()
            problem = in_force.contradiction(changes, is_whole)
        is_taken_over = not self._directory.is_synced
        if problem is not None:
            if not in_force.is_succeeded_by(changes):
                self._report("foreign", problem)
                return
            is_taken_over = True
            log.warning("an operator lets the store's data succeed those in force: %s", problem)
        new = in_force.take(changes, is_taken_over)
        if new.documents or is_taken_over:
            self._directory.apply(new, is_taken_over)
            self.changed.set()
        self._confirmed = time.monotonic(), time.time()
        self._report("ok", None)
        self._vectors.follow(self._directory.aliases, self._directory.aliases_in_use)

    def _lost(self, problem: str) -> None:
        # What comes back may be other data, and a foreign store that is away is still foreign.
        self._compares_all = True
        self._report("unreachable", problem)

    def _report(self, state: StoreState, problem: str | None) -> None:
        """Log a change of state once, not at every look."""
        if state != self._state or not self._looked.is_set():
            if state == "ok":
                log.info("in step with the store at revision %d", self._in_force.revision)
            else:
                kept = f"revision {self._in_force.revision} stays in force"
                log.warning("store %s: %s; %s", state, problem, kept)
        self._state, self._problem = state, problem
