"""The console's sessions: made, ended, made up; and forms that other sites forge."""

from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from server.admin.auth import (
    SESSION_S,
    AdminAuth,
    CsrfError,
    check_csrf,
    cookie_name,
    csrf_token_of,
    log_in,
    log_out,
    operator_of,
)
from server.errors import AuthenticationError
from tests.server.admin.conftest import API, KEY, Admin

pytestmark = pytest.mark.anyio


def make_request(admin: Admin, cookie: str = "", scheme: str = "http", **headers: str) -> Request:
    """As the console's handlers see it."""
    transport: Any = admin._transport
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    if cookie:
        raw.append((b"cookie", cookie.encode()))
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/login",
        "query_string": b"",
        "headers": raw,
        "scheme": scheme,
        "server": ("127.0.0.1", 8001),
        "client": ("127.0.0.1", 5000),
        "app": transport.app,
    }
    return Request(scope)


def logged_in(admin: Admin) -> str:
    """The cookie of a new session of alice's, as a browser sends it."""
    response = Response()
    assert log_in(make_request(admin), response, KEY) == "alice"
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/" in cookie
    assert KEY not in cookie
    return cookie.partition(";")[0]


async def test_a_session_makes_an_operator(admin: Admin) -> None:
    cookie = logged_in(admin)
    operator = operator_of(make_request(admin, cookie))
    assert (operator.name, operator.via) == ("alice", "console")
    assert cookie.startswith(f"{cookie_name(make_request(admin))}=")
    assert "8001" in cookie_name(make_request(admin))


async def test_a_session_cookie_is_secure_over_https(admin: Admin) -> None:
    for scheme, expected in (("http", False), ("https", True)):
        response = Response()
        log_in(make_request(admin, scheme=scheme), response, KEY)
        assert ("Secure" in response.headers["set-cookie"]) == expected


async def test_a_wrong_key_logs_nobody_in(admin: Admin) -> None:
    response = Response()
    with pytest.raises(AuthenticationError):
        log_in(make_request(admin), response, "wrong")
    assert "set-cookie" not in response.headers


async def test_a_logged_out_session_is_nobodys_even_as_a_copy(admin: Admin) -> None:
    cookie = logged_in(admin)
    log_out(make_request(admin, cookie), Response())
    with pytest.raises(AuthenticationError):
        operator_of(make_request(admin, cookie))


@pytest.mark.parametrize("text", ["", "x", ".", "x.y", "ü.ü", "YQ==.", "alice|99999999999|n."])
async def test_a_made_up_session_is_nobodys(admin: Admin, text: str) -> None:
    auth: AdminAuth = make_request(admin).app.state.auth
    assert auth.session_operator(text) is None


def test_a_changed_session_is_nobodys() -> None:
    auth = AdminAuth({"alice": KEY})
    session = auth.new_session("alice")
    assert auth.session_operator(session) == "alice"
    for position in range(len(session)):
        other = "B" if session[position] == "A" else "A"
        assert auth.session_operator(session[:position] + other + session[position + 1 :]) is None
    assert AdminAuth({"alice": KEY}).session_operator(session) is None  # another process


def test_a_session_ends_after_its_time() -> None:
    clock = [1000.0]
    auth = AdminAuth({"alice": KEY}, now=lambda: clock[0])
    session = auth.new_session("alice")
    clock[0] += SESSION_S - 1
    assert auth.session_operator(session) == "alice"
    clock[0] += 1
    assert auth.session_operator(session) is None


async def test_a_form_needs_the_token_of_its_own_session(admin: Admin) -> None:
    mine, other = (make_request(admin, logged_in(admin)) for _ in range(2))
    check_csrf(mine, csrf_token_of(mine))
    for token in ("", "x", csrf_token_of(other)):
        with pytest.raises(CsrfError):
            check_csrf(mine, token)


async def test_a_session_changes_through_the_api_only_with_its_token(admin: Admin) -> None:
    """A browser sends the cookie with other sites' requests, too; the header it does not."""
    del admin.headers["authorization"]
    cookie = logged_in(admin)
    headers = {"cookie": cookie}
    assert (await admin.get(f"{API}/tenants", headers=headers)).status_code == 200
    body = {"name": "acme", "reason": "a new customer"}
    forged = await admin.post(f"{API}/tenants", json=body, headers=headers)
    assert (forged.status_code, forged.json()["error"]["code"]) == (403, "csrf_token_invalid")
    headers["x-csrf-token"] = csrf_token_of(make_request(admin, cookie))
    assert (await admin.post(f"{API}/tenants", json=body, headers=headers)).status_code == 201
    entries = (await admin.get(f"{API}/audit", headers=headers)).json()["entries"]
    assert (entries[0]["by"], entries[0]["via"]) == ("alice", "console")
