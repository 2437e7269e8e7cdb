"""A tenant's API keys over HTTP: shown once, rotated with an overlap, revoked."""

import time
from typing import Any

import pytest

from steering.stores.memory import MemoryStore
from tests.server.admin.conftest import API, Admin, Opened

pytestmark = pytest.mark.anyio
KEYS = f"{API}/tenants/acme/keys"


async def issue(admin: Admin, key_id: str = "k1", **fields: Any) -> dict[str, Any]:
    body = {"id": key_id, "reason": "a key", **fields}
    response = await admin.post(KEYS, json=body)
    assert response.status_code == 201, response.text
    issued: dict[str, Any] = response.json()
    return issued


async def owner(admin: Admin, key: str, at: float | None = None) -> str | None:
    """The tenant that the data plane takes a key for."""
    await admin.services.sync.look()
    found = admin.services.directory.authenticate(key, time.time() if at is None else at)
    return None if found is None else found.tenant


async def test_a_key_is_shown_once_and_good_at_once(opened: Opened) -> None:
    store = MemoryStore()
    async with opened(store) as admin:
        await admin.created("acme")
        issued = await issue(admin)
        assert await owner(admin, issued["key"]) == "acme"
        tenant = await admin.get(f"{API}/tenants/acme")
        (shown,) = tenant.json()["keys"]
        assert set(shown) == {"id", "created_at", "expires_at", "is_valid"}
        assert (shown["id"], shown["is_valid"]) == ("k1", True)
        assert tenant.json()["keys_revision"] == issued["revision"]
        held = await store.get(["keys/acme"])
        digest = str(held["keys/acme"].value).partition('"digest":"')[2][:64]
        for answer in (tenant, await admin.get(f"{API}/audit"), await admin.get(f"{API}/tenants")):
            assert issued["key"] not in answer.text
            assert digest not in answer.text and "digest" not in answer.text


async def test_a_key_may_have_an_end(admin: Admin) -> None:
    await admin.created("acme")
    issued = await issue(admin, expires_in_s=100)
    assert issued["expires_at"] == pytest.approx(time.time() + 100, abs=30)
    assert await owner(admin, issued["key"], at=issued["expires_at"] - 1) == "acme"
    assert await owner(admin, issued["key"], at=issued["expires_at"]) is None


async def test_both_keys_are_good_while_a_rotation_overlaps(admin: Admin) -> None:
    await admin.created("acme")
    old = await issue(admin)
    body = {"new_id": "k2", "overlap_s": 300, "reason": "every quarter"}
    response = await admin.post(f"{KEYS}/k1/rotate", json=body)
    assert response.status_code == 201
    new = response.json()
    now = time.time()
    assert await owner(admin, old["key"], now) == await owner(admin, new["key"], now) == "acme"
    assert await owner(admin, old["key"], now + 301) is None
    assert await owner(admin, new["key"], now + 301) == "acme"


async def test_a_revoked_key_is_good_for_nothing_and_may_be_revoked_again(admin: Admin) -> None:
    await admin.created("acme")
    issued = await issue(admin)
    answers = [await admin.delete(f"{KEYS}/k1", params={"reason": "leaked"}) for _ in range(2)]
    assert [each.status_code for each in answers] == [200, 200]
    assert answers[0].json() == answers[1].json() != {"revision": issued["revision"]}
    assert await owner(admin, issued["key"]) is None
    assert await admin.actions() == ["key.revoke", "key.create", "tenant.create"]
    (shown,) = (await admin.get(f"{API}/tenants/acme")).json()["keys"]
    assert not shown["is_valid"]


async def test_a_stale_keys_revision_is_a_409_on_every_path(admin: Admin) -> None:
    await admin.created("acme")
    stale = (await issue(admin, "k1"))["revision"]
    now = (await issue(admin, "k2", revision=stale))["revision"]
    why = {"reason": "late", "revision": stale}
    for response in (
        await admin.post(KEYS, json={"id": "k3", **why}),
        await admin.post(f"{KEYS}/k1/rotate", json={"new_id": "k3", "overlap_s": 1, **why}),
        await admin.delete(f"{KEYS}/k1", params=why),
    ):
        assert response.status_code == 409
        assert response.json()["error"]["revision"] == now
    tenant = (await admin.get(f"{API}/tenants/acme")).json()
    assert [(key["id"], key["is_valid"]) for key in tenant["keys"]] == [("k1", True), ("k2", True)]


async def test_an_id_that_is_taken_is_a_409_and_an_unknown_one_a_404(admin: Admin) -> None:
    await admin.created("acme")
    await issue(admin)
    again = await admin.post(KEYS, json={"id": "k1", "reason": "again"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "already_exists")
    missing = await admin.delete(f"{KEYS}/none", params={"reason": "leaked"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"id": "<b>"}, "id"),
        ({"id": "a\nb"}, "id"),
        ({"expires_in_s": 0}, "expires_in_s"),
        ({"expires_in_s": 1e12}, "expires_in_s"),
        ({"reason": " "}, "reason"),
    ],
)
async def test_a_bad_key_is_a_400(admin: Admin, fields: dict[str, Any], param: str) -> None:
    await admin.created("acme")
    response = await admin.post(KEYS, json={"id": "k1", "reason": "a key", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
