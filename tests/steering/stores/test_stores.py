"""One suite for every store: vector sets, aliases, URLs (test_documents.py has the rest)."""

import asyncio
import json
from pathlib import Path

import pytest

from steering.errors import NotFoundError, StoreError, VectorError
from steering.stores import MemoryStore, RedisStore, SqliteStore, Store, open_store
from steering.stores.base import aliases, resolve
from tests.steering.samples import shift_vectors
from tests.steering.stores.conftest import Opener

pytestmark = pytest.mark.anyio

ONE, TWO = shift_vectors(1), shift_vectors(2)


async def activate(store: Store, alias: str, vector_id: str) -> None:
    await store.commit({f"alias/{alias}": json.dumps({"vector": vector_id})}, {}, "activated")


async def test_a_stored_set_comes_back_byte_for_byte_under_its_own_id(store: Store) -> None:
    assert await store.put_vectors(ONE.to_bytes()) == ONE.id
    assert (await store.get_vectors(ONE.id)).to_bytes() == ONE.to_bytes()


async def test_storing_a_set_again_changes_nothing(opener: Opener) -> None:
    store, other = opener(), opener()
    for vectors in (ONE, TWO, ONE):
        assert await store.put_vectors(vectors.to_bytes()) == vectors.id
    assert await other.put_vectors(ONE.to_bytes()) == ONE.id
    assert [record.id for record in await store.list_vectors()] == [ONE.id, TWO.id]


async def test_the_list_is_oldest_first_with_provenance_and_size(store: Store) -> None:
    assert await store.list_vectors() == []
    for vectors in (TWO, ONE):
        await store.put_vectors(vectors.to_bytes())
    records = await store.list_vectors()
    assert [record.id for record in records] == [TWO.id, ONE.id]
    assert records[0].manifest == TWO.manifest
    assert records[0].size_bytes == len(TWO.to_bytes())
    assert records[0].created_at == TWO.manifest.created_at


async def test_damaged_bytes_are_refused_and_not_kept(store: Store) -> None:
    data = bytearray(ONE.to_bytes())
    data[-1] ^= 1
    with pytest.raises(VectorError):
        await store.put_vectors(bytes(data))
    assert await store.list_vectors() == []


async def test_an_unknown_id_is_not_found(store: Store) -> None:
    with pytest.raises(NotFoundError, match=ONE.id):
        await store.get_vectors(ONE.id)


async def test_tasks_may_read_and_write_at_once(store: Store) -> None:
    async def work(data: bytes) -> None:
        for _ in range(3):
            vector_id = await store.put_vectors(data)
            await activate(store, "default", vector_id)
            assert (await store.get_vectors(vector_id)).to_bytes() == data
            assert "default" in await aliases(store)

    await asyncio.gather(*(work(shift_vectors(seed).to_bytes()) for seed in range(6)))
    assert len(await store.list_vectors()) == 6
    assert (await store.changes()).revision == 18


async def test_what_a_caller_does_to_the_answers_does_not_reach_the_store(store: Store) -> None:
    await store.commit({"a": "1"}, {}, "")
    (await store.get(["a"])).clear()
    (await store.audit(1)).clear()
    (await store.replicas())["x"] = "y"
    (await store.list_vectors()).append(None)  # type: ignore[arg-type]
    assert await store.get(["a"]) and await store.audit(1)
    assert (await store.replicas(), await store.list_vectors()) == ({}, [])


async def test_names_resolve_by_alias_id_and_start_of_id(store: Store) -> None:
    await store.put_vectors(ONE.to_bytes())
    await activate(store, "default", ONE.id)
    for name in ("default", ONE.id, ONE.id[:8]):
        assert await resolve(store, name) == ONE.id
    for name in (ONE.id[:7], TWO.id, "other", ""):
        with pytest.raises(NotFoundError, match="aliases: default; vector sets: 1"):
            await resolve(store, name)


async def test_an_alias_wins_over_the_start_of_an_id(store: Store) -> None:
    for vectors in (ONE, TWO):
        await store.put_vectors(vectors.to_bytes())
    await activate(store, ONE.id[:8], TWO.id)
    assert await resolve(store, ONE.id[:8]) == TWO.id


async def test_an_alias_that_cannot_be_read_is_named(store: Store) -> None:
    await store.commit({"alias/bad": "[]", "alias/gone": None}, {}, "")
    with pytest.raises(StoreError, match="alias/bad"):
        await aliases(store)


async def test_urls_choose_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_store("memory://"), MemoryStore)
    monkeypatch.chdir(tmp_path)
    for url, path in (("sqlite:///here.db", "here.db"), (f"sqlite:///{tmp_path}/abs.db", "abs.db")):
        store = open_store(url)
        assert isinstance(store, SqliteStore)
        await store.close()
        assert (tmp_path / path).is_file()
    for url in ("redis://h", "rediss://u:p@h:1/2", "redis+sentinel://h,h2:3/main"):
        assert isinstance(open_store(url), RedisStore)


@pytest.mark.parametrize(
    "url", ["mysql://me:secret@localhost/x", "sqlite://", "sqlite:///", "f.db"]
)
def test_other_urls_are_refused_with_the_ones_there_are(url: str) -> None:
    with pytest.raises(StoreError, match=r"sqlite:///path.*redis://.*memory://") as caught:
        open_store(url)
    assert "secret" not in str(caught.value)
