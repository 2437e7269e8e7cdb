"""A file of an older version, and one of a version that is not known."""

import json
import sqlite3
from pathlib import Path

import pytest

from steering.errors import StoreError
from steering.stores import SqliteStore
from steering.stores.base import aliases
from tests.steering.samples import shift_vectors

pytestmark = pytest.mark.anyio

ONE = shift_vectors()
VERSION_1 = (
    """create table vectors (
        id text primary key, manifest text not null, data blob not null,
        sequence integer not null unique) strict""",
    """create table aliases (
        name text primary key, vector_id text not null references vectors(id)) strict""",
    "pragma user_version = 1",
)


def alter(path: Path, *statements: str, values: tuple[object, ...] = ()) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement, values)
    connection.commit()
    connection.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def old(path: Path) -> Path:
    """As version 1 left it: a set, and two aliases of it."""
    alter(path, *VERSION_1)
    row = (ONE.id, json.dumps(ONE.manifest.as_dict()), ONE.to_bytes(), 1)
    alter(path, "insert into vectors values (?, ?, ?, ?)", values=row)
    for name in ("default", "spare"):
        alter(path, "insert into aliases values (?, ?)", values=(name, ONE.id))
    return path


async def test_version_1_becomes_documents_with_a_record_of_where_they_come_from(old: Path) -> None:
    store = SqliteStore(old)
    changes = await store.changes()
    assert (len(changes.epoch), changes.revision) == (32, 1)
    assert await aliases(store) == {"default": ONE.id, "spare": ONE.id}
    assert (await store.get_vectors(ONE.id)).to_bytes() == ONE.to_bytes()
    assert [record.id for record in await store.list_vectors()] == [ONE.id]
    (record,) = await store.audit(9)
    entry = json.loads(record.entry)
    assert (entry["action"], entry["by"], entry["via"]) == ("migrate", "deshift", "setup")
    assert "present form" in entry["reason"]
    assert entry["changes"] == [
        {"key": f"alias/{name}", "before": None, "after": {"vector": ONE.id}}
        for name in ("default", "spare")
    ]
    await store.close()
    again = SqliteStore(old)
    assert await again.changes() == changes
    await again.close()


async def test_version_1_without_an_alias_has_nothing_to_bring_over(path: Path) -> None:
    alter(path, *VERSION_1)
    store = SqliteStore(path)
    assert (await store.changes()).revision == 0
    assert await store.audit(9) == []
    await store.close()


def test_a_migration_that_fails_half_way_leaves_version_1_as_it_was(old: Path) -> None:
    alter(old, "create view audit as select 1")  # in the way of the last but two table
    with pytest.raises(StoreError, match=f"{old}: .*audit"):
        SqliteStore(old)
    connection = sqlite3.connect(old)
    assert connection.execute("pragma user_version").fetchone() == (1,)
    tables = connection.execute("select name from sqlite_master where type = 'table'").fetchall()
    connection.close()
    assert {name for (name,) in tables} == {"vectors", "aliases"}


def test_a_schema_of_another_version_is_refused(path: Path) -> None:
    alter(path, "pragma user_version = 7")
    with pytest.raises(StoreError, match=f"{path}: schema version 7"):
        SqliteStore(path)
