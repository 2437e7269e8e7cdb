"""A replica follows its store, whatever happens to the store or to what it announces."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server import sync as module
from server.control import Control
from server.errors import AuthenticationError, InvalidRequestError
from steering.errors import ConflictError, StoreError
from steering.stores import MemoryStore
from steering.stores.base import ALIAS_PREFIX, Changes
from steering.vectors import ShiftVectors
from tests.server.fakes import AUTHOR, make_vectors, publish
from tests.server.replicas import Replica, make_replica, replica_of, set_alpha, until

pytestmark = pytest.mark.anyio


class FaultyStore(MemoryStore):
    """A store that fails, hangs, says nothing or forgets, on command."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.listen_error: Exception | None = None
        self.is_silent = False
        self.is_hanging = False
        self.vectors_gate: asyncio.Event | None = None
        self.num_reads = 0

    async def changes(self, since: int = 0) -> Changes:
        self.num_reads += 1
        if self.is_hanging:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return await super().changes(since)

    async def get_vectors(self, vector_id: str) -> ShiftVectors:
        if self.vectors_gate is not None:
            await self.vectors_gate.wait()
        return await super().get_vectors(vector_id)

    async def wakeups(self) -> AsyncIterator[None]:
        if self.listen_error is not None:
            raise self.listen_error
        async for _ in super().wakeups():
            if not self.is_silent:
                yield
            if self.listen_error is not None:
                raise self.listen_error

    def become(self, other: MemoryStore) -> None:
        """Hold the data of another store from now on, without a word."""
        self._epoch, self._documents, self._audit = other._epoch, other._documents, other._audit
        self._vectors = other._vectors

    def copy(self) -> MemoryStore:
        copy = MemoryStore()
        copy._epoch, copy._documents, copy._audit = (
            self._epoch,
            dict(self._documents),
            list(self._audit),
        )
        copy._vectors = dict(self._vectors)
        return copy


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore()


async def test_what_the_store_has_is_in_force_and_changes_follow_at_once(
    store: FaultyStore,
) -> None:
    await publish(store)
    await set_alpha(store, 0.25)
    async with replica_of(store) as replica:
        assert replica.alpha() == 0.25
        revision = await set_alpha(store, 0.75)
        await until(lambda: replica.alpha() == 0.75)
        status = replica.sync.status
        assert (status.store, status.problem, status.revision) == ("ok", None, revision)
        assert status.epoch == (await store.changes()).epoch
        assert status.age_s is not None and 0 <= status.age_s < 10
        await until(lambda: replica.vector() == make_vectors().id)


async def test_a_policy_is_in_force_before_any_vectors_are_read(store: FaultyStore) -> None:
    first = await publish(store)
    await set_alpha(store, 0.25)
    async with replica_of(store) as replica:
        await until(lambda: replica.vector() == first)
        store.vectors_gate = asyncio.Event()
        second = make_vectors(0.25).id
        await store.put_vectors(make_vectors(0.25).to_bytes())
        await store.commit({f"{ALIAS_PREFIX}default": f'{{"vector": "{second}"}}'}, {}, "{}")
        await set_alpha(store, 0.75)
        await until(lambda: replica.alpha() == 0.75)
        assert replica.vector() == first, "kept until the new one has come"
        store.vectors_gate.set()
        await until(lambda: replica.vector() == second)


async def test_a_lost_message_heals_within_the_interval(store: FaultyStore) -> None:
    await set_alpha(store, 0.25)
    async with replica_of(store, interval_s=0.05) as replica:
        await until(lambda: replica.alpha() == 0.25)
        store.is_silent = True
        await set_alpha(store, 0.75)
        assert replica.alpha() == 0.25
        await until(lambda: replica.alpha() == 0.75)


async def test_a_store_that_may_be_read_and_not_heard_is_followed_by_the_interval(
    store: FaultyStore,
) -> None:
    store.listen_error = StoreError("no permission to subscribe")
    await set_alpha(store, 0.25)
    async with replica_of(store, interval_s=0.05) as replica:
        await until(lambda: replica.sync.status.problem)
        status = replica.sync.status
        assert status.store == "ok" and "not announced" in str(status.problem)
        await set_alpha(store, 0.75)
        await until(lambda: replica.alpha() == 0.75)
        store.listen_error = None
        await until(lambda: replica.sync.status.problem is None)


async def test_a_lost_store_leaves_the_last_good_documents_and_is_taken_up_again(
    store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "deshift.sync")
    await set_alpha(store, 0.25)
    async with replica_of(store, interval_s=0.05) as replica:
        confirmed = replica.sync.status.synced_at
        store.error = store.listen_error = StoreError("no route to the store")
        await set_alpha(store, 0.75)
        await until(lambda: replica.sync.status.store == "unreachable")
        num_reads = store.num_reads
        await until(lambda: store.num_reads > num_reads + 3)
        status = replica.sync.status
        assert (replica.alpha(), status.problem) == (0.25, "no route to the store")
        assert status.age_s is not None and status.age_s > 0.1
        assert confirmed is not None and status.synced_at is not None
        store.error = store.listen_error = None
        await until(lambda: replica.alpha() == 0.75)
        assert replica.sync.status.store == "ok"
        assert replica.sync.status.synced_at != confirmed
    said = [record.levelname for record in caplog.records if record.name == "deshift.sync"]
    # In step; not heard, unreachable; heard again, in step: each change of state once.
    assert said == ["INFO", "WARNING", "WARNING", "INFO", "INFO"]


async def test_a_store_that_hangs_is_unreachable_and_holds_up_nothing(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READ_TIMEOUT_S", 0.05)
    store.is_hanging = True
    async with replica_of(store, interval_s=0.05) as replica:
        status = replica.sync.status
        assert (status.store, status.age_s) == ("unreachable", None)
        assert "did not answer" in str(status.problem) and not replica.directory.is_synced
        store.is_hanging = False
        await until(lambda: replica.sync.status.store == "ok")
        assert replica.directory.is_synced


async def test_whoever_can_listen_again_looks_at_what_was_missed(store: FaultyStore) -> None:
    await set_alpha(store, 0.25)
    async with replica_of(store) as replica:
        await until(lambda: store._listeners)
        store.listen_error = StoreError("connection lost")
        await set_alpha(store, 0.5)  # ends the listening
        await until(lambda: not store._listeners)
        store.listen_error = None
        await until(lambda: store._listeners)
        await until(lambda: replica.alpha() == 0.5)
        await set_alpha(store, 0.75)
        assert await until(lambda: replica.alpha() == 0.75) < 1


@pytest.mark.parametrize("kind", [ZeroDivisionError, StoreError, TimeoutError])
async def test_nothing_that_a_store_raises_ends_the_following(
    store: FaultyStore, kind: type[Exception]
) -> None:
    store.error = store.listen_error = kind("bees")
    async with replica_of(store) as replica:
        assert replica.sync.status.store == "unreachable"
        store.error = store.listen_error = None
        await set_alpha(store, 0.75)
        await until(lambda: replica.directory.is_synced and replica.alpha() == 0.75)


async def test_looking_anew_at_everything_does_not_apply_it_all_again(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await set_alpha(store, 0.25)
    replica = make_replica(store)
    await replica.sync.look()
    applied: list[Any] = []
    monkeypatch.setattr(replica.directory, "apply", lambda *changes: applied.append(changes))
    store.error = StoreError("away")
    await replica.sync.look()
    store.error = None
    await replica.sync.look()
    await replica.sync.look()
    assert replica.sync.status.store == "ok" and not applied


async def test_an_emptied_store_changes_nothing_whatever_is_written_into_it(
    store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    """One alias, written into an emptied Redis, would have taken away every tenant's policy."""
    old = await publish(store)
    await set_alpha(store, 0.75)
    async with replica_of(store, interval_s=0.02) as replica:
        await until(lambda: replica.vector() == old)
        store.become(MemoryStore())
        await until(lambda: replica.sync.status.store == "foreign")
        assert "empty" in str(replica.sync.status.problem)
        await publish(store, 0.25)
        await set_alpha(store, 0.1)
        await until(lambda: "other data" in str(replica.sync.status.problem))
        num_reads = store.num_reads
        await until(lambda: store.num_reads > num_reads + 3)
        assert (replica.alpha(), replica.vector()) == (0.75, old)
        assert replica.directory.revision == replica.sync.status.revision == 2
    warnings = [record for record in caplog.records if "foreign" in record.getMessage()]
    assert len(warnings) == 1


async def test_the_known_data_that_come_back_are_followed_again(store: FaultyStore) -> None:
    await set_alpha(store, 0.25)
    async with replica_of(store, interval_s=0.02) as replica:
        kept = store.copy()
        store.become(MemoryStore())
        await until(lambda: replica.sync.status.store == "foreign")
        store.become(kept)
        await set_alpha(store, 0.75)
        await until(lambda: replica.sync.status.store == "ok")
        assert replica.alpha() == 0.75


async def test_a_store_that_lost_the_newest_changes_is_foreign_also_when_it_counts_on(
    store: FaultyStore,
) -> None:
    """A failover may lose commits; the next ones take their revisions and hid the loss."""
    await set_alpha(store, 0.25)
    older = store.copy()
    await set_alpha(store, 0.75)
    async with replica_of(store, interval_s=0.02) as replica:
        assert replica.alpha() == 0.75
        store.error = StoreError("failing over")
        await until(lambda: replica.sync.status.store == "unreachable")
        store.become(older)
        for alpha in (0.4, 0.5):
            await set_alpha(store, alpha, "other")
        store.error = None
        await until(lambda: replica.sync.status.store == "foreign")
        assert "lost changes" in str(replica.sync.status.problem) and replica.alpha() == 0.75


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_store_that_is_exchanged_between_two_reads_is_noticed_by_the_lost_listening(
    store: FaultyStore, when: str
) -> None:
    """No read fails: the next one would have taken the newest of the other's changes for ours."""
    await set_alpha(store, 0.25)
    older = store.copy()
    await set_alpha(store, 0.75)
    for alpha in (0.4, 0.5):
        await set_alpha(older, alpha, "other")
    async with replica_of(store) as replica:
        await asyncio.sleep(0.05)  # it listens, and has looked after that
        store.is_silent, store.listen_error = True, StoreError("connection lost")
        if when == "before":
            store.become(older)
        for listener in store._listeners:
            listener.set()
        await until(lambda: not store._listeners)
        if when == "after":
            await until(lambda: "not announced" in str(replica.sync.status.problem))
            num_reads = store.num_reads
            await until(lambda: store.num_reads > num_reads)
            store.become(older)
            store.is_silent, store.listen_error = False, None
        await until(lambda: replica.sync.status.store == "foreign")
        assert replica.alpha() == 0.75 and replica.directory.num_tenants == 1


async def foreign_fleet(store: FaultyStore, replicas: list[Replica]) -> None:
    store.become(MemoryStore())
    await until(lambda: all(each.sync.status.store == "foreign" for each in replicas))


async def test_an_operator_lets_other_data_succeed_for_the_whole_fleet(
    store: FaultyStore,
) -> None:
    await set_alpha(store, 0.25)
    await set_alpha(store, 0.25, "gone")
    async with replica_of(store, 0.02) as one, replica_of(store, 0.02) as two:
        await foreign_fleet(store, [one, two])
        new = await publish(store, 0.25)
        await set_alpha(store, 0.75)
        revision = await Control(store).adopt(one.sync.adoption(), AUTHOR)
        for replica in (one, two):
            await until(lambda replica=replica: replica.sync.status.store == "ok")
            assert (replica.alpha(), replica.sync.status.revision) == (0.75, revision)
            with pytest.raises(AuthenticationError):
                replica.alpha("gone")
            await until(lambda replica=replica: replica.vector() == new)
        assert (await Control(store).audit())[0].action == "store.adopt"
        with pytest.raises(InvalidRequestError, match="not foreign"):
            one.sync.adoption()
        with pytest.raises(InvalidRequestError, match="not foreign"):
            await one.sync.restoration()
        await foreign_fleet(store, [one, two])  # the word counted once


async def test_an_operator_restores_what_is_in_force_for_the_whole_fleet(
    store: FaultyStore,
) -> None:
    old = await publish(store)
    await set_alpha(store, 0.75)
    async with replica_of(store, 0.02) as one, replica_of(store, 0.02) as two:
        await until(lambda: one.vector() == two.vector() == old)
        await foreign_fleet(store, [one, two])
        await set_alpha(store, 0.1)
        await set_alpha(store, 0.1, "stranger")
        lost = await one.sync.restoration()
        await Control(store).restore(lost.writes, lost.expected, lost.vectors, AUTHOR)
        for replica in (one, two):
            await until(lambda replica=replica: replica.sync.status.store == "ok")
            assert (replica.alpha(), replica.vector()) == (0.75, old)
        assert set((await Control(store).state()).tenants) == {"acme"}
        await set_alpha(store, 0.5)
        await until(lambda: one.alpha() == two.alpha() == 0.5)
    async with replica_of(store) as fresh:
        assert fresh.alpha() == 0.5
        await until(lambda: fresh.vector() == old)


async def test_a_second_restoration_does_not_bring_back_what_is_older(store: FaultyStore) -> None:
    """Asked of a replica that had missed the last change, it put that back for the whole fleet."""
    one, behind = make_replica(store), make_replica(store)
    await set_alpha(store, 0.25)
    await behind.sync.look()
    await set_alpha(store, 0.75)
    await one.sync.look()
    store.become(MemoryStore())
    for replica in (one, behind):
        await replica.sync.look()
        assert replica.sync.status.store == "foreign"
    lost = await one.sync.restoration()
    await Control(store).restore(lost.writes, lost.expected, lost.vectors, AUTHOR)
    with pytest.raises(ConflictError, match="said already"):
        await behind.sync.restoration()
    await behind.sync.look()
    assert (behind.sync.status.store, behind.alpha()) == ("ok", 0.75)


async def test_a_replica_that_starts_takes_the_store_as_it_is(store: FaultyStore) -> None:
    async with replica_of(store) as replica:
        assert replica.directory.is_synced and replica.sync.status.store == "ok"
        assert replica.sync.status.revision == 0
        await set_alpha(store, 0.75)
        await until(lambda: replica.directory.num_tenants == 1)
