"""A store in one SQLite file, shared by the server and the commands on one machine.

Write-ahead log with full synchronisation: a vector set whose `put_vectors` has returned survives
kill -9 and a power cut, and readers are not blocked by a writer.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steering.errors import StoreError, VectorError
from steering.stores.base import VectorRecord, record_of, unknown_id
from steering.vectors import Manifest, ShiftVectors

_SCHEMA_VERSION = 1
_SCHEMA = (
    """create table vectors (
        id text primary key, manifest text not null, data blob not null,
        sequence integer not null unique) strict""",
    """create table aliases (
        name text primary key, vector_id text not null references vectors(id)) strict""",
    f"pragma user_version = {_SCHEMA_VERSION}",
)
_BUSY_TIMEOUT_S = 30.0
_RETRY_S = 0.01


class SqliteStore:
    """One connection under one lock; other processes open the same file.

    Creates the file and its parent directories. Raises StoreError, naming the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"store {path}: {error.strerror or error}") from error
        with self._explained():
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        try:
            with self._explained():
                self._prepare()
        except StoreError:
            self._connection.close()
            raise

    def put_vectors(self, data: bytes) -> str:
        record = record_of(data)
        with self._transaction() as connection:
            connection.execute(
                "insert into vectors select ?, ?, ?, coalesce(max(sequence), 0) + 1 from vectors "
                "where true on conflict (id) do nothing",
                (record.id, json.dumps(record.manifest.as_dict()), data),
            )
        return record.id

    def get_vectors(self, vector_id: str) -> ShiftVectors:
        with self._reading() as connection:
            row = connection.execute(
                "select data from vectors where id = ?", (vector_id,)
            ).fetchone()
        if row is None:
            raise unknown_id(vector_id)
        try:
            return ShiftVectors.from_bytes(bytes(row[0]), expected_id=vector_id)
        except VectorError as error:
            raise VectorError(f"store {self.path}: {error}") from error

    def list_vectors(self) -> list[VectorRecord]:
        with self._reading() as connection:
            rows = connection.execute(
                "select id, manifest, length(data) from vectors order by sequence"
            ).fetchall()
        return [self._record(*row) for row in rows]

    def aliases(self) -> dict[str, str]:
        with self._reading() as connection:
            return dict(connection.execute("select name, vector_id from aliases").fetchall())

    def set_alias(self, name: str, vector_id: str) -> None:
        with self._transaction() as connection:
            known = connection.execute("select 1 from vectors where id = ?", (vector_id,))
            if known.fetchone() is None:
                raise unknown_id(vector_id)
            connection.execute(
                "insert into aliases values (?, ?) "
                "on conflict (name) do update set vector_id = excluded.vector_id",
                (name, vector_id),
            )

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _prepare(self) -> None:
        connection = self._connection
        self._begin_wal()
        connection.execute("pragma synchronous = full")
        connection.execute("pragma foreign_keys = on")
        connection.execute("begin immediate")
        try:
            (version,) = connection.execute("pragma user_version").fetchone()
            if version == 0:
                for statement in _SCHEMA:
                    connection.execute(statement)
            connection.execute("commit")
        finally:
            if connection.in_transaction:
                connection.execute("rollback")
        if version not in (0, _SCHEMA_VERSION):
            raise StoreError(
                f"store {self.path}: schema version {version}, this version of Deshift reads "
                f"{_SCHEMA_VERSION}"
            )

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
            raise StoreError(f"store {self.path}: {error}") from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._explained():
            yield self._connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and one writer at a time, from the first statement on."""
        with self._lock, self._explained():
            self._connection.execute("begin immediate")
            try:
                yield self._connection
                self._connection.execute("commit")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("rollback")
