"""What only Redis can suffer: a server that is gone, paused, emptied or damaged."""

import asyncio
from typing import Any

import pytest

from steering.errors import ConflictError, StoreError, VectorError
from steering.stores import open_store, without_credentials
from steering.stores.base import Document
from tests.redis_server import RedisServer
from tests.steering.samples import shift_vectors
from tests.steering.stores.conftest import Open, failure

pytestmark = pytest.mark.anyio

ONE = shift_vectors(1)


async def test_a_flipped_byte_is_refused_and_mended_by_the_same_set(
    redis_server: RedisServer, opened: Open
) -> None:
    store = opened(redis_server.url())
    await store.put_vectors(ONE.to_bytes())
    data = bytearray(ONE.to_bytes())
    data[-5] ^= 1
    with redis_server.admin() as admin:
        admin.set(f"deshift:vector:{ONE.id}", bytes(data))
    place = f"redis://127.0.0.1:{redis_server.port}/0"
    with pytest.raises(VectorError, match=f"{place}: vector set {ONE.id[:12]}"):
        await store.get_vectors(ONE.id)
    await store.put_vectors(ONE.to_bytes())
    assert (await store.get_vectors(ONE.id)).to_bytes() == ONE.to_bytes()


async def test_damaged_manifests_and_documents_are_named(
    redis_server: RedisServer, opened: Open
) -> None:
    store = opened(redis_server.url())
    await store.put_vectors(ONE.to_bytes())
    await store.commit({"a": "1", "b": "1"}, {}, "")
    with redis_server.admin() as admin:
        admin.hset("deshift:manifests", ONE.id, "{")
        admin.hset("deshift:documents", "a", "x y")
    assert ONE.id[:12] in str(await failure(store.list_vectors()))
    assert "'a'" in str(await failure(store.changes()))
    assert "'a'" in str(await failure(store.commit({"b": "2"}, {"a": 1}, "")))
    with redis_server.admin() as admin:
        admin.hdel("deshift:documents", "a")
    assert "lost" in str(await failure(store.changes()))
    with redis_server.admin() as admin:
        admin.set("deshift:documents", "not a hash")
    assert "WRONGTYPE" in str(await failure(store.get(["b"])))


async def test_a_full_server_refuses_changes_and_is_read_as_ever(
    redis_server: RedisServer, opened: Open
) -> None:
    """Readers used transactions, which a full server refuses: nobody could start or follow."""
    store = opened(redis_server.url())
    await store.put_vectors(ONE.to_bytes())
    await store.commit({"a": "1"}, {}, "made")
    before = await store.changes()
    with redis_server.admin() as admin:
        limit = admin.config_get("maxmemory")["maxmemory"]  # type: ignore[index]
        admin.config_set("maxmemory", "1")
        try:
            assert await store.changes() == before
            assert before.documents == (Document("a", "1", 1),)
            assert list(await store.get(["a"])) == ["a"]
            assert [each.entry for each in await store.audit(1)] == ["made"]
            assert [each.id for each in await store.list_vectors()] == [ONE.id]
            assert (await store.get_vectors(ONE.id)).id == ONE.id
            assert await store.replicas() == {}
            assert "maxmemory" in str(await failure(store.commit({"a": "2"}, {}, "")))
        finally:
            admin.config_set("maxmemory", limit)
    assert await store.commit({"a": "2"}, {}, "") == 2


async def test_after_a_flush_the_epoch_is_another_one(
    redis_server: RedisServer, opened: Open
) -> None:
    store = opened(redis_server.url())
    await store.commit({"a": "1"}, {}, "")
    before = await store.changes()
    redis_server.flush()
    assert await store.changes(1) == type(before)("", 0, ())
    assert await store.commit({"b": "1"}, {}, "") == 1
    after = await store.changes()
    assert after.epoch not in ("", before.epoch)
    assert after.documents == (Document("b", "1", 1),)


async def test_a_killed_server_is_an_error_at_once_and_comes_back_with_its_data(
    own_redis: RedisServer, opened: Open
) -> None:
    store = opened(own_redis.url())
    await store.put_vectors(ONE.to_bytes())
    await store.commit({"a": "1"}, {}, "kept")
    before = await store.changes()
    own_redis.kill()
    for use in (
        *(store.changes(), store.get(["a"]), store.commit({"a": "2"}, {}, ""), store.audit(1)),
        *(store.replicas(), store.list_vectors(), store.get_vectors(ONE.id)),
        *(store.heartbeat("r", "x", 1), store.put_vectors(ONE.to_bytes()), anext(store.wakeups())),
    ):
        assert f"127.0.0.1:{own_redis.port}" in str(await failure(use, 1.0))  # type: ignore[arg-type]
    own_redis.start()
    assert await store.changes() == before
    assert (await store.get_vectors(ONE.id)).id == ONE.id
    assert await store.commit({"a": "2"}, {"a": 1}, "") == 2
    own_redis.restart(empty=True)
    assert (await store.changes(2)).epoch == ""


async def test_a_paused_server_is_an_error_within_the_timeout(
    own_redis: RedisServer, opened: Open
) -> None:
    store, idle = opened(own_redis.url()), opened(own_redis.url())
    await store.commit({"a": "1"}, {}, "")
    own_redis.pause()
    await asyncio.gather(
        failure(store.changes()),
        failure(idle.changes(), 4.5),  # connects, and then gets no answer
    )
    own_redis.resume()
    assert (await store.changes()).revision == 1


@pytest.mark.parametrize("how", [pytest.param("pause", marks=pytest.mark.slow), "kill"])
async def test_a_listener_notices_a_dead_or_silent_server(
    own_redis: RedisServer, opened: Open, how: str
) -> None:
    store, other = opened(own_redis.url()), opened(own_redis.url())
    wakeups = store.wakeups()
    await anext(wakeups)
    waiting = asyncio.ensure_future(anext(wakeups))
    await asyncio.sleep(1.5)  # silence that is answered is no error
    assert not waiting.done()
    getattr(own_redis, how)()
    assert f"127.0.0.1:{own_redis.port}" in str(await failure(waiting, 3.0))
    own_redis.resume() if how == "pause" else own_redis.start()
    again = store.wakeups()
    await asyncio.wait_for(anext(again), 3)
    await other.commit({"a": "1"}, {}, "")
    await asyncio.wait_for(anext(again), 1)


async def test_a_listener_tells_of_a_restart_that_it_could_pass_over(
    own_redis: RedisServer, opened: Open
) -> None:
    """Redis is back before the listener looks: what was said in between is lost all the same."""
    store = opened(own_redis.url())
    wakeups = store.wakeups()
    await anext(wakeups)
    own_redis.restart()
    with pytest.raises(StoreError, match="the connection was lost"):
        await asyncio.wait_for(anext(wakeups), 3)


async def test_a_call_that_was_given_up_does_not_mix_up_the_answers_of_the_next(
    own_redis: RedisServer, opened: Open
) -> None:
    store = opened(own_redis.url())
    await store.commit({"a": "1"}, {}, "")
    own_redis.pause()
    for use in (store.changes(), store.get(["a"]), store.audit(1)):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(use, 0.2)
    own_redis.resume()
    assert await store.replicas() == {}
    assert await store.get(["a"]) == {"a": Document("a", "1", 1)}
    assert (await store.changes()).revision == 1


class LosesAnswers:
    """A proxy between a client and Redis that can swallow the answer to the next EXEC."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.loses_next = False
        self.port = 0

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_redis, to_redis = await asyncio.open_connection("127.0.0.1", self._to)
        swallows = False

        async def forth() -> None:
            nonlocal swallows
            while data := await reader.read(65536):
                swallows = self.loses_next and b"EXEC\r\n" in data
                to_redis.write(data)
            to_redis.close()

        async def back() -> None:
            while data := await from_redis.read(65536):
                if swallows:  # so it was carried out
                    self.loses_next = False
                    break
                writer.write(data)
            writer.close()

        await asyncio.gather(forth(), back())
        to_redis.close()


async def test_a_commit_whose_answer_is_lost_is_made_once_and_known_to_be(
    redis_server: RedisServer, opened: Open
) -> None:
    proxy = LosesAnswers(redis_server.port)
    server = await proxy.start()
    url = redis_server.url().replace(str(redis_server.port), str(proxy.port))
    store = opened(url)
    assert await store.commit({"a": "1"}, {}, "one") == 1
    proxy.loses_next = True
    assert await store.commit({"a": "2"}, {"a": 1}, "two") == 2
    assert not proxy.loses_next
    assert [record.entry for record in await store.audit(9)] == ["two", "one"]
    with pytest.raises(ConflictError):
        await store.commit({"a": "3"}, {"a": 1}, "three")
    await store.close()
    server.close()
    await server.wait_closed()


async def test_a_read_costs_by_what_changed_and_not_by_what_there_is(
    redis_server: RedisServer, opened: Open
) -> None:
    store = opened(redis_server.url())
    await store.commit({f"tenant/{n}": "x" * 500 for n in range(2000)}, {}, "")
    await store.commit({"tenant/7": "y"}, {}, "")
    with redis_server.admin() as admin:
        sent: Any = admin.info("stats")["total_net_output_bytes"]
        await store.changes(1)
        await store.changes(2)
        now: Any = admin.info("stats")["total_net_output_bytes"]
    assert now - sent < 20_000  # the two answers to INFO among them; all documents take 1 MB


@pytest.mark.parametrize(
    "url",
    [
        *("redis://", "redis:///0", "redis://u:hidden@", "redis://u:hidden@h:port/0"),
        *("redis://u:hid/den@h", "redis://u:hidden@h/x", "redis://h?db=x&password=hidden"),
        *("rediss://u:hidden@h?no_such_option=1", "redis+sentinel://u:hidden@h"),
        *("redis+sentinel:///s", "redis+sentinel://h,/s", "redis+sentinel://h:x/s"),
        "redis+sentinel://h/s?no_such_option=1",
        # An unescaped ? in a password: what is before it was told, as if a host and a port.
        *("redis://u:hidden?x@h/0", "redis://hidden:1?x@h:1/0", "redis+sentinel://u:hidden?x@h/s"),
    ],
)
def test_a_url_that_cannot_be_read_is_told_without_its_password(url: str) -> None:
    with pytest.raises(StoreError, match=r"redis://user:password@host:port/db") as caught:
        open_store(url)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:p@h:1/2?password=p", "redis://h:1/2"),
        ("redis://u:p@x@h:1/2", "redis://h:1/2"),
        ("redis+sentinel://u:p@a:1,b/main?x=y", "redis+sentinel://a:1,b/main"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("memory://", "memory://"),
        ("u:p@h", "h"),
        ("redis://u:p?q@h:1/2", "redis://..."),
        ("redis://u:p@q?r@h:1/2", "redis://..."),
    ],
)
def test_a_url_is_shown_without_credentials_and_options(url: str, shown: str) -> None:
    assert without_credentials(url) == shown
