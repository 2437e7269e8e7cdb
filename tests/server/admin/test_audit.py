"""Who, when, what, why, before and after; changing back; reasons; a restart."""

import time
from pathlib import Path
from typing import Any

import pytest

from steering.stores import open_store
from tests.server.admin.conftest import API, Admin, Opened

pytestmark = pytest.mark.anyio
POLICY = f"{API}/tenants/acme/policy"


async def entries(admin: Admin, **params: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await admin.get(f"{API}/audit", params=params)).json()["entries"]
    return found


async def changed(admin: Admin, alpha: float) -> int:
    """Change acme's alpha; returns the revision."""
    body = {"changes": {"alpha": alpha}, "reason": f"to {alpha:g}"}
    revision: int = (await admin.patch(POLICY, json=body)).json()["revision"]
    return revision


async def test_an_entry_says_who_when_what_why_before_and_after(admin: Admin) -> None:
    await admin.created("acme", alpha=0.8)
    revision = await changed(admin, 0.6)
    entry = (await entries(admin))[0]
    assert entry["at"] == pytest.approx(time.time(), abs=60)
    assert (entry["revision"], entry["by"], entry["via"]) == (revision, "alice", "api")
    assert (entry["action"], entry["reason"]) == ("policy.set", "to 0.6")
    (change,) = entry["changes"]
    assert change["document"] == "tenant/acme"
    assert change["before"]["policy"]["alpha"] == 0.8
    assert change["after"]["policy"]["alpha"] == 0.6


async def test_the_audit_comes_in_pages_and_by_tenant(admin: Admin) -> None:
    for name in ("acme", "other"):
        await admin.created(name)
    for alpha in (0.1, 0.2, 0.3):
        await changed(admin, alpha)
    assert [entry["revision"] for entry in await entries(admin)] == [5, 4, 3, 2, 1]
    first = (await admin.get(f"{API}/audit", params={"limit": 3})).json()
    assert [entry["revision"] for entry in first["entries"]] == [5, 4, 3] and first["next"] == 3
    rest = (await admin.get(f"{API}/audit", params={"limit": 3, "before": 3})).json()
    assert [entry["revision"] for entry in rest["entries"]] == [2, 1] and rest["next"] is None
    assert [entry["revision"] for entry in await entries(admin, tenant="other")] == [2]
    for bad in ({"limit": 0}, {"limit": 501}, {"before": 0}, {"tenant": "<b>"}, {"limit": "x"}):
        assert (await admin.get(f"{API}/audit", params=bad)).status_code == 400


async def test_a_change_is_reverted_once(admin: Admin) -> None:
    await admin.created("acme", alpha=0.8)
    revision = await changed(admin, 0.1)
    url = f"{API}/audit/{revision}/revert"
    reverted = await admin.post(url, json={"reason": "a mistake"})
    assert reverted.status_code == 200
    tenant = (await admin.get(f"{API}/tenants/acme")).json()
    assert (tenant["policy"]["alpha"], tenant["revision"]) == (0.8, reverted.json()["revision"])
    second = await admin.post(url, json={"reason": "a mistake"})
    assert second.status_code == 409
    assert second.json()["error"]["revision"] == reverted.json()["revision"]
    assert (await entries(admin))[0]["action"] == "revert"


async def test_a_deleted_tenant_comes_back_with_its_keys(admin: Admin) -> None:
    await admin.created("acme", alpha=0.8)
    await admin.post(f"{API}/tenants/acme/keys", json={"id": "k1", "reason": "a key"})
    gone = await admin.delete(f"{API}/tenants/acme", params={"reason": "wrong one"})
    url = f"{API}/audit/{gone.json()['revision']}/revert"
    assert (await admin.post(url, json={"reason": "sorry"})).status_code == 200
    tenant = (await admin.get(f"{API}/tenants/acme")).json()
    assert tenant["policy"]["alpha"] == 0.8
    assert [key["id"] for key in tenant["keys"]] == ["k1"]


async def test_what_never_was_cannot_be_reverted(admin: Admin) -> None:
    for revision, status in (("7", 404), ("0", 400), ("-1", 400), ("x", 400), ("9" * 30, 400)):
        response = await admin.post(f"{API}/audit/{revision}/revert", json={"reason": "try"})
        assert response.status_code == status, revision
        assert set(response.json()) == {"error"}


@pytest.mark.parametrize("reason", [None, "", "   ", "two\nlines", "a\x00b", "x" * 501])
async def test_every_change_needs_a_reason_of_one_line(admin: Admin, reason: str | None) -> None:
    await admin.created("acme")
    await admin.post(f"{API}/tenants/acme/keys", json={"id": "k1", "reason": "a key"})
    before = await admin.actions()
    why = {} if reason is None else {"reason": reason}
    tenant = f"{API}/tenants/acme"
    bodies: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", f"{API}/tenants", {"name": "other"}),
        ("PUT", POLICY, {"policy": {"alpha": 0.1}, "revision": 1}),
        ("PATCH", POLICY, {"changes": {"alpha": 0.1}}),
        ("POST", f"{tenant}/keys", {"id": "k2"}),
        ("POST", f"{tenant}/keys/k1/rotate", {"new_id": "k2", "overlap_s": 1}),
        ("PUT", f"{API}/aliases/default", {"vector": "a" * 64}),
        ("PUT", f"{API}/kill", {"action": "reject"}),
        ("PUT", f"{API}/kill", {"action": "reject", "scope": "replica"}),
        ("POST", f"{API}/audit/1/revert", {}),
        ("POST", f"{API}/store/adopt", {}),
        ("POST", f"{API}/store/restore", {}),
    ]
    answers = [await admin.request(method, url, json=body | why) for method, url, body in bodies]
    answers += [await admin.delete(url, params=why) for url in (tenant, f"{tenant}/keys/k1")]
    for response in answers:
        assert (response.status_code, response.json()["error"]["param"]) == (400, "reason")
    assert await admin.actions() == before
    assert admin.services.directory.local_kill == "none"


async def test_the_audit_survives_a_restart(opened: Opened, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'deshift.db'}"
    seen = []
    for _ in range(2):
        store = open_store(url)
        try:
            async with opened(store) as admin:
                if not seen:
                    await admin.created("acme", alpha=0.8)
                    await changed(admin, 0.6)
                seen.append(await entries(admin))
                tenant = (await admin.get(f"{API}/tenants/acme")).json()
                assert tenant["policy"]["alpha"] == 0.6
        finally:
            await store.close()
    assert seen[0] == seen[1] and [entry["action"] for entry in seen[1]] == [
        "policy.set",
        "tenant.create",
    ]
