"""Request id, key, body limit, in-flight count and log, for every path."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.middleware import BodyLimit
from server.services import BodyBudget
from tests.server.fakes import FakeEngine, chat_body

PATH = "/v1/chat/completions"
KEY = "s3cret-key"


def error_of(response: object) -> dict[str, str | None]:
    body = response.json()  # type: ignore[attr-defined]
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_every_answer_has_a_request_id_and_a_harmless_one_is_kept(client: TestClient) -> None:
    assert client.get("/health", headers={"x-request-id": "abc-1.2"}).headers["x-request-id"] == (
        "abc-1.2"
    )
    made = client.get("/nowhere").headers["x-request-id"]
    assert len(made) == 32 and made != client.get("/nowhere").headers["x-request-id"]


@pytest.mark.parametrize("bad", ["a b", "x" * 65, "<script>", "", "a\tb", "é"])
def test_a_request_id_that_could_break_a_log_or_a_page_is_replaced(
    client: TestClient, bad: str
) -> None:
    response = client.get("/health", headers={"x-request-id": bad.encode("latin-1")})
    assert response.headers["x-request-id"] != bad
    assert len(response.headers["x-request-id"]) == 32


def test_no_line_can_be_forged_in_the_log(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client.get("/x%0d%0arequest_id=forged%20status=200")
    (line,) = [r.getMessage() for r in caplog.records if r.name == "deshift.requests"]
    assert "\n" not in line and "\r" not in line
    assert r"path='/x\r\nrequest_id=forged status=200' status=404" in line


def test_one_line_a_request_says_what_happened_and_not_what_was_said(
    client_for: Callable[..., TestClient],
    fake_engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    client = client_for(api_key=KEY)
    body = chat_body("PROMPT", images=1)
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": "r1"}
    assert client.post(PATH, json=body, headers=headers).status_code == 200
    client.post(PATH, json=body, headers={"authorization": "Bearer WRONG"})
    client.post(PATH, json=body | {"temperature": "PROMPT"}, headers=headers)
    lines = [r.getMessage() for r in caplog.records if r.name == "deshift.requests"]
    assert len(lines) == 3
    assert "request_id=r1" in lines[0] and "status=200" in lines[0]
    assert "prompt_tokens=16 completion_tokens=3" in lines[0]
    assert "steering=mode=dataset;alpha=0.5" in lines[0]
    for secret in ("PROMPT", "Hello", KEY, "WRONG", "base64", "iVBOR"):
        assert secret not in caplog.text
    assert len(fake_engine.requests) == 1


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Basic {KEY}", KEY, f"Bearer {KEY[:-1]}",
     "Bearer \xe9"],
)  # fmt: skip
def test_without_the_key_nothing_but_the_status_paths_answers(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine, header: str | None
) -> None:
    client = client_for(api_key=KEY)
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    for method, path in (("POST", PATH), ("GET", "/v1/models"), ("GET", "/nowhere")):
        response = client.request(method, path, headers=headers, content=b"{}")
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert "x-request-id" in response.headers
    assert client.get("/health", headers=headers).status_code == 200
    assert client.get("/ready", headers=headers).status_code == 200
    assert not fake_engine.requests


def test_with_the_key_it_answers(client_for: Callable[..., TestClient]) -> None:
    client = client_for(api_key=KEY)
    response = client.post(PATH, json=chat_body(), headers={"authorization": f"bearer  {KEY}"})
    assert response.status_code == 200


def test_a_declared_body_over_the_limit_is_refused_before_it_is_read(
    client_for: Callable[..., TestClient],
) -> None:
    client = client_for(max_body_bytes=1024)
    response = client.post(PATH, json=chat_body("x" * 2000))
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert client.post(PATH, json=chat_body("x" * 50)).status_code == 200


def test_a_length_that_is_only_declared_keeps_nobody_out() -> None:
    """Sixteen connections that sent nothing held the whole budget for as long as they liked."""
    budget, held = BodyBudget(4096), []

    async def app(*_: Any) -> None:
        held.append(budget.held)

    scope = {"type": "http", "state": {}, "headers": [(b"content-length", b"4096")]}
    asyncio.run(BodyLimit(app, 4096, budget)(scope, _no_message, _no_message))
    assert held == [0] and budget.held == 0


async def _no_message(*_: Any) -> Any:
    raise AssertionError("nothing is read or sent")


def test_a_body_over_the_limit_is_refused_also_when_its_length_is_not_declared(
    client_for: Callable[..., TestClient],
) -> None:
    client = client_for(max_body_bytes=1024)
    read = []

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            read.append(1)
            yield b" " * 100

    headers = {"content-type": "application/json"}
    response = client.post(PATH, content=pieces(), headers=headers)
    assert response.status_code == 413
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", PATH, 405), ("POST", "/health", 405), ("GET", "/v1/chat", 404), ("GET", "/docs", 404),
     ("GET", "/openapi.json", 404), ("POST", "/v1/completions", 404), ("GET", PATH + "/", 404),
     ("GET", "/v1/models/none", 404), ("OPTIONS", PATH, 405)],
)  # fmt: skip
def test_wrong_paths_and_methods_have_openais_error_shape(
    client: TestClient, method: str, path: str, status: int
) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(
    ("content", "content_type"),
    [(b"{}", "text/plain"), (b"{}", ""), (b"a=b", "application/x-www-form-urlencoded"),
     (b'"text"', "application/json"), (b"[]", "application/json"), (b"5", "application/json"),
     (b"null", "application/json"), (b"", "application/json"), (b"\xff", "application/json"),
     (b'{"temperature": NaN}', "application/json"), (b"{}", "application/json; charset=utf-8")],
)  # fmt: skip
def test_a_body_that_is_no_request_is_a_400_and_the_server_still_works(
    client: TestClient, content: bytes, content_type: str
) -> None:
    response = client.post(PATH, content=content, headers={"content-type": content_type})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"
    assert client.post(PATH, json=chat_body()).status_code == 200


def test_the_count_in_flight_returns_to_zero_whatever_happened(
    client: TestClient, fake_engine: FakeEngine
) -> None:
    in_flight = client.app.state.services.in_flight  # type: ignore[attr-defined]
    client.post(PATH, json=chat_body())
    client.post(PATH, json=chat_body(stream=True))
    client.post(PATH, content=b"{")
    fake_engine.prepare_error = RuntimeError("boom")
    assert client.post(PATH, json=chat_body()).status_code == 500
    assert in_flight.count == 0


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:9"],
)
def test_a_loopback_host_is_served(client: TestClient, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", PATH, "/nowhere"])
@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "",
     "192.168.0.2:8000", "[::2]", "[localhost]x", "127.0.0.1:8000:1", "user@localhost"],
)  # fmt: skip
def test_another_sites_name_that_resolves_to_loopback_is_refused(
    client: TestClient, fake_engine: FakeEngine, path: str, host: str
) -> None:
    """DNS rebinding: a page on evil.example made to resolve to 127.0.0.1 could use the server."""
    response = client.post(path, json=chat_body(), headers={"host": host})
    assert response.status_code == 403
    assert error_of(response)["code"] == "host_not_allowed"
    assert not fake_engine.requests


def test_with_a_key_any_host_will_do(client_for: Callable[..., TestClient]) -> None:
    headers = {"authorization": f"Bearer {KEY}", "host": "models.example"}
    assert client_for(api_key=KEY).get("/v1/models", headers=headers).status_code == 200
