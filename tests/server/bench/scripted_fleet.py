"""A fleet as `deshift bench` measures it, with a scripted engine: listeners, Redis and tenants are
real."""

import asyncio
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from server.app import create_app
from server.bench import fleet
from server.bench.fleet import Fleet
from server.bench.target import Target
from server.control import Control
from server.documents import PolicyFields
from server.process import free_port
from server.serve import admin_socket, listening_socket, run
from steering.stores import opened_store
from tests.server.conftest import make_settings
from tests.server.fakes import FakeEngine, Script

ADMIN_KEY = "operator-key-of-the-bench"
POLICY = PolicyFields(mode="sample", alpha=0.5)

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed"
)


class Replica:
    """Both listeners of a server with a scripted engine, on a loop of its own."""

    def __init__(self, name: str, url: str, script: Script | None) -> None:
        settings = make_settings(
            store=url, admin_port=free_port(), admin_keys=f"{fleet.OPERATOR}:{ADMIN_KEY}"
        ).model_copy(update={"replica": name})
        self._app = create_app(settings, engine=FakeEngine(script))
        self._sockets = listening_socket(settings), admin_socket(settings)
        self.url, self.admin_url = (f"http://127.0.0.1:{s.getsockname()[1]}" for s in self._sockets)
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(run(self._app, *self._sockets))
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self._loop.run_until_complete(asyncio.wait([self._task]))
        self._loop.close()

    def start(self) -> None:
        self._thread.start()
        transport = httpx.HTTPTransport(retries=8)
        with httpx.Client(transport=transport) as client:
            assert client.get(f"{self.admin_url}/health").status_code == 200

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)
        assert not self._thread.is_alive(), "the replica did not stop"


@contextmanager
def scripted_fleet(
    directory: Path,
    names: Sequence[str] = ("replica-A", "replica-B"),
    num_tenants: int = 0,
    script: Script | None = None,
) -> Iterator[Fleet]:
    """Replicas of a scripted engine on a Redis; the tenants as the scenarios make them."""
    with ExitStack() as stack:
        url = stack.enter_context(fleet.redis_server(directory, directory / "redis.log"))
        key, others = asyncio.run(_keys(url, num_tenants))
        targets, admin_urls = [], []
        for name in names:
            replica = Replica(name, url, script)
            replica.start()
            stack.callback(replica.stop)
            targets.append(Target(name, replica.url, "tiny", key, dialect="ignore_eos"))
            admin_urls.append(replica.admin_url)
        yield Fleet(url, tuple(targets), tuple(admin_urls), ADMIN_KEY, POLICY, tuple(others))


async def _keys(url: str, num_tenants: int) -> tuple[str, list[str]]:
    async with opened_store(url) as store:
        control = Control(store)
        await control.create_tenant(fleet.TENANT, POLICY, fleet.AUTHOR)
        key = await control.create_key(fleet.TENANT, "bench", fleet.AUTHOR)
        return key.text, await fleet.add_tenants(store, POLICY, num_tenants)
