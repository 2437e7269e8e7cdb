"""The tables of a store's SQLite file, and how a file of the first version gets them.

Does not read or write what is kept in them (sqlite.py).
"""

import json
import sqlite3
import time
import uuid

from steering.errors import StoreError
from steering.stores.base import ALIAS_PREFIX

SCHEMA_VERSION = 2

_VECTORS = """create table vectors (
    id text primary key, manifest text not null, data blob not null,
    sequence integer not null unique) strict"""
# documents.value null: deleted by that revision. epoch has no row before the first commit.
_DOCUMENTS = (
    """create table documents (
        key text primary key, value text, revision integer not null) strict""",
    "create index documents_by_revision on documents (revision)",
    """create table audit (
        revision integer primary key, at real not null, entry text not null) strict""",
    """create table epoch (
        one integer primary key check (one = 1), value text not null) strict""",
    """create table replicas (
        name text primary key, status text not null, until real not null) strict""",
)


def prepare(connection: sqlite3.Connection) -> None:
    """Create the tables, or bring those of version 1 up to date; in the caller's transaction.

    Raises StoreError for a version that is not known here.
    """
    (version,) = connection.execute("pragma user_version").fetchone()
    if version == SCHEMA_VERSION:
        return
    if version not in (0, 1):
        raise StoreError(
            f"schema version {version}, this version of Deshift reads {SCHEMA_VERSION}"
        )
    if version == 0:
        connection.execute(_VECTORS)
    for statement in _DOCUMENTS:
        connection.execute(statement)
    if version == 1:
        _aliases_to_documents(connection)
    connection.execute(f"pragma user_version = {SCHEMA_VERSION}")


def commit(
    connection: sqlite3.Connection, revision: int, writes: dict[str, str | None], audit: str
) -> None:
    """Write documents as one revision, in the caller's transaction."""
    connection.execute("insert or ignore into epoch values (1, ?)", (uuid.uuid4().hex,))
    connection.executemany(
        "insert into documents values (?, ?, ?) on conflict (key) do update "
        "set value = excluded.value, revision = excluded.revision",
        [(key, value, revision) for key, value in writes.items()],
    )
    connection.execute("insert into audit values (?, ?, ?)", (revision, time.time(), audit))


def _aliases_to_documents(connection: sqlite3.Connection) -> None:
    """Version 1 had a table of aliases and no audit: the record says where they come from."""
    aliases = connection.execute("select name, vector_id from aliases order by name").fetchall()
    documents = {f"{ALIAS_PREFIX}{name}": {"vector": vector_id} for name, vector_id in aliases}
    connection.execute("drop table aliases")
    if not documents:
        return
    entry = {
        "by": "deshift",
        "via": "setup",
        "reason": "the file's aliases were brought into the present form",
        "action": "migrate",
        "changes": [
            {"key": key, "before": None, "after": value} for key, value in documents.items()
        ],
    }
    texts: dict[str, str | None] = {key: json.dumps(value) for key, value in documents.items()}
    commit(connection, 1, texts, json.dumps(entry))
