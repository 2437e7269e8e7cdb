"""Fixtures of the HTTP layer's tests: a scripted engine, a store with vectors, clients."""

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.app import create_app
from server.config import Settings
from server.control import Control
from server.directory import TenantDirectory
from server.documents import PolicyFields
from server.serve import DrainingServer, listening_socket
from server.services import Services
from steering.stores import MemoryStore, Store
from tests.server.fakes import AUTHOR, FakeEngine, publish

T = TypeVar("T")


def make_settings(**changes: Any) -> Settings:
    """Settings of a test: alpha 0.5, every layer its own Delta, overrides refused."""
    values: dict[str, Any] = {
        "port": 0,
        "served_model_name": "tiny",
        "alpha": 0.5,
        "client_override": "none",
        "drain_timeout_s": 5.0,
        "cache": Path("/nonexistent"),
        "store": "memory://",
    }
    return Settings(**{**values, **changes})


@pytest.fixture
def fake_engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def store() -> MemoryStore:
    """In memory, with one vector set under the alias `default`, and no tenants."""
    memory = MemoryStore()
    asyncio.run(publish(memory))
    return memory


class Tenants:
    """Tenants of a started client's server, made as operators make them, in force at once."""

    def __init__(self, client: TestClient, store: Store) -> None:
        services: Services = client.app.state.services  # type: ignore[attr-defined]
        self.directory: TenantDirectory = services.directory
        self._client = client
        self._store = store
        self._control = Control(store)

    def create(self, name: str = "acme", **policy: Any) -> str:
        """Returns the tenant's key, whose id is `first`."""
        fields = PolicyFields(**{"alpha": 0.5} | policy)
        self.do(lambda control: control.create_tenant(name, fields, AUTHOR))
        return self.do(lambda control: control.create_key(name, "first", AUTHOR)).text

    def set_policy(self, name: str = "acme", **policy: Any) -> int:
        """Returns the revision."""
        fields = PolicyFields(**{"alpha": 0.5} | policy)
        return self.do(lambda control: control.set_policy(name, fields, None, AUTHOR))

    def write(self, key: str, text: str | None) -> int:
        """A document as nothing of ours would write it."""
        return self.do(lambda _: self._store.commit({key: text}, {}, "{}"))

    def do(self, change: Callable[[Control], Awaitable[T]]) -> T:
        """On the server's event loop."""

        async def change_and_follow() -> T:
            result = await change(self._control)
            self.directory.apply(await self._store.changes(), is_whole=True)
            return result

        assert self._client.portal is not None, "the client has been started"
        return self._client.portal.call(change_and_follow)


@pytest.fixture
def tenants_of(store: MemoryStore) -> Callable[[TestClient], Tenants]:
    return lambda client: Tenants(client, store)


@pytest.fixture
def tenants(client: TestClient, store: MemoryStore) -> Tenants:
    """Of `client`'s server."""
    return Tenants(client, store)


@pytest.fixture
def client_for(fake_engine: FakeEngine, store: Store) -> Iterator[Callable[..., TestClient]]:
    """Make a client of a started server with settings of one's choice; in process, no sockets."""
    opened: list[TestClient] = []

    def make(**changes: Any) -> TestClient:
        app = create_app(make_settings(**changes), engine=fake_engine, store=store)
        client = TestClient(app, "http://127.0.0.1", raise_server_exceptions=True)
        client.__enter__()
        opened.append(client)
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def client(client_for: Callable[..., TestClient]) -> TestClient:
    return client_for()


class LiveServer:
    """A server on a real socket, in a thread."""

    def __init__(self, app: FastAPI) -> None:
        self.services: Services = app.state.services
        self._app = app
        self._sock = listening_socket(self.services.settings)
        self.port: int = self._sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server: DrainingServer | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self) -> None:
        async with self._app.router.lifespan_context(self._app):
            self.server = DrainingServer(self._app, self.services)
            await self.server.serve(sockets=[self._sock])

    def start(self) -> None:
        self._thread.start()
        wait_until(lambda: self.server is not None and self.server.started)

    def signal(self, number: int) -> None:
        """What the process would do on a signal."""
        assert self.server is not None
        self.server.handle_exit(number, None)

    def join(self, timeout_s: float = 10.0) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the server did not stop"

    def stop(self) -> None:
        if self.server is not None:
            self.server.should_exit = True
        self.join()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


@contextmanager
def live_server(engine: FakeEngine, store: Store, **changes: Any) -> Iterator[LiveServer]:
    server = LiveServer(create_app(make_settings(**changes), engine=engine, store=store))
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def live(fake_engine: FakeEngine, store: Store) -> Iterator[LiveServer]:
    with live_server(fake_engine, store) as server:
        yield server


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Poll: what happens on another thread has no other signal."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
