"""Tells the fleet's operators what is in force on this replica, by its heartbeat in the store.

Whatever the store answers, nothing here stops anything: a replica that may not write is only not
seen. Does not read what others tell (server/admin).
"""

import asyncio
import json
import logging
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from server.config import Settings
from server.directory import TenantDirectory
from server.engine.api import Engine
from server.sync import Sync
from server.vectors import VectorCatalogue
from steering.errors import StoreError
from steering.stores.base import Store

log = logging.getLogger("deshift.heartbeat")

TIMEOUT_S = 3.0
MIN_GAP_S = 0.1  # between two beats, however often something changes
MIN_TTL_S = 5.0
MAX_TOLD = 5  # problems; their number is told, too
MAX_VECTORS_TOLD = 100


def replica_name(settings: Settings) -> str:
    """As set, or host name and port; what a name may not hold becomes a dash."""
    text = settings.replica or f"{socket.gethostname()}-{settings.port}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[-64:].lstrip("._-") or "replica"


class Heartbeat:
    """`run` is its one task. Event loop only.

    `changed`, when set, is told of at once, so that operators see their change in force.
    """

    def __init__(
        self,
        store: Store,
        replica: str,
        interval_s: float,
        status: Callable[[], dict[str, Any]],
        changed: asyncio.Event,
    ) -> None:
        self._store = store
        self._replica = replica
        self._interval_s = interval_s
        self._status = status
        self._changed = changed
        self._problem: str | None = None

    async def run(self) -> None:
        """Beat for ever; when cancelled, take this replica's heartbeat away."""
        try:
            while True:
                self._changed.clear()
                await self._beat(lambda: json.dumps(self._status(), separators=(",", ":")))
                await asyncio.sleep(min(MIN_GAP_S, self._interval_s))
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        await self._changed.wait()
        finally:
            await self._beat(lambda: "")

    async def _beat(self, status: Callable[[], str]) -> None:
        problem = None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                ttl_s = max(MIN_TTL_S, 5 * self._interval_s)
                await self._store.heartbeat(self._replica, status(), ttl_s)
        except TimeoutError:
            problem = f"the store did not answer within {TIMEOUT_S:g} s"
        except StoreError as error:
            problem = str(error)
        except Exception as error:  # a task that ends would leave this replica unseen for good
            problem = type(error).__name__
            log.debug("heartbeat failed", exc_info=True)
        if (problem is None) != (self._problem is None):
            said = "works again" if problem is None else f"does not reach the store: {problem}"
            log.log(logging.INFO if problem is None else logging.WARNING, "heartbeat %s", said)
        self._problem = problem


def replica_status(
    name: str,
    settings: Settings,
    engine: Engine,
    directory: TenantDirectory,
    vectors: VectorCatalogue,
    sync: Sync,
    started_at: float,
) -> dict[str, Any]:
    """What a heartbeat says, as JSON values. No secrets; names of tenants may be in problems."""
    status, running = sync.status, engine.status()
    problems = [*directory.problems.values(), *vectors.problems.values()]
    return {
        "replica": name,
        "revision": status.revision,
        "epoch": status.epoch,
        "age_s": None if status.age_s is None else round(status.age_s, 3),
        "store": status.store,
        "problem": status.problem,
        "model": settings.served_model_name or engine.identity.model_id,
        "version": version("deshift"),
        "started_at": started_at,
        "at": time.time(),
        "engine": running.state,
        "kill": directory.kill,
        "local_kill": directory.local_kill,
        "vectors": dict(list(vectors.ids.items())[:MAX_VECTORS_TOLD]),
        "problems": problems[:MAX_TOLD],
        "num_problems": len(problems),
        "running": running.num_running,
        "waiting": running.num_waiting,
    }
