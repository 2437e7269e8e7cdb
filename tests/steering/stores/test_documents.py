"""One suite for every store: documents, revisions, audit, wake-ups, heartbeats."""

import asyncio
from contextlib import aclosing, suppress

import pytest

from steering.errors import ConflictError
from steering.stores import Store
from steering.stores.base import Changes, Document
from tests.steering.samples import shift_vectors
from tests.steering.stores.conftest import Opener

pytestmark = pytest.mark.anyio

ONE = shift_vectors(1)


def documents(changes: Changes) -> dict[str, tuple[str | None, int]]:
    return {each.key: (each.value, each.revision) for each in changes.documents}


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
