"""A store in one SQLite file, shared by the server and the commands on one machine.

Write-ahead log with full synchronisation: what a method has reported as written survives kill -9
and a power cut, and readers are not blocked by a writer. Every call runs in a thread, so that a
slow disk or another process's write does not stop the event loop.
"""

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from steering.errors import ReadOnlyError, StoreError, VectorError
from steering.stores import sqlite_schema
from steering.stores.base import (
    AuditRecord,
    Changes,
    Document,
    VectorRecord,
    check_expected,
    record_of,
    unknown_id,
)
from steering.vectors import Manifest, ShiftVectors

_BUSY_TIMEOUT_S = 30.0
_RETRY_S = 0.01
_POLL_S = 0.05
_NEWEST = "select coalesce(max(revision), 0) from audit"
T = TypeVar("T")


class SqliteStore:
    """One connection under one lock; other processes open the same file.

    Creates the file and its parent directories. Raises StoreError, naming the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()  # a cancelled call's thread still has the connection
        self._num_commits = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"store {path}: {error.strerror or error}") from error
        with self._explained():
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        try:
            self._prepare()
        except StoreError:
            self._connection.close()
            raise

    async def put_vectors(self, data: bytes) -> str:
        return await asyncio.to_thread(self._put_vectors, data)

    async def get_vectors(self, vector_id: str) -> ShiftVectors:
        return await asyncio.to_thread(self._get_vectors, vector_id)

    async def list_vectors(self) -> list[VectorRecord]:
        rows = await self._rows("select id, manifest, length(data) from vectors order by sequence")
        return [self._record(*row) for row in rows]

    async def changes(self, since: int = 0) -> Changes:
        def read(connection: sqlite3.Connection) -> Changes:
            epoch = connection.execute("select value from epoch").fetchone()
            (revision,) = connection.execute(_NEWEST).fetchone()
            rows = connection.execute(
                "select key, value, revision from documents where revision > ? order by revision",
                (since,),
            )
            return Changes(epoch[0] if epoch else "", revision, tuple(Document(*r) for r in rows))

        return await self._in_transaction(read, begin="begin")

    async def get(self, keys: Sequence[str]) -> dict[str, Document]:
        rows = await self._rows(
            "select key, value, revision from documents where value is not null and key in "
            "(select value from json_each(?))",
            json.dumps(list(keys)),
        )
        return {row[0]: Document(*row) for row in rows}

    async def commit(
        self, writes: Mapping[str, str | None], expected: Mapping[str, int], audit: str
    ) -> int:
        def write(connection: sqlite3.Connection) -> int:
            rows = connection.execute(
                "select key, revision from documents where value is not null and key in "
                "(select value from json_each(?))",
                (json.dumps(list(expected)),),
            )
            check_expected(expected, dict.fromkeys(expected, 0) | dict(rows.fetchall()))
            revision = int(connection.execute(_NEWEST).fetchone()[0]) + 1
            sqlite_schema.commit(connection, revision, dict(writes), audit)
            return revision

        revision = await self._in_transaction(write)
        self._num_commits += 1
        return revision

    async def audit(self, limit: int, before: int | None = None) -> list[AuditRecord]:
        rows = await self._rows(
            "select revision, at, entry from audit where ?1 is null or revision < ?1 "
            "order by revision desc limit ?2",
            before,
            max(0, limit),
        )
        return [AuditRecord(*row) for row in rows]

    async def heartbeat(self, replica: str, status: str, ttl_s: float) -> None:
        def write(connection: sqlite3.Connection) -> None:
            now = time.time()  # other processes compare with it, so no monotonic clock will do
            connection.execute("delete from replicas where name = ? or until <= ?", (replica, now))
            if status:
                connection.execute(
                    "insert into replicas values (?, ?, ?)", (replica, status, now + ttl_s)
                )

        await self._in_transaction(write)

    async def replicas(self) -> dict[str, str]:
        rows = await self._rows(
            "select name, status from replicas where until > ? order by name", time.time()
        )
        return dict(rows)

    async def wakeups(self) -> AsyncIterator[None]:
        """SQLite tells nobody of a commit, but says cheaply whether another connection made one."""
        seen = None
        while True:
            ((version,),) = await self._rows("pragma data_version")
            now = (version, self._num_commits)
            if now != seen:
                seen = now
                yield
            await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        def close() -> None:
            with self._lock:
                self._connection.close()

        await asyncio.to_thread(close)

    def _put_vectors(self, data: bytes) -> str:
        record = record_of(data)
        with self._transaction() as connection:
            # Bytes that a disk has damaged since are mended by the same set, put again.
            connection.execute(
                "insert into vectors select ?, ?, ?, coalesce(max(sequence), 0) + 1 from vectors "
                "where true on conflict (id) do update set manifest = excluded.manifest, "
                "data = excluded.data",
                (record.id, json.dumps(record.manifest.as_dict()), data),
            )
        return record.id

    def _get_vectors(self, vector_id: str) -> ShiftVectors:
        with self._lock, self._explained():
            row = self._connection.execute(
                "select data from vectors where id = ?", (vector_id,)
            ).fetchone()
        if row is None:
            raise unknown_id(vector_id)
        try:
            return ShiftVectors.from_bytes(bytes(row[0]), expected_id=vector_id)
        except VectorError as error:
            raise VectorError(f"store {self.path}: {error}") from error

    async def _rows(self, statement: str, *values: Any) -> list[Any]:
        def read() -> list[Any]:
            with self._lock, self._explained():
                return self._connection.execute(statement, values).fetchall()

        return await asyncio.to_thread(read)

    async def _in_transaction(
        self, work: Callable[[sqlite3.Connection], T], begin: str = "begin immediate"
    ) -> T:
        def run() -> T:
            with self._transaction(begin) as connection:
                return work(connection)

        return await asyncio.to_thread(run)

    def _prepare(self) -> None:
        with self._explained():
            self._begin_wal()
            self._connection.execute("pragma synchronous = full")
        with self._transaction() as connection:
            try:
                sqlite_schema.prepare(connection)
            except StoreError as error:
                raise StoreError(f"store {self.path}: {error}") from None

    def _begin_wal(self) -> None:
        """Turn the write-ahead log on. Of several processes that create the file at once, SQLite
        tells all but one that it is locked, without waiting its busy timeout: so wait here."""
        deadline = time.monotonic() + _BUSY_TIMEOUT_S
        while True:
            try:
                self._connection.execute("pragma journal_mode = wal")
                return
            except sqlite3.OperationalError as error:
                is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not is_busy or time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_S)

    def _record(self, vector_id: str, manifest: str, size_bytes: int) -> VectorRecord:
        try:
            return VectorRecord(vector_id, Manifest.from_dict(json.loads(manifest)), size_bytes)
        except (ValueError, VectorError) as error:
            raise StoreError(
                f"store {self.path}: the manifest of {vector_id[:12]} is damaged: {error}"
            ) from error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)
            kind = ReadOnlyError if code & 0xFF == sqlite3.SQLITE_READONLY else StoreError
            raise kind(f"store {self.path}: {error}") from error

    @contextmanager
    def _transaction(self, begin: str = "begin immediate") -> Iterator[sqlite3.Connection]:
        """All or nothing; `begin immediate` also lets one writer in at a time."""
        with self._lock, self._explained():
            self._connection.execute(begin)
            try:
                yield self._connection
                self._connection.execute("commit")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("rollback")
