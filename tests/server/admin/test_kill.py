"""The kill switch over HTTP: the fleet's, and this replica's own without a store."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence

import pytest

from steering.errors import ReadOnlyError, StoreError
from steering.stores.base import Changes, Document
from steering.stores.memory import MemoryStore
from tests.server.admin.conftest import API, Admin, Opened

pytestmark = pytest.mark.anyio
KILL = f"{API}/kill"


class HungStore(MemoryStore):
    """One behind a network that swallows everything, from `is_hung` on."""

    is_hung = False

    async def changes(self, since: int = 0) -> Changes:
        if self.is_hung:
            await asyncio.sleep(60)
        return await super().changes(since)


class LostStore(MemoryStore):
    """One that can be lost, and come back."""

    is_lost = False

    async def changes(self, since: int = 0) -> Changes:
        self._check()
        return await super().changes(since)

    async def get(self, keys: Sequence[str]) -> dict[str, Document]:
        self._check()
        return await super().get(keys)

    async def commit(
        self, writes: Mapping[str, str | None], expected: Mapping[str, int], audit: str
    ) -> int:
        self._check()
        return await super().commit(writes, expected, audit)

    def _check(self) -> None:
        if self.is_lost:
            raise StoreError("the store does not answer")


async def test_the_fleets_switch_is_set_once_and_taken_back(admin: Admin) -> None:
    set_ = await admin.put(KILL, json={"action": "reject", "reason": "incident"})
    assert set_.json() == {
        "fleet": {"action": "reject", "revision": 1},
        "replica": "none",
        "problem": None,
    }
    again = await admin.put(KILL, json={"action": "reject", "reason": "incident"})
    assert again.json() == set_.json() == (await admin.get(KILL)).json()
    await admin.services.sync.look()
    assert admin.services.directory.kill == "reject"
    body = {"action": "none", "reason": "over", "revision": 1}
    assert (await admin.put(KILL, json=body)).json()["fleet"] == {"action": "none", "revision": 2}
    assert await admin.actions() == ["kill.set", "kill.set"]


async def test_a_stale_revision_of_the_switch_is_a_409(admin: Admin) -> None:
    await admin.put(KILL, json={"action": "reject", "reason": "incident"})
    late = {"action": "none", "reason": "over", "revision": 0}
    response = await admin.put(KILL, json=late)
    assert (response.status_code, response.json()["error"]["revision"]) == (409, 1)
    assert (await admin.get(KILL)).json()["fleet"]["action"] == "reject"


async def test_tenants_keep_their_values_under_the_switch(admin: Admin) -> None:
    await admin.created("acme", alpha=0.8)
    await admin.put(KILL, json={"action": "unsteered", "reason": "incident"})
    await admin.services.sync.look()
    view = (await admin.get(f"{API}/tenants/acme/in-force")).json()
    assert (view["alpha"], view["kill"]) == (0.8, "unsteered")


async def test_the_replicas_own_switch_works_while_the_store_is_down(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "deshift.admin")
    store = LostStore()
    async with opened(store) as admin:
        store.is_lost = True
        fleet = await admin.put(KILL, json={"action": "reject", "reason": "incident"})
        assert fleet.status_code == 503
        assert fleet.json()["error"]["code"] == "store_unavailable"
        assert admin.services.directory.kill == "none"
        body = {"action": "reject", "scope": "replica", "reason": "incident 7"}
        own = await admin.put(KILL, json=body)
        assert own.status_code == 200
        assert own.json() == {
            "fleet": None,
            "replica": "reject",
            "problem": "the store does not answer",
        }
        assert admin.services.directory.kill == "reject"
        (line,) = [each for each in caplog.messages if each.startswith("kill switch")]
        assert "reject" in line and "alice" in line and "incident 7" in line
        store.is_lost = False
        assert (await admin.get(KILL)).json()["replica"] == "reject"
        await admin.put(KILL, json=body | {"action": "none"})
        assert admin.services.directory.kill == "none"
        assert await admin.actions() == []  # the log has it, the audit has not


async def test_the_replicas_own_switch_does_not_wait_for_a_store_that_hangs(opened: Opened) -> None:
    """Its answer came after the command had given up, as if nothing had been done."""
    store = HungStore()
    async with opened(store) as admin:
        store.is_hung = True
        started = time.monotonic()
        body = {"action": "reject", "scope": "replica", "reason": "incident"}
        response = await admin.put(KILL, json=body)
        assert time.monotonic() - started < 3
        assert (response.status_code, response.json()["replica"]) == (200, "reject")
        assert response.json()["fleet"] is None and "did not answer" in response.json()["problem"]


async def test_the_switch_needs_no_room_among_clients_bodies(admin: Admin) -> None:
    """Under a load that filled the budget of bodies, it was refused with a 429."""
    bodies = admin.services.bodies
    bodies.held = bodies.max_bytes
    response = await admin.put(KILL, json={"action": "reject", "reason": "incident"})
    assert response.status_code == 200


async def test_the_replicas_own_switch_has_no_revision(admin: Admin) -> None:
    body = {"action": "reject", "scope": "replica", "reason": "incident", "revision": 0}
    response = await admin.put(KILL, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "revision")
    assert admin.services.directory.local_kill == "none"


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"action": "stop"}, "action"), ({"scope": "all"}, "scope"), ({"revision": -1}, "revision")],
)
async def test_a_bad_switch_is_a_400(admin: Admin, fields: dict[str, str], param: str) -> None:
    response = await admin.put(KILL, json={"action": "reject", "reason": "try", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_everything_else_is_a_503_while_the_store_is_down(opened: Opened) -> None:
    store = LostStore()
    async with opened(store) as admin:
        await admin.created("acme")
        await admin.services.sync.look()
        store.is_lost = True
        await admin.services.sync.look()
        for response in (
            await admin.get(f"{API}/tenants"),
            await admin.get(f"{API}/tenants/acme"),
            await admin.post(f"{API}/tenants", json={"name": "other", "reason": "try"}),
            await admin.get(f"{API}/replicas"),
        ):
            assert response.status_code == 503 and "retry-after" in response.headers
        in_force = (await admin.get(f"{API}/tenants/acme/in-force")).json()
        assert (in_force["store"], in_force["revision"]) == ("unreachable", 1)
        assert (await admin.get(f"{API}/store")).json()["state"] == "unreachable"


async def test_credentials_that_may_only_read_are_a_403(opened: Opened) -> None:
    class ReadOnlyStore(MemoryStore):
        async def commit(self, *_: object) -> int:
            raise ReadOnlyError("this user may not write")

    async with opened(ReadOnlyStore()) as admin:
        response = await admin.post(f"{API}/tenants", json={"name": "acme", "reason": "try"})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "store_read_only")
