"""deploy/redis: what each user may do, how nobody else gets in, and TLS."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import NoPermissionError

from steering.errors import ReadOnlyError
from steering.stores.base import Document
from tests.redis_server import DEPLOY, RedisServer, make_certificate
from tests.steering.samples import shift_vectors
from tests.steering.stores.conftest import Open, failure

pytestmark = pytest.mark.anyio

ONE = shift_vectors(1)


async def test_a_server_s_credentials_read_everything_and_write_only_heartbeats(
    redis_server: RedisServer, opened: Open
) -> None:
    operator, server = (
        opened(redis_server.url(f"deshift-{who}")) for who in ("operator", "server")
    )
    await operator.put_vectors(ONE.to_bytes())
    await operator.commit({"a": "1"}, {}, "first")
    assert await server.changes() == await operator.changes()
    assert await server.get(["a"]) == {"a": Document("a", "1", 1)}
    assert [record.entry for record in await server.audit(5)] == ["first"]
    assert [record.id for record in await server.list_vectors()] == [ONE.id]
    assert (await server.get_vectors(ONE.id)).id == ONE.id
    await server.heartbeat("here", "ok", 60)
    assert await operator.replicas() == await server.replicas() == {"here": "ok"}
    wakeups = server.wakeups()
    await anext(wakeups)
    await operator.commit({"a": "2"}, {}, "second")
    await asyncio.wait_for(anext(wakeups), 1)
    await server.heartbeat("here", "", 60)
    assert await operator.replicas() == {}
    for write in (
        server.commit({"a": "3"}, {}, "never"),
        server.commit({}, {}, "never"),
        server.put_vectors(shift_vectors(2).to_bytes()),
    ):
        assert isinstance(await failure(write), ReadOnlyError)
    assert (await operator.changes()).revision == 2
    assert len(await operator.list_vectors()) == 1


async def test_nobody_gets_in_without_a_name_or_with_a_wrong_password(
    redis_server: RedisServer, opened: Open
) -> None:
    hosts = f"127.0.0.1:{redis_server.port}"
    for credentials in ("", "deshift-operator:wrong-pw@", "default:@", "default:x@", ":x@"):
        error = await failure(opened(f"redis://{credentials}{hosts}").changes())
        assert hosts in str(error) and "wrong-pw" not in str(error)


def test_redis_refuses_to_start_until_the_passwords_are_filled_in(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, acl=(DEPLOY / "users.acl").read_text())
    with pytest.raises(RuntimeError, match="SHA256_OF_THE_SERVER_PASSWORD|ACL errors"):
        server.start()


def test_what_the_server_runs_with_is_what_deploy_says(redis_server: RedisServer) -> None:
    wanted = {
        "appendonly": "yes",
        "appendfsync": "always",
        "aof-load-truncated": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
        "protected-mode": "yes",
    }
    with redis_server.admin() as admin:
        assert {name: admin.config_get(name)[name] for name in wanted} == wanted  # type: ignore[index]
        users: Any = admin.acl_list()
    assert sorted(user.split(" ")[1:3] for user in users) == [
        ["default", "off"],
        ["deshift-operator", "on"],
        ["deshift-server", "on"],
        ["test-admin", "on"],
    ]


async def test_everything_lies_under_the_prefix_that_the_acl_names(
    redis_server: RedisServer, opened: Open
) -> None:
    store = opened(redis_server.url())
    await store.put_vectors(ONE.to_bytes())
    await store.commit({"a": "1"}, {}, "")
    await store.heartbeat("r", "x", 60)
    with redis_server.admin() as admin:
        keys: Any = admin.keys("*")
    assert len(keys) == 9 and all(key.startswith(b"deshift:") for key in keys)


async def test_tls_with_the_certificate_checked(tmp_path: Path, opened: Open) -> None:
    server = RedisServer(tmp_path / "redis", tls=make_certificate(tmp_path))
    server.start()
    try:
        operator, reader = (opened(server.url(f"deshift-{who}")) for who in ("operator", "server"))
        assert server.url().startswith("rediss://")
        await operator.put_vectors(ONE.to_bytes())
        wakeups = reader.wakeups()
        await anext(wakeups)
        await operator.commit({"a": "1"}, {}, "")
        await asyncio.wait_for(anext(wakeups), 1)
        assert (await reader.get_vectors(ONE.id)).id == ONE.id
        assert isinstance(await failure(reader.commit({"a": "2"}, {}, "")), ReadOnlyError)
        await wakeups.aclose()  # type: ignore[attr-defined]
        unknown_authority = server.url().partition("?")[0]
        assert "certificate" in str(await failure(opened(unknown_authority).changes())).lower()
        plain = unknown_authority.replace("rediss:", "redis:")
        await failure(opened(plain).changes())
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("user", "command"),
    [
        ("deshift-server", ("set", "deshift:documents", "x")),
        ("deshift-server", ("set", "deshift:vector:x", "x")),
        ("deshift-server", ("del", "deshift:audit")),
        ("deshift-server", ("publish", "deshift:changes", "1")),
        ("deshift-server", ("hset", "deshift:documents", "a", "1")),
        ("deshift-server", ("get", "other")),
        ("deshift-operator", ("get", "other")),
        ("deshift-operator", ("set", "other", "x")),
        ("deshift-operator", ("publish", "other", "x")),
        *((f"deshift-{who}", ("flushall",)) for who in ("server", "operator")),
        *((f"deshift-{who}", ("config", "get", "*")) for who in ("server", "operator")),
        *((f"deshift-{who}", ("acl", "list")) for who in ("server", "operator")),
        *((f"deshift-{who}", ("keys", "*")) for who in ("server", "operator")),
        *((f"deshift-{who}", ("eval", "return 1", "0")) for who in ("server", "operator")),
        *((f"deshift-{who}", ("replicaof", "no", "one")) for who in ("server", "operator")),
    ],
)
async def test_neither_role_may_do_what_it_does_not_need(
    redis_server: RedisServer, opened: Open, user: str, command: tuple[str, ...]
) -> None:
    with pytest.raises(NoPermissionError):
        await opened(redis_server.url(user))._redis.execute_command(*command)
