"""A Redis that is found by Sentinel, and replaced by its replica when it dies."""

import asyncio
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from steering.errors import StoreError
from steering.stores import RedisStore
from steering.stores.base import Document
from tests.redis_server import PASSWORDS, RedisServer, free_port, program

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

SENTINEL_PASSWORD = "sentinel-password-5e0d"
ADMIN = PASSWORDS["test-admin"]
SERVICE = "deshift"


@pytest.fixture
def master(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(
        tmp_path / "master",
        options={
            "masteruser": "test-admin",
            "masterauth": ADMIN,
            "repl-diskless-sync-delay": "0",
        },
    )
    server.start()
    yield server
    server.kill()


@pytest.fixture
def replica(tmp_path: Path, master: RedisServer) -> Iterator[RedisServer]:
    server = RedisServer(
        tmp_path / "replica",
        options={
            "masteruser": "test-admin",
            "masterauth": ADMIN,
            "replicaof": f"127.0.0.1 {master.port}",
        },
    )
    server.start()
    with server.admin() as admin:
        deadline = time.monotonic() + 10
        while admin.info("replication")["master_link_status"] != "up":  # type: ignore[index]
            assert time.monotonic() < deadline
            time.sleep(0.05)
    yield server
    server.kill()


@pytest.fixture
def sentinel(tmp_path: Path, master: RedisServer) -> Iterator[int]:
    """The port of a Sentinel that decides alone, and wants a password of its own."""
    port = free_port()
    settings = tmp_path / "sentinel.conf"
    settings.write_text(
        f"""port {port}
bind 127.0.0.1
dir {tmp_path}
requirepass {SENTINEL_PASSWORD}
sentinel monitor {SERVICE} 127.0.0.1 {master.port} 1
sentinel auth-user {SERVICE} test-admin
sentinel auth-pass {SERVICE} {ADMIN}
sentinel down-after-milliseconds {SERVICE} 1000
sentinel failover-timeout {SERVICE} 3000
"""
    )
    with (tmp_path / "sentinel.log").open("wb") as log:
        process = subprocess.Popen(
            [program("redis-server"), str(settings), "--sentinel"], stdout=log, stderr=log
        )
    yield port
    process.kill()
    process.wait()


def url(sentinel: int, sentinel_password: str = SENTINEL_PASSWORD) -> str:
    """The first of the two Sentinels is never there."""
    hosts = f"127.0.0.1:{free_port()},127.0.0.1:{sentinel}"
    credentials = f"deshift-operator:{PASSWORDS['deshift-operator']}"
    query = f"sentinel_password={sentinel_password}"
    return f"redis+sentinel://{credentials}@{hosts}/{SERVICE}?{query}"


async def commit_when_possible(store: RedisStore, key: str, within_s: float) -> int:
    deadline = time.monotonic() + within_s
    while True:
        try:
            return await store.commit({key: "x"}, {key: 0}, key)
        except StoreError as error:
            assert PASSWORDS["deshift-operator"] not in str(error)
            assert SENTINEL_PASSWORD not in str(error)
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


async def until_ready(replica: RedisServer, sentinel_log: Path) -> None:
    """The replica has the data, and Sentinel knows it: it asks for replicas every 10 s."""
    deadline = time.monotonic() + 12
    with replica.admin() as admin:
        while (
            not admin.exists("deshift:revision")
            or f"127.0.0.1 {replica.port} @" not in sentinel_log.read_text()
        ):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)


async def test_the_replica_takes_over_with_what_was_committed(
    master: RedisServer, replica: RedisServer, sentinel: int, tmp_path: Path
) -> None:
    store = RedisStore(url(sentinel))
    assert await commit_when_possible(store, "before", 5) == 1
    before = await store.changes()
    await until_ready(replica, tmp_path / "sentinel.log")
    wakeups = store.wakeups()
    await anext(wakeups)
    master.kill()
    with pytest.raises(StoreError, match=rf"redis\+sentinel://127.0.0.1:\d+,127.0.0.1:{sentinel}/"):
        await asyncio.wait_for(anext(wakeups), 4)
    assert await commit_when_possible(store, "after", 15) == 2
    after = await store.changes()
    assert after.epoch == before.epoch
    assert after.documents == (Document("before", "x", 1), Document("after", "x", 2))
    again = store.wakeups()
    await asyncio.wait_for(anext(again), 3)
    await store.commit({"more": "x"}, {}, "")
    await asyncio.wait_for(anext(again), 1)
    await store.close()


@pytest.mark.usefixtures("master")
async def test_a_sentinel_that_cannot_be_asked_is_told_without_passwords(sentinel: int) -> None:
    for store in (
        RedisStore(url(sentinel, "wrong-sentinel-password")),
        RedisStore(url(sentinel).replace(f"/{SERVICE}?", "/unknown?")),
        RedisStore(url(free_port())),
    ):
        with pytest.raises(StoreError, match=r"redis\+sentinel://127.0.0.1") as caught:
            await store.changes()
        assert "password" not in str(caught.value).replace("username-password", "")
        assert PASSWORDS["deshift-operator"] not in str(caught.value)
        await store.close()
