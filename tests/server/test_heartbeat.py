"""What a replica tells of itself, and that telling it stops nothing."""

import asyncio
import json
import logging
import time
from contextlib import suppress

import pytest

from server.heartbeat import MAX_TOLD, MIN_GAP_S, Heartbeat, replica_name, replica_status
from steering.errors import ReadOnlyError, StoreError
from steering.stores import MemoryStore
from tests.server.conftest import make_settings
from tests.server.fakes import FakeEngine, publish
from tests.server.replicas import make_replica, set_alpha, until

pytestmark = pytest.mark.anyio


class DeafStore(MemoryStore):
    """Counts the beats, and takes none while it has an error."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.ttls: list[float] = []

    async def heartbeat(self, replica: str, status: str, ttl_s: float) -> None:
        self.ttls.append(ttl_s)
        if self.error is not None:
            raise self.error
        await super().heartbeat(replica, status, ttl_s)


async def ended(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_it_beats_again_and_again_and_takes_itself_away() -> None:
    store = DeafStore()
    count = iter(range(100))
    task = asyncio.create_task(
        Heartbeat(store, "one", 0.01, lambda: {"beat": next(count)}, asyncio.Event()).run()
    )
    await until(lambda: len(store.ttls) > 3)
    assert json.loads((await store.replicas())["one"])["beat"] >= 3
    assert set(store.ttls) == {5.0}
    await ended(task)
    assert await store.replicas() == {}
    slow = asyncio.create_task(Heartbeat(store, "two", 30.0, dict, asyncio.Event()).run())
    await until(lambda: store.ttls[-1] == 150.0)
    await ended(slow)


async def test_what_changes_is_told_at_once_and_not_too_often() -> None:
    store, changed = DeafStore(), asyncio.Event()
    task = asyncio.create_task(Heartbeat(store, "one", 60.0, dict, changed).run())
    started = time.monotonic()
    await until(lambda: len(store.ttls) == 1)
    for _ in range(20):
        changed.set()
        await asyncio.sleep(0.005)
    await until(lambda: len(store.ttls) >= 2)
    await ended(task)
    # The first, one for each gap however slow the machine is, and the last, which takes it away.
    assert len(store.ttls) <= 2 + (time.monotonic() - started) / MIN_GAP_S


@pytest.mark.parametrize("kind", [ReadOnlyError, StoreError, ZeroDivisionError])
async def test_a_store_that_takes_no_heartbeat_stops_nothing_and_is_told_of_once(
    kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "deshift.heartbeat")
    store = DeafStore()
    store.error = kind("may not write")
    task = asyncio.create_task(Heartbeat(store, "one", 0.01, dict, asyncio.Event()).run())
    await until(lambda: len(store.ttls) > 3)
    store.error = None
    await until(lambda: "one" in store._replicas)
    await ended(task)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_a_status_that_cannot_be_made_once_does_not_end_the_beating() -> None:
    """The task ended, and a replica that served was never seen again."""
    store, count = DeafStore(), iter(range(100))
    heartbeat = Heartbeat(store, "one", 0.01, lambda: {"beat": 1 / next(count)}, asyncio.Event())
    task = asyncio.create_task(heartbeat.run())
    await until(lambda: len(store.ttls) > 2)
    assert "one" in await store.replicas()
    await ended(task)


async def test_the_status_says_what_is_in_force_here() -> None:
    store = MemoryStore()
    vector_id = await publish(store)
    await set_alpha(store, 0.75)
    for number in range(MAX_TOLD + 2):
        await store.commit({f"tenant/broken{number}": "{}" if number else "bees"}, {}, "{}")
    replica, engine = make_replica(store), FakeEngine()
    await replica.sync.look()
    await replica.vectors.wait_until_settled()
    replica.directory.local_kill = "unsteered"
    status = replica_status(
        "one", make_settings(), engine, replica.directory, replica.vectors, replica.sync, 1.5
    )
    status = json.loads(json.dumps(status))
    assert status["revision"] == (await store.changes()).revision
    assert status["epoch"] == (await store.changes()).epoch
    assert (status["store"], status["problem"]) == ("ok", None)
    assert (status["kill"], status["local_kill"]) == ("unsteered", "unsteered")
    assert status["vectors"] == {"default": vector_id}
    assert (status["model"], status["started_at"]) == ("tiny", 1.5)
    assert 0 <= status["age_s"] < 10 and abs(status["at"] - time.time()) < 10
    assert (status["running"], status["waiting"], status["engine"]) == (0, 0, "starting")
    assert len(status["problems"]) == min(MAX_TOLD, status["num_problems"])
    assert status["num_problems"] == len(replica.directory.problems) > 0


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"replica": "rack-1.west"}, "rack-1.west"),
        ({"replica": "a b/c:8000"}, "a-b-c-8000"),
        ({"replica": "..hidden"}, "hidden"),
        ({"replica": "\u00fc\n"}, "replica"),
        ({"replica": "x" * 80}, "x" * 64),
    ],
)
async def test_a_replicas_name_can_stand_anywhere(settings: dict[str, str], name: str) -> None:
    assert replica_name(make_settings(**settings)) == name


async def test_a_replica_is_named_after_host_and_port() -> None:
    assert replica_name(make_settings(port=8123)).endswith("-8123")
