"""A replica without engine and HTTP: what follows a store, running on the test's event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from server.control import Control
from server.directory import TenantDirectory
from server.documents import PolicyFields
from server.errors import NoSuchTenantError
from server.policy import default_fields
from server.sync import Sync
from server.vectors import VectorCatalogue
from steering.stores.base import Store
from tests.server.conftest import make_settings
from tests.server.fakes import AUTHOR, make_identity


@dataclass(frozen=True)
class Replica:
    directory: TenantDirectory
    vectors: VectorCatalogue
    sync: Sync

    def alpha(self, tenant: str = "acme") -> float:
        """In force here."""
        return self.directory.policy(tenant, time.time()).alpha

    def vector(self, alias: str = "default") -> str | None:
        active = self.vectors.active(alias)
        return active.id if active else None


def make_replica(store: Store, interval_s: float = 60.0) -> Replica:
    """With the default interval nothing heals by itself while a test runs."""
    directory = TenantDirectory(default_fields(make_settings()))
    vectors = VectorCatalogue(store, make_identity())
    return Replica(directory, vectors, Sync(store, directory, vectors, interval_s))


@asynccontextmanager
async def replica_of(store: Store, interval_s: float = 60.0) -> AsyncIterator[Replica]:
    """Running, and past its first look."""
    replica = make_replica(store, interval_s)
    task = asyncio.create_task(replica.sync.run())
    try:
        async with asyncio.timeout(10):
            await replica.sync.wait_for_first_look()
        yield replica
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await replica.vectors.close()


async def set_alpha(store: Store, alpha: float, tenant: str = "acme") -> int:
    """As an operator does, creating the tenant if need be; returns the revision."""
    control, policy = Control(store), PolicyFields(alpha=alpha)
    try:
        return await control.set_policy(tenant, policy, None, AUTHOR)
    except NoSuchTenantError:
        return await control.create_tenant(tenant, policy, AUTHOR)


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> float:
    """Wait for what comes from elsewhere; returns how long it took, in seconds."""
    started = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)
    return time.monotonic() - started
