"""The admin listener over a real Control, in process: no sockets, no model."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest

from server.admin.app import create_admin_app
from server.app import build_services
from server.services import Services
from steering.stores.base import Store
from steering.stores.memory import MemoryStore
from tests.server.conftest import make_settings
from tests.server.fakes import FakeEngine

KEY = "operator-key-of-alice"
ADMIN_KEYS = f"alice:{KEY},bob:operator-key-of-bob1"
API = "/admin/v1"


class Admin(httpx.AsyncClient):
    """A client with alice's key; `services` is what the listener works on."""

    services: Services

    async def created(self, name: str = "acme", **policy: Any) -> int:
        """Make a tenant; returns its revision."""
        body = {"name": name, "policy": policy, "reason": "a new customer"}
        response = await self.post(f"{API}/tenants", json=body)
        assert response.status_code == 201, response.text
        revision: int = response.json()["revision"]
        return revision

    async def actions(self) -> list[str]:
        """Of the whole audit, the newest first."""
        page = (await self.get(f"{API}/audit", params={"limit": 500})).json()
        return [entry["action"] for entry in page["entries"]]


def error_of(response: Any) -> dict[str, Any]:
    """The error object, which must have exactly our shape."""
    body = response.json()
    assert set(body) == {"error"}
    assert {"message", "type", "param", "code"} <= set(body["error"])
    error: dict[str, Any] = body["error"]
    return error


Opened = Callable[..., AbstractAsyncContextManager[Admin]]


@pytest.fixture
def opened(fake_engine: FakeEngine) -> Opened:
    """Open an admin listener over a store, with settings of one's choice."""

    @asynccontextmanager
    async def open_admin(
        store: Store | None = None, engine: FakeEngine = fake_engine, **changes: Any
    ) -> AsyncIterator[Admin]:
        store = store or MemoryStore()
        settings = make_settings(**{"admin_keys": ADMIN_KEYS, **changes})
        services = build_services(settings, engine, store, store)
        services.bridge.bind(asyncio.get_running_loop())
        engine.start()
        await services.sync.look()
        app = create_admin_app(services)
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        headers = {"authorization": f"Bearer {KEY}"}
        async with Admin(
            transport=transport, base_url="http://127.0.0.1:8001", headers=headers
        ) as client:
            client.services = services
            yield client
        await services.vectors.close()
        services.pool.shutdown()

    return open_admin


@pytest.fixture
async def admin(opened: Opened) -> AsyncIterator[Admin]:
    async with opened() as client:
        yield client
