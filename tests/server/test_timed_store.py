"""A store that is timed: what is told of which call, and what counts as a failure."""

import asyncio
from collections.abc import Sequence

import pytest

from server.timed_store import TimedStore
from steering.errors import ConflictError, NotFoundError, StoreError, VectorError
from steering.stores.base import Changes, Document
from steering.stores.memory import MemoryStore
from tests.server.fakes import make_vectors


class Told:
    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.seconds: list[float] = []

    def __call__(self, operation: str, seconds: float, has_failed: bool) -> None:
        self.calls.append((operation, has_failed))
        self.seconds.append(seconds)


class LostStore(MemoryStore):
    async def changes(self, since: int = 0) -> Changes:
        raise StoreError(f"gone at {since}")

    async def replicas(self) -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError("it never ends")

    async def get(self, keys: Sequence[str]) -> dict[str, Document]:
        raise OSError(f"no room for {keys}")


@pytest.mark.anyio
async def test_every_call_reaches_the_store_and_is_told_once() -> None:
    told, inner = Told(), MemoryStore()
    store = TimedStore(inner, told)
    vectors = make_vectors()
    assert await store.put_vectors(vectors.to_bytes()) == vectors.id
    assert (await store.get_vectors(vectors.id)).id == vectors.id
    assert [each.id for each in await store.list_vectors()] == [vectors.id]
    assert await store.commit({"a": "1"}, {"a": 0}, "{}") == 1
    assert (await store.changes(0)).revision == 1
    assert (await store.get(["a"]))["a"].value == "1"
    assert [each.revision for each in await store.audit(5)] == [1]
    await store.heartbeat("r", "well", 5)
    assert await store.replicas() == {"r": "well"}
    assert told.calls == [
        (name, False)
        for name in (
            *("vectors", "vectors", "vectors", "commit", "read", "read", "audit"),
            *("heartbeat", "replicas"),
        )
    ]
    assert min(told.seconds) > 0


@pytest.mark.anyio
async def test_an_answer_that_says_no_is_no_failure_of_the_store() -> None:
    told = Told()
    store = TimedStore(MemoryStore(), told)
    with pytest.raises(NotFoundError):
        await store.get_vectors("f" * 64)
    with pytest.raises(VectorError):
        await store.put_vectors(b"no vectors")
    await store.commit({"a": "1"}, {}, "{}")
    with pytest.raises(ConflictError):
        await store.commit({"a": "2"}, {"a": 0}, "{}")
    assert told.calls == [
        *(("vectors", False), ("vectors", False)),
        *(("commit", False), ("commit", False)),
    ]


@pytest.mark.anyio
async def test_a_call_that_fails_or_does_not_end_in_time_is_told_as_failed() -> None:
    told = Told()
    store = TimedStore(LostStore(), told)
    with pytest.raises(StoreError, match="gone at 7"):
        await store.changes(7)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await store.replicas()
    with pytest.raises(OSError, match="no room"):  # a mistake of ours that is no StoreError
        await store.get(["a"])
    assert told.calls == [("read", True), ("replicas", True), ("read", True)]


@pytest.mark.anyio
async def test_wakeups_pass_through_untimed() -> None:
    told = Told()
    store = TimedStore(MemoryStore(), told)
    wakeups = store.wakeups()
    await anext(aiter(wakeups))
    assert told.calls == []
    await store.close()
