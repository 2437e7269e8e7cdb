"""Who may operate: keys, attempts, hosts, headers; and the document of the API."""

import logging
import time
from typing import Any

import httpx
import pytest

from server.admin.auth import GUESS_DELAY_S, AdminAuth
from server.errors import AuthenticationError, RateLimitError
from tests.server.admin.conftest import API, KEY, Admin, Opened

pytestmark = pytest.mark.anyio
PATHS = [
    ("GET", "/tenants"),
    ("POST", "/tenants"),
    ("PUT", "/tenants/acme/policy"),
    ("GET", "/tenants/acme/in-force"),
    ("DELETE", "/tenants/acme/keys/k"),
    ("GET", "/vectors"),
    ("PUT", "/kill"),
    ("GET", "/audit"),
    ("GET", "/replicas"),
    ("POST", "/store/adopt"),
    ("POST", "/preview"),
    ("GET", "/openapi.json"),
    ("GET", "/nowhere"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic YTpi", f"Bearer {KEY}x", KEY])
async def test_every_path_needs_an_admin_key(
    admin: Admin, method: str, path: str, header: str | None
) -> None:
    headers = {"authorization": header} if header else {}
    del admin.headers["authorization"]
    response = await admin.request(method, API + path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


async def test_without_admin_keys_nobody_operates_and_the_answer_says_what_to_set(
    opened: Opened,
) -> None:
    async with opened(admin_keys=None) as admin:
        for method, path in PATHS:
            response = await admin.request(method, API + path)
            assert response.status_code == 403
            assert "DESHIFT_ADMIN_KEYS" in response.json()["error"]["message"]
        assert (await admin.get("/health")).status_code == 200
        assert (await admin.get("/ready")).status_code in (200, 503)


async def test_the_keys_of_clients_are_no_admin_keys(opened: Opened) -> None:
    async with opened(api_key="the-key-of-clients") as admin:
        await admin.created("acme")
        issued = await admin.post(
            f"{API}/tenants/acme/keys", json={"id": "k1", "reason": "first key"}
        )
        for key in ("the-key-of-clients", issued.json()["key"]):
            headers = {"authorization": f"Bearer {key}"}
            refused = await admin.get(f"{API}/tenants", headers=headers)
            assert refused.status_code == 401


async def test_the_status_pages_are_open(admin: Admin) -> None:
    del admin.headers["authorization"]
    assert (await admin.get("/health")).json()["status"] == "alive"
    assert (await admin.get("/ready")).status_code in (200, 503)


async def test_the_author_of_a_change_is_the_keys_owner(admin: Admin) -> None:
    await admin.created("acme")
    headers = {"authorization": "Bearer operator-key-of-bob1"}
    patch = {"changes": {"alpha": 0.1}, "reason": "too strong"}
    await admin.patch(f"{API}/tenants/acme/policy", json=patch, headers=headers)
    entries = (await admin.get(f"{API}/audit")).json()["entries"]
    assert [(entry["by"], entry["via"]) for entry in entries] == [("bob", "api"), ("alice", "api")]


async def test_wrong_keys_are_counted_and_right_ones_are_not(admin: Admin) -> None:
    for _ in range(20):
        assert (await admin.get(f"{API}/tenants")).status_code == 200
    wrong = {"authorization": "Bearer wrong"}
    answers = [await admin.get(f"{API}/tenants", headers=wrong) for _ in range(10)]
    started = time.monotonic()
    answers.append(await admin.get(f"{API}/tenants", headers=wrong))
    assert time.monotonic() - started >= GUESS_DELAY_S
    assert [each.status_code for each in answers] == [401] * 10 + [429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"


async def test_a_right_key_is_never_refused(admin: Admin) -> None:
    """Wrong keys from a client's address locked its right one out, the kill switch included."""
    transport: Any = admin._transport
    auth: AdminAuth = transport.app.state.auth
    for _ in range(12):
        with pytest.raises((AuthenticationError, RateLimitError)):
            auth.check_key("wrong", "127.0.0.1")
    body = {"action": "reject", "scope": "replica", "reason": "incident"}
    started = time.monotonic()
    assert (await admin.put(f"{API}/kill", json=body)).status_code == 200
    assert time.monotonic() - started < GUESS_DELAY_S
    assert admin.services.directory.kill == "reject"


def test_another_address_may_still_guess() -> None:
    auth = AdminAuth({"alice": KEY})
    for _ in range(10):
        with pytest.raises(AuthenticationError):
            auth.check_key("wrong", "10.0.0.1")
    with pytest.raises(RateLimitError):
        auth.check_key("wrong", "10.0.0.1")
    with pytest.raises(AuthenticationError):
        auth.check_key("wrong", "10.0.0.2")


def test_a_key_of_half_characters_is_a_wrong_one() -> None:
    """A form in an odd encoding can hold them; they were an internal error."""
    with pytest.raises(AuthenticationError):
        AdminAuth({"alice": KEY}).check_key("\ud800", "10.0.0.1")


@pytest.mark.parametrize("path", ["/health", f"{API}/tenants", f"{API}/nowhere", "/nowhere"])
@pytest.mark.parametrize("authorization", [f"Bearer {KEY}", "Bearer wrong"])
async def test_every_answer_has_its_headers(admin: Admin, path: str, authorization: str) -> None:
    response = await admin.get(path, headers={"authorization": authorization})
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["referrer-policy"] == "no-referrer"


async def test_no_key_reaches_the_log(admin: Admin, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await admin.created("acme")
    body = {"id": "k1", "reason": "first key"}
    issued = (await admin.post(f"{API}/tenants/acme/keys", json=body)).json()["key"]
    await admin.get(f"{API}/tenants", headers={"authorization": "Bearer a-wrong-secret-key"})
    assert "path='/admin/v1/tenants/acme/keys' status=201" in caplog.text
    for secret in (KEY, issued, "a-wrong-secret-key"):
        assert secret not in caplog.text


async def test_the_document_of_the_api_is_whole(admin: Admin) -> None:
    document = (await admin.get(f"{API}/openapi.json")).json()
    described = {
        f"{method.upper()} {path.removeprefix(API)}"
        for path, methods in document["paths"].items()
        for method in methods
    }
    assert {
        "GET /tenants",
        "POST /tenants",
        "GET /tenants/{name}",
        "DELETE /tenants/{name}",
        "PUT /tenants/{name}/policy",
        "PATCH /tenants/{name}/policy",
        "GET /tenants/{name}/in-force",
        "POST /tenants/{name}/keys",
        "POST /tenants/{name}/keys/{key_id}/rotate",
        "DELETE /tenants/{name}/keys/{key_id}",
        "GET /vectors",
        "GET /aliases",
        "PUT /aliases/{alias}",
        "GET /kill",
        "PUT /kill",
        "GET /audit",
        "POST /audit/{revision}/revert",
        "GET /replicas",
        "GET /store",
        "POST /store/adopt",
        "POST /store/restore",
        "POST /preview",
    } == described
    assert all(path.startswith(API) for path in document["paths"])
    text = str(document["paths"])
    assert "422" not in text and "HTTPValidationError" not in str(document)
    assert "HTTPBearer" in document["components"]["securitySchemes"]


async def test_no_page_needs_another_host(admin: Admin) -> None:
    for path in ("/docs", "/redoc", "/admin/docs"):
        assert (await admin.get(path)).status_code == 404


async def test_failures_are_counted_by_address(admin: Admin) -> None:
    transport: Any = admin._transport
    auth: AdminAuth = transport.app.state.auth
    for _ in range(12):
        with pytest.raises((AuthenticationError, RateLimitError)):
            auth.check_key("wrong", "127.0.0.1")
    elsewhere = httpx.ASGITransport(transport.app, client=("10.9.8.7", 1))
    async with httpx.AsyncClient(transport=elsewhere, base_url="http://127.0.0.1") as other:
        wrong = {"authorization": "Bearer wrong"}
        assert (await other.get(f"{API}/tenants", headers=wrong)).status_code == 401
        assert (await admin.get(f"{API}/tenants", headers=wrong)).status_code == 429
