"""One suite for every store."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest

from steering.errors import ConflictError, NotFoundError, StoreError, VectorError
from steering.stores import MemoryStore, RedisStore, SqliteStore, Store, open_store
from steering.stores.base import Document, aliases, resolve
from tests.steering.samples import shift_vectors

pytestmark = pytest.mark.anyio

ONE, TWO = shift_vectors(1), shift_vectors(2)


class Opener:
    """Opens a store's data again and again, as several processes would."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._opened: list[Store] = []

    def __call__(self) -> Store:
        if self._url == "memory://" and self._opened:
            return self._opened[0]  # nobody else can reach this process's memory
        self._opened.append(open_store(self._url))
        return self._opened[-1]

    async def close(self) -> None:
        for store in self._opened:
            await store.close()


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def opener(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Opener]:
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").url()
    else:
        url = {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/a/b/store.db"}[request.param]
    opener = Opener(url)
    yield opener
    await opener.close()


@pytest.fixture
def store(opener: Opener) -> Store:
    return opener()


async def activate(store: Store, alias: str, vector_id: str) -> None:
    await store.commit({f"alias/{alias}": json.dumps({"vector": vector_id})}, {}, "activated")


def documents(changes: Any) -> dict[str, tuple[str | None, int]]:
    return {each.key: (each.value, each.revision) for each in changes.documents}


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


async def test_a_new_store_has_no_epoch_no_revision_and_nothing(store: Store) -> None:
    changes = await store.changes()
    assert (changes.epoch, changes.revision, changes.documents) == ("", 0, ())
    assert await store.get(["a"]) == {}
    assert await store.audit(10) == []
    assert await store.replicas() == {}


async def test_a_commit_writes_all_its_documents_under_one_revision(opener: Opener) -> None:
    store, other = opener(), opener()
    assert await store.commit({"a": "1", "b": ""}, {"a": 0, "b": 0}, "first") == 1
    assert await store.commit({"b": "2 \nü"}, {"a": 1, "b": 1}, "second") == 2
    changes = await other.changes()
    assert changes.revision == 2
    assert documents(changes) == {"a": ("1", 1), "b": ("2 \nü", 2)}
    assert await other.get(["b", "none", "a", "a"]) == {
        "a": Document("a", "1", 1),
        "b": Document("b", "2 \nü", 2),
    }


async def test_changes_are_those_since_a_revision_and_no_others(store: Store) -> None:
    for number in range(1, 6):
        await store.commit({f"d{number}": "x", "often": str(number)}, {}, "")
    for since in range(6):
        wanted = {f"d{number}": ("x", number) for number in range(since + 1, 6)}
        if since < 5:
            wanted["often"] = ("5", 5)
        changes = await store.changes(since)
        assert (changes.revision, documents(changes)) == (5, wanted)
    assert (await store.changes(99)).documents == ()


async def test_a_deleted_document_is_told_once_and_can_be_made_anew(store: Store) -> None:
    await store.commit({"a": "1", "b": "1"}, {}, "")
    await store.commit({"a": None}, {"a": 1}, "")
    assert documents(await store.changes(1)) == {"a": (None, 2)}
    assert documents(await store.changes()) == {"a": (None, 2), "b": ("1", 1)}
    assert documents(await store.changes(2)) == {}
    assert set(await store.get(["a", "b"])) == {"b"}
    await store.commit({"a": "2"}, {"a": 0}, "")  # a deleted one is at revision 0
    assert documents(await store.changes(2)) == {"a": ("2", 3)}


async def test_a_commit_on_something_that_changed_is_refused_whole(opener: Opener) -> None:
    store, other = opener(), opener()
    await store.commit({"a": "1", "b": "1", "gone": "1"}, {}, "")
    await other.commit({"a": "2", "gone": None}, {}, "")
    with pytest.raises(ConflictError, match="a is at revision 2, not 1") as caught:
        await store.commit({"b": "x"}, {"a": 1, "b": 1, "gone": 1}, "never")
    assert caught.value.revisions == {"a": 2, "gone": 0}
    with pytest.raises(ConflictError):
        await store.commit({"a": "x"}, {"a": 0}, "never")
    assert documents(await store.changes()) == {"a": ("2", 2), "b": ("1", 1), "gone": (None, 2)}
    assert [record.entry for record in await store.audit(9)] == ["", ""]


async def test_of_two_writers_at_once_one_is_told_of_the_conflict(opener: Opener) -> None:
    one, two = opener(), opener()
    for number in range(5):
        revision = await one.commit({"a": f"start {number}"}, {}, "")
        answers = await asyncio.gather(
            one.commit({"a": "one"}, {"a": revision}, "one"),
            two.commit({"a": "two"}, {"a": revision}, "two"),
            return_exceptions=True,
        )
        conflicts = [answer for answer in answers if isinstance(answer, ConflictError)]
        assert len(conflicts) == 1 and conflicts[0].revisions == {"a": revision + 1}
        winner = "one" if conflicts[0] is answers[1] else "two"
        assert documents(await one.changes())["a"] == (winner, revision + 1)


async def test_commits_of_several_instances_at_once_lose_nothing(opener: Opener) -> None:
    async def work(store: Store, name: str) -> list[int]:
        return [await store.commit({f"{name}{n}": name}, {}, f"{name}{n}") for n in range(10)]

    stores = {name: opener() for name in "abc"}
    given = await asyncio.gather(*(work(store, name) for name, store in stores.items()))
    assert sorted(sum(given, [])) == list(range(1, 31))
    changes = await opener().changes()
    assert changes.revision == 30 and len(changes.documents) == 30
    by_revision = {each.revision: each.key for each in changes.documents}
    records = await opener().audit(100)
    assert {record.revision: record.entry for record in records} == by_revision


async def test_the_epoch_comes_with_the_first_commit_and_stays(opener: Opener) -> None:
    store, other = opener(), opener()
    await store.put_vectors(ONE.to_bytes())
    assert (await store.changes()).epoch == ""
    await asyncio.gather(store.commit({"a": "1"}, {}, ""), other.commit({"b": "1"}, {}, ""))
    epoch = (await store.changes()).epoch
    assert len(epoch) == 32
    await store.commit({"a": "2"}, {}, "")
    assert (await other.changes(3)).epoch == epoch


async def test_the_audit_has_every_commit_newest_first_page_by_page(store: Store) -> None:
    for number in range(1, 8):
        await store.commit({"a": str(number)}, {}, f"entry {number} ü\n")
    assert await store.commit({}, {}, "nothing written") == 8
    whole = await store.audit(100)
    assert [record.revision for record in whole] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert whole[0].entry == "nothing written" and whole[7].entry == "entry 1 ü\n"
    times = [record.at for record in whole]
    assert times == sorted(times, reverse=True)
    paged, before = [], None
    while page := await store.audit(3, before):
        paged += page
        before = page[-1].revision
    assert paged == whole
    assert await store.audit(0) == []
    assert await store.audit(5, before=1) == []


async def first_wakeup(store: Store, listening: asyncio.Event) -> None:
    """Ends with a wake-up that comes after the one for listening."""
    async with aclosing(store.wakeups()) as wakeups:  # type: ignore[type-var]
        await anext(wakeups)
        listening.set()
        await anext(wakeups)


async def test_a_commit_wakes_every_instance_within_a_second(opener: Opener) -> None:
    store, other = opener(), opener()
    await store.commit({"a": "0"}, {}, "")
    for writer in (store, other):
        events = [asyncio.Event(), asyncio.Event()]
        tasks = [
            asyncio.create_task(first_wakeup(each, event))
            for each, event in zip((store, other), events, strict=True)
        ]
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in events)), 5)
        await asyncio.sleep(0.12)
        assert not any(task.done() for task in tasks)  # silence wakes nobody
        await writer.commit({"a": "1"}, {}, "")
        await asyncio.wait_for(asyncio.gather(*tasks), 1)


async def test_a_listener_that_is_cancelled_leaves_the_store_usable(store: Store) -> None:
    listening = asyncio.Event()
    task = asyncio.create_task(first_wakeup(store, listening))
    await asyncio.wait_for(listening.wait(), 5)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert await store.commit({"a": "1"}, {}, "") == 1


async def test_heartbeats_last_as_long_as_they_say(opener: Opener) -> None:
    store, other = opener(), opener()
    await store.heartbeat("one", '{"alpha": 1}', 60)
    await other.heartbeat("two", "short", 0.15)
    await other.heartbeat("three", "x", 60)
    await other.heartbeat("three", "y ü", 60)
    assert await store.replicas() == {"one": '{"alpha": 1}', "two": "short", "three": "y ü"}
    await asyncio.sleep(0.2)
    assert await store.replicas() == {"one": '{"alpha": 1}', "three": "y ü"}
    await store.heartbeat("one", "", 60)
    await store.heartbeat("never there", "", 60)
    assert await other.replicas() == {"three": "y ü"}
    assert (await store.changes()).revision == 0


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


async def test_a_reader_never_sees_half_a_commit(opener: Opener) -> None:
    store, other = opener(), opener()
    await store.commit({"a": "0", "b": "0"}, {}, "")

    async def write() -> None:
        for number in range(1, 30):
            await store.commit({"a": str(number), "b": str(number)}, {}, "")

    writer = asyncio.create_task(write())
    while not writer.done():
        held = documents(await other.changes(0))
        assert held["a"] == held["b"]
        await asyncio.sleep(0)  # the store in memory waits for nothing
    await writer


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
