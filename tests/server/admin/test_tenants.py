"""Tenants over HTTP: pages, names, bodies, what is in force."""

import time
from collections.abc import AsyncIterator

import pytest

from steering.stores.memory import MemoryStore
from tests.server.admin.conftest import API, Admin, Opened, error_of

pytestmark = pytest.mark.anyio
TENANTS = f"{API}/tenants"
BAD_NAMES = ["<script>alert(1)</script>", "a b", "a\r\nb", "a\x00", ".hidden", "x" * 65, "a/b", "ä"]


async def test_a_new_tenant_is_shown_with_its_policy_and_revision(admin: Admin) -> None:
    revision = await admin.created("acme", alpha=0.8, alpha_max=1.5)
    tenant = (await admin.get(f"{TENANTS}/acme")).json()
    assert (tenant["name"], tenant["revision"]) == ("acme", revision)
    assert (tenant["policy"]["alpha"], tenant["policy"]["alpha_max"]) == (0.8, 1.5)
    assert tenant["in_force"] == tenant["policy"] and tenant["until"] is None
    assert tenant["keys"] == [] and tenant["keys_revision"] == 0
    assert tenant["created_at"] == pytest.approx(time.time(), abs=60)


async def test_tenants_come_in_pages_by_name(admin: Admin) -> None:
    for name in ("c", "a", "e", "b", "d"):
        await admin.created(name)
    seen, after, sizes = [], "", []
    while True:
        page = (await admin.get(TENANTS, params={"limit": 2, "after": after})).json()
        seen += [tenant["name"] for tenant in page["tenants"]]
        sizes.append(len(page["tenants"]))
        assert page["revision"] == 5 and page["unreadable"] == {}
        if page["next"] is None:
            break
        after = page["next"]
    assert (seen, sizes) == (["a", "b", "c", "d", "e"], [2, 2, 1])


async def test_a_damaged_document_is_named_and_hides_no_other(opened: Opened) -> None:
    store = MemoryStore()
    async with opened(store) as admin:
        await admin.created("good")
        await store.commit({"tenant/bad": '{"policy": {"alpha": "much"}}'}, {}, "{}")
        page = (await admin.get(TENANTS)).json()
        assert [tenant["name"] for tenant in page["tenants"]] == ["good"]
        assert "alpha" in page["unreadable"]["tenant/bad"]
        damaged = await admin.get(f"{TENANTS}/bad")
        assert (damaged.status_code, error_of(damaged)["code"]) == (503, "store_damaged")


async def test_a_name_that_is_taken_is_a_409(admin: Admin) -> None:
    await admin.created("acme")
    again = await admin.post(TENANTS, json={"name": "acme", "reason": "again"})
    assert (again.status_code, error_of(again)["code"]) == (409, "already_exists")


@pytest.mark.parametrize("name", BAD_NAMES)
async def test_names_with_markup_or_control_characters_are_a_400(admin: Admin, name: str) -> None:
    made = await admin.post(TENANTS, json={"name": name, "reason": "try"})
    assert (made.status_code, error_of(made)["param"]) == (400, "name")
    assert "<script>" not in made.text
    assert await admin.actions() == []


@pytest.mark.parametrize("name", ["%3Cscript%3E", "a%0D%0Ab", "a%00", "%22%3E%3Cimg", "x" * 65])
@pytest.mark.parametrize("path", ["", "/policy", "/in-force"])
async def test_such_names_in_a_path_are_a_400(admin: Admin, name: str, path: str) -> None:
    if path == "/policy":
        body = {"changes": {"alpha": 1}, "reason": "try"}
        response = await admin.patch(f"{TENANTS}/{name}/policy", json=body)
    else:
        response = await admin.get(f"{TENANTS}/{name}{path}")
    assert (response.status_code, error_of(response)["param"]) == (400, "name")


async def test_an_unknown_tenant_is_a_404_everywhere(admin: Admin) -> None:
    change = {"policy": {}, "revision": 1, "reason": "try"}
    key = {"id": "k", "reason": "try"}
    rotation = {"new_id": "n", "overlap_s": 1, "reason": "try"}
    why = {"reason": "try"}
    for response in (
        await admin.get(f"{TENANTS}/none"),
        await admin.get(f"{TENANTS}/none/in-force"),
        await admin.delete(f"{TENANTS}/none", params=why),
        await admin.put(f"{TENANTS}/none/policy", json=change),
        await admin.patch(f"{TENANTS}/none/policy", json={"changes": {"alpha": 1}, **why}),
        await admin.post(f"{TENANTS}/none/keys", json=key),
        await admin.post(f"{TENANTS}/none/keys/k/rotate", json=rotation),
        await admin.delete(f"{TENANTS}/none/keys/k", params=why),
    ):
        assert (response.status_code, error_of(response)["code"]) == (404, "not_found")


@pytest.mark.parametrize("content", [b"", b"null", b'"text"', b"[1]", b"7", b"{", b"\xff{", b"NaN"])
async def test_a_body_that_is_no_object_is_a_400(admin: Admin, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = await admin.post(TENANTS, content=content, headers=headers)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"
    assert (await admin.get(TENANTS)).status_code == 200


async def test_not_a_number_and_half_characters_are_a_400(admin: Admin) -> None:
    headers = {"content-type": "application/json"}
    for content in (
        b'{"name": "acme", "policy": {"alpha": NaN}, "reason": "try"}',
        b'{"name": "acme", "reason": "\\ud800"}',
        b'{"name": "\\ud800", "reason": "try"}',
        b'{"name": "acme", "reason": "try", "\\ud800": 1}',
    ):
        response = await admin.post(TENANTS, content=content, headers=headers)
        assert response.status_code == 400, content
        error_of(response)
    assert await admin.actions() == []


async def test_another_content_type_is_a_400(admin: Admin) -> None:
    """A form of another site can send text/plain without asking anybody."""
    content = b'{"name": "acme", "reason": "try"}'
    response = await admin.post(TENANTS, content=content, headers={"content-type": "text/plain"})
    assert response.status_code == 400


async def test_a_deleted_tenant_is_gone_with_its_keys(admin: Admin) -> None:
    revision = await admin.created("acme")
    await admin.post(f"{TENANTS}/acme/keys", json={"id": "k1", "reason": "first key"})
    params = {"reason": "left us", "revision": revision}
    assert (await admin.delete(f"{TENANTS}/acme", params=params)).status_code == 200
    assert (await admin.get(f"{TENANTS}/acme")).status_code == 404
    assert (await admin.get(TENANTS)).json()["tenants"] == []


async def test_in_force_says_what_this_replica_does_now(admin: Admin) -> None:
    revision = await admin.created("acme", alpha=0.8, mode="sample")
    assert (await admin.get(f"{TENANTS}/acme/in-force")).status_code == 404  # not read yet
    await admin.services.sync.look()
    view = (await admin.get(f"{TENANTS}/acme/in-force")).json()
    assert (view["mode"], view["alpha"], view["revision"]) == ("sample", 0.8, revision)
    assert (view["kill"], view["store"]) == ("none", "ok")
    assert 0 <= view["age_s"] < 60
    patch = {"changes": {"alpha": 0}, "reason": "stop"}
    await admin.patch(f"{TENANTS}/acme/policy", json=patch)
    assert (await admin.get(f"{TENANTS}/acme/in-force")).json()["alpha"] == 0.8  # still
    await admin.services.sync.look()
    after = (await admin.get(f"{TENANTS}/acme/in-force")).json()
    assert (after["mode"], after["alpha"], after["revision"]) == ("off", 0, revision + 1)


async def test_the_default_tenant_is_in_force_without_a_document(admin: Admin) -> None:
    view = (await admin.get(f"{TENANTS}/default/in-force")).json()
    assert (view["alpha"], view["revision"], view["vector"]) == (0.5, 0, None)


@pytest.mark.parametrize("is_declared", [True, False])
async def test_a_body_over_the_limit_is_a_413(opened: Opened, is_declared: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield b" " * 1000

    async with opened(max_body_bytes=2000) as admin:
        content = b" " * 4000 if is_declared else pieces()
        headers = {"content-type": "application/json"}
        response = await admin.post(TENANTS, content=content, headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")
        assert admin.services.bodies.held == 0
