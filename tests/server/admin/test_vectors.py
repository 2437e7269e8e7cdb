"""Vector sets, aliases, replicas and a store that came back with other data, over HTTP."""

import json
from typing import Any

import pytest

from steering.errors import VectorError
from steering.stores.memory import MemoryStore
from steering.vectors import ShiftVectors
from tests.server.admin.conftest import API, Admin, Opened
from tests.server.fakes import NUM_LAYERS, make_vectors

pytestmark = pytest.mark.anyio
ALIAS = f"{API}/aliases/default"


async def put_vectors(admin: Admin, length: float = 0.5) -> str:
    return await admin.services.control.store.put_vectors(make_vectors(length).to_bytes())


async def test_a_set_is_shown_with_its_provenance_and_layers(admin: Admin) -> None:
    vector = await put_vectors(admin)
    await admin.put(ALIAS, json={"vector": vector, "reason": "first"})
    (view,) = (await admin.get(f"{API}/vectors")).json()["vectors"]
    assert (view["id"], view["aliases"], view["problem"]) == (vector, ["default"], None)
    assert view["manifest"]["model"]["model_id"] == "tiny"
    assert view["manifest"]["anchor_set"] == "test"
    assert view["created_at"] == "2026-01-01T00:00:00Z" and view["size_bytes"] > 0
    # Every layer's Delta has norm 0.5 * (layer + 1), every hidden norm is 10: see make_vectors.
    assert [layer["layer"] for layer in view["layers"]] == list(range(NUM_LAYERS))
    assert [layer["norm"] for layer in view["layers"]] == pytest.approx([0.5, 1.0, 1.5])
    assert [layer["relative_norm"] for layer in view["layers"]] == pytest.approx([0.05, 0.1, 0.15])
    assert [layer["consistency"] for layer in view["layers"]] == [1, 1, 1]


async def test_a_damaged_set_hides_no_other(opened: Opened) -> None:
    class DamagedStore(MemoryStore):
        damaged = ""

        async def get_vectors(self, vector_id: str) -> ShiftVectors:
            if vector_id == self.damaged:
                raise VectorError("a byte was flipped")
            return await super().get_vectors(vector_id)

    store = DamagedStore()
    async with opened(store) as admin:
        good, store.damaged = await put_vectors(admin, 0.5), await put_vectors(admin, 0.6)
        views = {view["id"]: view for view in (await admin.get(f"{API}/vectors")).json()["vectors"]}
        assert views[good]["problem"] is None and len(views[good]["layers"]) == NUM_LAYERS
        assert views[store.damaged]["layers"] is None
        assert "flipped" in views[store.damaged]["problem"]
        refused = await admin.put(ALIAS, json={"vector": store.damaged, "reason": "try"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "vectors_invalid")


async def test_an_alias_is_switched_under_its_revision(admin: Admin) -> None:
    one, two = await put_vectors(admin, 0.5), await put_vectors(admin, 0.6)
    first = await admin.put(ALIAS, json={"vector": one, "reason": "first", "revision": 0})
    assert first.json() == {"revision": 1}
    same = await admin.put(ALIAS, json={"vector": one, "reason": "again"})
    assert same.json() == {"revision": 1}
    stale = await admin.put(ALIAS, json={"vector": two, "reason": "late", "revision": 0})
    assert (stale.status_code, stale.json()["error"]["revision"]) == (409, 1)
    second = await admin.put(ALIAS, json={"vector": two, "reason": "better", "revision": 1})
    assert second.json() == {"revision": 2}
    shown = (await admin.get(f"{API}/aliases")).json()
    assert shown == {"aliases": [{"name": "default", "vector": two, "revision": 2}]}
    assert await admin.actions() == ["alias.set", "alias.set"]
    reverted = await admin.post(f"{API}/audit/2/revert", json={"reason": "worse"})
    assert reverted.status_code == 200
    assert (await admin.get(f"{API}/aliases")).json()["aliases"][0]["vector"] == one


@pytest.mark.parametrize(
    ("path", "vector", "status", "named"),
    [
        ("default", "a" * 64, 404, "a" * 64),
        ("default", "latest", 400, "vector"),
        ("%3Cb%3E", "a" * 64, 400, "alias"),
    ],
)
async def test_a_bad_alias_is_refused(
    admin: Admin, path: str, vector: str, status: int, named: str
) -> None:
    body = {"vector": vector, "reason": "try"}
    response = await admin.put(f"{API}/aliases/{path}", json=body)
    assert response.status_code == status
    assert named in response.json()["error"]["message"]
    assert await admin.actions() == []


async def test_replicas_say_what_they_have_and_who_is_behind(admin: Admin) -> None:
    await admin.created("a")
    await admin.created("b")
    store = admin.services.control.store
    own = json.dumps(admin.services.heartbeat._status())  # read before: at revision 0
    await store.heartbeat("fresh", json.dumps({"revision": 2, "kill": "none"}), 60)
    await store.heartbeat("old", own, 60)
    await store.heartbeat("strange", "not JSON", 60)
    await store.heartbeat("stranger", "[1]", 60)
    shown = (await admin.get(f"{API}/replicas")).json()
    assert shown["revision"] == 2
    by_name = {replica["name"]: replica for replica in shown["replicas"]}
    assert by_name["fresh"]["behind"] is False
    assert by_name["fresh"]["status"] == {"revision": 2, "kill": "none"}
    assert by_name["old"]["behind"] is True and by_name["old"]["status"]["local_kill"] == "none"
    for name in ("strange", "stranger"):
        assert (by_name[name]["behind"], by_name[name]["status"]) == (None, None)


# ------------------------------------------------------------------------- a store of other data


class ReplacedStore(MemoryStore):
    """One that can be emptied, as a server restarted without its data is."""

    def empty(self) -> None:
        self.__init__()  # type: ignore[misc]


async def emptied(admin: Admin, store: ReplacedStore, alpha: float = 0.8) -> None:
    """A replica with a tenant in force, and its store empty."""
    await admin.created("acme", alpha=alpha)
    await admin.services.sync.look()
    store.empty()
    await admin.created("other")
    await admin.services.sync.look()


async def state(admin: Admin) -> Any:
    return (await admin.get(f"{API}/store")).json()["state"]


async def test_an_operator_restores_what_is_in_force(opened: Opened) -> None:
    store = ReplacedStore()
    async with opened(store) as admin:
        await emptied(admin, store)
        assert await state(admin) == "foreign"
        assert (await admin.get(f"{API}/tenants/acme")).status_code == 404
        in_force = f"{API}/tenants/acme/in-force"
        assert (await admin.get(in_force)).json()["alpha"] == 0.8
        done = await admin.post(f"{API}/store/restore", json={"reason": "emptied by mistake"})
        assert done.status_code == 200
        await admin.services.sync.look()
        assert await state(admin) == "ok"
        assert (await admin.get(f"{API}/tenants/acme")).json()["policy"]["alpha"] == 0.8
        assert (await admin.get(f"{API}/tenants/other")).status_code == 404
        entry = (await admin.get(f"{API}/audit")).json()["entries"][0]
        assert (entry["action"], entry["by"]) == ("store.restore", "alice")


async def test_an_operator_adopts_what_the_store_says(opened: Opened) -> None:
    store = ReplacedStore()
    async with opened(store) as admin:
        await emptied(admin, store)
        done = await admin.post(f"{API}/store/adopt", json={"reason": "a new beginning"})
        assert done.status_code == 200
        await admin.services.sync.look()
        assert await state(admin) == "ok"
        assert (await admin.get(f"{API}/tenants/acme/in-force")).status_code == 404
        assert (await admin.get(f"{API}/tenants/other/in-force")).status_code == 200
        assert (await admin.actions())[0] == "store.adopt"


async def test_a_store_that_is_not_foreign_is_left_alone(admin: Admin) -> None:
    await admin.created("acme")
    await admin.services.sync.look()
    for what in ("adopt", "restore"):
        response = await admin.post(f"{API}/store/{what}", json={"reason": "try"})
        assert response.status_code == 400
    assert await admin.actions() == ["tenant.create"]
