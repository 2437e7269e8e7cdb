"""A replica and a real Redis: killed, emptied, paused, silent, damaged."""

import asyncio
import json
import statistics
from collections.abc import AsyncIterator

import pytest

from server import sync as sync_module
from server import vectors as vectors_module
from server.control import Control
from server.heartbeat import Heartbeat
from steering.stores import RedisStore
from steering.stores.base import ALIAS_PREFIX
from steering.stores.redis import CHANGED, DOCUMENTS, REVISION, VECTOR
from tests.redis_server import RedisServer
from tests.server.fakes import AUTHOR, make_vectors, publish
from tests.server.replicas import replica_of, set_alpha, until

pytestmark = pytest.mark.anyio


async def _store(server: RedisServer, user: str) -> AsyncIterator[RedisStore]:
    store = RedisStore(server.url(user))
    yield store
    await store.close()


@pytest.fixture
async def operator(redis_server: RedisServer) -> AsyncIterator[RedisStore]:
    async for store in _store(redis_server, "deshift-operator"):
        yield store


@pytest.fixture
async def server(redis_server: RedisServer) -> AsyncIterator[RedisStore]:
    """With the rights of a replica: to read."""
    async for store in _store(redis_server, "deshift-server"):
        yield store


@pytest.fixture
async def own_operator(own_redis: RedisServer) -> AsyncIterator[RedisStore]:
    async for store in _store(own_redis, "deshift-operator"):
        yield store


@pytest.fixture
async def own_server(own_redis: RedisServer) -> AsyncIterator[RedisStore]:
    async for store in _store(own_redis, "deshift-server"):
        yield store


async def test_a_change_is_in_force_at_once_with_the_rights_of_a_reader(
    operator: RedisStore, server: RedisStore
) -> None:
    await set_alpha(operator, 0.0)
    async with replica_of(server) as replica:
        await asyncio.sleep(0.1)  # it listens
        took = []
        for step in range(1, 31):
            await set_alpha(operator, step / 100)
            took.append(await until(lambda step=step: replica.alpha() == step / 100))
        assert statistics.median(took) < 0.1, "seconds; the interval is a minute"


async def test_a_change_that_nobody_announced_heals_within_the_interval(
    operator: RedisStore, server: RedisStore, redis_server: RedisServer
) -> None:
    await set_alpha(operator, 0.25)
    async with replica_of(server, interval_s=0.2) as replica:
        client = redis_server.admin()
        text = client.hget(DOCUMENTS, "tenant/acme").partition(b" ")[2]  # type: ignore[union-attr]
        with client.pipeline() as pipe:
            revision = int(client.get(REVISION)) + 1  # type: ignore[arg-type]
            pipe.set(REVISION, revision)
            pipe.hset(DOCUMENTS, "tenant/acme", b"%d " % revision + text.replace(b"0.25", b"0.75"))
            pipe.zadd(CHANGED, {"tenant/acme": revision})
            pipe.execute()
        client.close()
        assert await until(lambda: replica.alpha() == 0.75) < 2


async def test_a_killed_redis_with_its_data_is_followed_again_by_itself(
    own_redis: RedisServer, own_operator: RedisStore, own_server: RedisStore
) -> None:
    vector_id = await publish(own_operator)
    await set_alpha(own_operator, 0.25)
    async with replica_of(own_server) as replica:
        await until(lambda: replica.vector() == vector_id)
        own_redis.kill()
        await until(lambda: replica.sync.status.store == "unreachable")
        assert (replica.alpha(), replica.vector()) == (0.25, vector_id)
        own_redis.start()
        await until(lambda: replica.sync.status.store == "ok")
        await set_alpha(own_operator, 0.75)
        await until(lambda: replica.alpha() == 0.75)


async def test_a_killed_redis_without_its_data_is_foreign_until_they_are_restored(
    own_redis: RedisServer, own_operator: RedisStore, own_server: RedisStore
) -> None:
    vector_id = await publish(own_operator)
    await set_alpha(own_operator, 0.25)
    async with replica_of(own_server, interval_s=0.2) as replica:
        await until(lambda: replica.vector() == vector_id)
        own_redis.restart(empty=True)
        await until(lambda: replica.sync.status.store == "foreign")
        await set_alpha(own_operator, 0.0)
        await publish(own_operator, 0.125)
        await until(lambda: "other data" in str(replica.sync.status.problem))
        assert (replica.alpha(), replica.vector()) == (0.25, vector_id)
        lost = await replica.sync.restoration()
        await Control(own_operator).restore(lost.writes, lost.expected, lost.vectors, AUTHOR)
        await until(lambda: replica.sync.status.store == "ok")
    async with replica_of(own_server) as fresh:
        assert fresh.alpha() == 0.25
        await until(lambda: fresh.vector() == vector_id)


async def test_a_paused_redis_is_unreachable_and_then_taken_up(
    own_redis: RedisServer,
    own_operator: RedisStore,
    own_server: RedisStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sync_module, "READ_TIMEOUT_S", 0.3)
    await set_alpha(own_operator, 0.25)
    async with replica_of(own_server, interval_s=0.1) as replica:
        own_redis.pause()
        await until(lambda: replica.sync.status.store == "unreachable")
        await until(lambda: (replica.sync.status.age_s or 0.0) > 0.5)
        assert replica.alpha() == 0.25
        own_redis.resume()
        await until(lambda: replica.sync.status.store == "ok")
        await set_alpha(own_operator, 0.75)
        await until(lambda: replica.alpha() == 0.75)


async def test_a_damaged_set_under_a_switched_alias_leaves_the_last_good_one(
    operator: RedisStore,
    server: RedisStore,
    redis_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vectors_module, "FIRST_RETRY_S", 0.05)
    old, new = await publish(operator), make_vectors(0.25)
    async with replica_of(server) as replica:
        await until(lambda: replica.vector() == old)
        await operator.put_vectors(new.to_bytes())
        client = redis_server.admin()
        client.setrange(VECTOR + new.id, 200, b"bees")
        client.close()
        await operator.commit({f"{ALIAS_PREFIX}default": f'{{"vector": "{new.id}"}}'}, {}, "{}")
        await until(lambda: replica.vectors.problems)
        assert replica.vector() == old and "digest" in replica.vectors.problems["default"]
        await operator.put_vectors(new.to_bytes())
        await until(lambda: replica.vector() == new.id)
        assert not replica.vectors.problems


async def test_a_replica_that_may_only_read_is_seen_by_the_operators(
    operator: RedisStore, server: RedisStore
) -> None:
    heartbeat = Heartbeat(server, "one", 0.05, lambda: {"revision": 7}, asyncio.Event())
    task = asyncio.create_task(heartbeat.run())
    async with asyncio.timeout(10):
        while not (seen := await operator.replicas()):
            await asyncio.sleep(0.01)
        assert json.loads(seen["one"]) == {"revision": 7}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert not await operator.replicas()
