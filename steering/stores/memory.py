"""A store in this process's memory, gone when it ends: for tests and trials."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence

from steering.stores.base import (
    AuditRecord,
    Changes,
    Document,
    VectorRecord,
    check_expected,
    record_of,
    unknown_id,
)
from steering.vectors import ShiftVectors


class MemoryStore:
    """Dictionaries; no method waits for anything while it changes them."""

    def __init__(self) -> None:
        self._vectors: dict[str, tuple[VectorRecord, bytes]] = {}
        self._epoch = ""
        self._documents: dict[str, Document] = {}
        self._audit: list[AuditRecord] = []
        self._replicas: dict[str, tuple[str, float]] = {}
        self._listeners: set[asyncio.Event] = set()

    async def put_vectors(self, data: bytes) -> str:
        record = record_of(data)
        self._vectors.setdefault(record.id, (record, data))
        return record.id

    async def get_vectors(self, vector_id: str) -> ShiftVectors:
        if vector_id not in self._vectors:
            raise unknown_id(vector_id)
        return ShiftVectors.from_bytes(self._vectors[vector_id][1], expected_id=vector_id)

    async def list_vectors(self) -> list[VectorRecord]:
        return [record for record, _ in self._vectors.values()]

    async def changes(self, since: int = 0) -> Changes:
        documents = tuple(each for each in self._documents.values() if each.revision > since)
        return Changes(self._epoch, len(self._audit), documents)

    async def get(self, keys: Sequence[str]) -> dict[str, Document]:
        found = {key: self._documents[key] for key in keys if key in self._documents}
        return {key: each for key, each in found.items() if each.value is not None}

    async def commit(
        self, writes: Mapping[str, str | None], expected: Mapping[str, int], audit: str
    ) -> int:
        check_expected(expected, {key: self._revision(key) for key in expected})
        revision = len(self._audit) + 1
        self._epoch = self._epoch or uuid.uuid4().hex
        self._documents.update(
            {key: Document(key, value, revision) for key, value in writes.items()}
        )
        self._audit.append(AuditRecord(revision, time.time(), audit))
        for listener in self._listeners:
            listener.set()
        return revision

    async def audit(self, limit: int, before: int | None = None) -> list[AuditRecord]:
        end = len(self._audit) if before is None else max(0, before - 1)
        return self._audit[max(0, end - limit) : end][::-1]

    async def heartbeat(self, replica: str, status: str, ttl_s: float) -> None:
        if status:
            self._replicas[replica] = (status, time.monotonic() + ttl_s)
        else:
            self._replicas.pop(replica, None)

    async def replicas(self) -> dict[str, str]:
        now = time.monotonic()
        return {name: status for name, (status, until) in self._replicas.items() if until > now}

    async def wakeups(self) -> AsyncIterator[None]:
        listener = asyncio.Event()
        self._listeners.add(listener)
        try:
            while True:
                yield
                await listener.wait()
                listener.clear()
        finally:
            self._listeners.discard(listener)

    async def close(self) -> None:
        return

    def _revision(self, key: str) -> int:
        document = self._documents.get(key)
        return 0 if document is None or document.value is None else document.revision
