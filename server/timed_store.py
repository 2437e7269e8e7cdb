"""A store whose calls are timed, for those of this server that read and write it."""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from steering.errors import ConflictError, NotFoundError, VectorError
from steering.stores.base import AuditRecord, Changes, Document, Store, VectorRecord
from steering.vectors import ShiftVectors

# Told after each call: what was called, the seconds that it took, and whether it failed.
StoreObserver = Callable[[str, float, bool], None]


class TimedStore:
    """Implements steering.stores.base.Store by another one; the waiting for wake-ups is no call.

    Failed has a call that could not be done or was given up, as at a time limit. A conflict, that
    something is not there, or vectors that are none, is an answer.
    """

    def __init__(self, store: Store, observe: StoreObserver) -> None:
        self._store = store
        self._observe = observe

    async def put_vectors(self, data: bytes) -> str:
        with self._timed("vectors"):
            return await self._store.put_vectors(data)

    async def get_vectors(self, vector_id: str) -> ShiftVectors:
        with self._timed("vectors"):
            return await self._store.get_vectors(vector_id)

    async def list_vectors(self) -> list[VectorRecord]:
        with self._timed("vectors"):
            return await self._store.list_vectors()

    async def changes(self, since: int = 0) -> Changes:
        with self._timed("read"):
            return await self._store.changes(since)

    async def get(self, keys: Sequence[str]) -> dict[str, Document]:
        with self._timed("read"):
            return await self._store.get(keys)

    async def commit(
        self, writes: Mapping[str, str | None], expected: Mapping[str, int], audit: str
    ) -> int:
        with self._timed("commit"):
            return await self._store.commit(writes, expected, audit)

    async def audit(self, limit: int, before: int | None = None) -> list[AuditRecord]:
        with self._timed("audit"):
            return await self._store.audit(limit, before)

    async def heartbeat(self, replica: str, status: str, ttl_s: float) -> None:
        with self._timed("heartbeat"):
            await self._store.heartbeat(replica, status, ttl_s)

    async def replicas(self) -> dict[str, str]:
        with self._timed("replicas"):
            return await self._store.replicas()

    def wakeups(self) -> AsyncIterator[None]:
        return self._store.wakeups()

    async def close(self) -> None:
        await self._store.close()

    @contextmanager
    def _timed(self, operation: str) -> Iterator[None]:
        started, has_failed = time.perf_counter(), True
        try:
            yield
            has_failed = False
        except (ConflictError, NotFoundError, VectorError):
            has_failed = False
            raise
        finally:
            self._observe(operation, time.perf_counter() - started, has_failed)
