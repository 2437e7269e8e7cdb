"""A console on a real socket over a real store, and one Chromium for all of its tests."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from server.admin.app import create_admin_app
from server.app import build_services, following
from server.control import Author, Control
from server.documents import PolicyFields
from server.services import Services
from steering.stores.memory import MemoryStore
from tests.server.conftest import make_settings, wait_until
from tests.server.fakes import FakeEngine, make_vectors

CHROMIUM = Path("/usr/bin/chromium")
KEY = "operator-key-of-alice"
BOBS_KEY = "operator-key-of-bob1"
SETUP = Author("setup", "first filling", "setup")


class Console:
    """The admin listener in a thread, following its store as a server does."""

    def __init__(self, engine: FakeEngine, **changes: Any) -> None:
        keys = f"alice:{KEY},bob:{BOBS_KEY}"
        settings = make_settings(
            **{"admin_keys": keys, "replica": "one", "sync_interval_s": 0.1, **changes}
        )
        self.store = MemoryStore()
        self.control = Control(self.store)
        self.engine = engine
        self.services: Services = build_services(settings, engine, self.store, self.store)
        app = create_admin_app(self.services)
        config = uvicorn.Config(app, port=0, log_level="warning", ws="none")
        self._server = uvicorn.Server(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.services.bridge.bind(self._loop)
        self.engine.start()
        async with following(self.services):
            await self._server.serve()

    def start(self) -> None:
        self._thread.start()
        wait_until(lambda: self._server.started)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive(), "the console did not stop"
        self.services.pool.shutdown()

    def do(self, coroutine: Any) -> Any:
        """Run it where the store lives, and wait for it."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def create(self, name: str = "acme", **policy: Any) -> int:
        fields = PolicyFields.model_validate(policy)
        revision: int = self.do(self.control.create_tenant(name, fields, SETUP))
        return revision

    def set_policy(self, name: str = "acme", by: str = "bob", **policy: Any) -> int:
        author = Author(by, f"changed by {by}", "api")
        fields = PolicyFields.model_validate(policy)
        revision: int = self.do(self.control.set_policy(name, fields, None, author))
        return revision

    def policy(self, name: str = "acme") -> PolicyFields:
        fields: PolicyFields = self.do(self.control.tenant(name)).document.policy
        return fields

    def is_in_step(self, name: str) -> bool:
        """Whether the replica's last heartbeat told the store's newest revision."""
        told = json.loads(self.do(self.store.replicas()).get(name, "{}"))
        newest: int = self.do(self.store.changes()).revision
        return told.get("revision") == newest

    def beat(self, name: str, **changes: Any) -> None:
        """A heartbeat of another replica, in step but for `changes`."""
        status = {
            "replica": name,
            "revision": self.services.sync.status.revision,
            "epoch": self.services.sync.status.epoch,
            "age_s": 0.2,
            "store": "ok",
            "problem": None,
            "model": "tiny",
            "version": "0",
            "started_at": time.time(),
            "kill": "none",
            "local_kill": "none",
            "vectors": dict(self.services.directory.aliases),
            "problems": [],
            "running": 1,
            "waiting": 0,
        }
        self.do(self.store.heartbeat(name, json.dumps(status | changes), 60.0))


@pytest.fixture
def console(fake_engine: FakeEngine) -> Iterator[Console]:
    """With one vector set under the alias `default`, and no tenants."""
    console = Console(fake_engine)
    console.start()
    try:
        vector_id = console.do(console.store.put_vectors(make_vectors().to_bytes()))
        console.do(console.control.activate("default", vector_id, SETUP))
        wait_until(lambda: bool(console.services.vectors.ids))
        yield console
    finally:
        console.stop()
