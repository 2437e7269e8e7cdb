"""Replicas of a checkpoint, a Redis of their own, and tenants, for scenarios that measure them.

Everything runs on this machine, so all its moments are of one clock. Measures nothing.
"""

import asyncio
import json
import os
import secrets
import shutil
import string
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import redis

from server.bench.servers import Checkpoint, Wanted, deshift_serve
from server.bench.target import BenchError, Target
from server.config import PREFIX, Settings
from server.control import Author, Control, key_digest
from server.documents import (
    KEYS_PREFIX,
    TENANT_PREFIX,
    KeyRecord,
    KeysDocument,
    PolicyFields,
    TenantDocument,
    text_of,
)
from server.policy import default_fields
from server.process import end_of_log, free_port
from steering.stores import Store, opened_store
from steering.stores.base import resolve

TENANT = "bench"
OPERATOR = "bench"
AUTHOR = Author(OPERATOR, "deshift bench", "setup")
_REDIS_START_S, _POLL_S = 10.0, 0.02
_TENANTS_A_COMMIT = 250


@dataclass(frozen=True)
class Size:
    """num_tenants: beside the one that the targets' key is of."""

    num_replicas: int
    num_tenants: int = 0


@dataclass(frozen=True)
class Fleet:
    """store_url: may be written. targets, admin_urls: the replicas, in one order; the targets have
    the tenant's key. policy: the tenant's at first, and that of the other tenants, whose keys are
    tenant_keys."""

    store_url: str
    targets: tuple[Target, ...]
    admin_urls: tuple[str, ...]
    admin_key: str = field(repr=False)
    policy: PolicyFields
    tenant_keys: tuple[str, ...] = field(repr=False)


def start(
    stack: ExitStack, checkpoint: Checkpoint | None, wanted: Wanted, size: Size, *, num_rows: int
) -> Fleet:
    """The replicas end with `stack`; the tenants' policy is that of the settings.

    Raises BenchError, ChildError, ConfigError, SteeringError.
    """
    if checkpoint is None:
        raise BenchError(
            "this scenario measures replicas that it starts itself: give --serve, --demo or --shape"
        )
    logs, dtype = wanted.logs, wanted.dtype
    env = checkpoint.environment(num_rows, wanted.settings)
    env.pop(f"{PREFIX}REPLICA", None)  # one name for both would make them one
    chosen = Settings.from_env(env)
    policy = default_fields(chosen)
    if policy.alpha == 0 or policy.mode == "off":
        raise BenchError("this scenario measures steering: it needs alpha above 0 and not mode off")
    logs.mkdir(parents=True, exist_ok=True)
    directory = Path(stack.enter_context(TemporaryDirectory(prefix="deshift-bench-")))
    url = stack.enter_context(redis_server(directory, logs / "redis.log"))
    tenant_key, tenant_keys = asyncio.run(_fill(url, chosen, policy, size.num_tenants))
    admin_key = secrets.token_urlsafe(24)
    env |= {f"{PREFIX}STORE": url, f"{PREFIX}ADMIN_STORE": url}
    env[f"{PREFIX}ADMIN_KEYS"] = f"{OPERATOR}:{admin_key}"
    # Two processes that each take every core hold each other up.
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size.num_replicas)))
    targets, admin_urls = [], []
    for letter in string.ascii_uppercase[: size.num_replicas]:
        name = f"replica {letter}"
        port = free_port()
        served = deshift_serve(
            name, checkpoint.model, logs, dtype, env, admin_port=port, api_key=tenant_key
        )
        targets.append(stack.enter_context(served))
        admin_urls.append(f"http://127.0.0.1:{port}")
    return Fleet(url, tuple(targets), tuple(admin_urls), admin_key, policy, tuple(tenant_keys))


@contextmanager
def redis_server(directory: Path, log: Path) -> Iterator[str]:
    """The URL of a redis-server on a free loopback port, which forces every commit to the disk as
    deploy/redis has it. Raises BenchError where there is none, or it does not start.
    """
    program = shutil.which("redis-server")
    if program is None:
        raise BenchError("this scenario needs the program redis-server in PATH")
    port = free_port()
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(directory)]
    command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_for_redis(process, port, log)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait()


async def add_tenants(store: Store, policy: PolicyFields, num_tenants: int) -> list[str]:
    """Each with a key, in a few commits; returns the keys. Their requests may ask for any steering.
    Raises StoreError."""
    policy = policy.model_copy(update={"client_override": "any"})
    keys = [secrets.token_urlsafe(32) for _ in range(num_tenants)]
    numbers = range(num_tenants)
    about = {"by": AUTHOR.by, "via": AUTHOR.via, "reason": AUTHOR.reason}
    audit = json.dumps({**about, "action": "tenant.create", "changes": []})
    for first in numbers[::_TENANTS_A_COMMIT]:
        writes: dict[str, str | None] = {}
        for number in numbers[first : first + _TENANTS_A_COMMIT]:
            name = f"tenant-{number}"
            writes[TENANT_PREFIX + name] = text_of(TenantDocument(policy=policy))
            writes[KEYS_PREFIX + name] = keys_text(keys[number])
        await store.commit(writes, {}, audit)
    return keys


def keys_text(key: str) -> str:
    """The document of a tenant's only key."""
    record = KeyRecord(id="bench", digest=key_digest(key), created_at=time.time())
    return text_of(KeysDocument(keys=(record,)))


async def _fill(
    url: str, chosen: Settings, policy: PolicyFields, num_tenants: int
) -> tuple[str, list[str]]:
    """Vectors and tenants; returns the tenant's key and those of the others."""
    async with opened_store(url) as store:
        control = Control(store)
        if policy.mode == "dataset":
            async with opened_store(chosen.store_url) as own:
                vectors = await own.get_vectors(await resolve(own, policy.vector_alias))
            vector_id = await store.put_vectors(vectors.to_bytes())
            await control.activate(policy.vector_alias, vector_id, AUTHOR)
        await control.create_tenant(TENANT, policy, AUTHOR)
        key = await control.create_key(TENANT, "bench", AUTHOR)
        return key.text, await add_tenants(store, policy, num_tenants)


def _wait_for_redis(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + _REDIS_START_S
    with redis.Redis(port=port, socket_timeout=1.0) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                client.ping()
                return
            except redis.RedisError:
                time.sleep(_POLL_S)
    raise BenchError(f"redis-server did not start. The end of {log}:\n{end_of_log(log)}")
