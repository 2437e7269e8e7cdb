"""POST /v1/chat/completions: what is refused, fails or takes too long or too much memory."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.engine.types import (
    Failed,
    InputError,
    NotAcceptingError,
    PromptTooLongError,
    QueueFullError,
    TextEvent,
)
from tests.server.conftest import wait_until
from tests.server.fakes import FakeEngine, chat_body, plays, says

PATH = "/v1/chat/completions"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (PromptTooLongError("150 tokens; the limit is 100"), 400, "context_length_exceeded"),
        (QueueFullError("full"), 429, "queue_full"),
        (NotAcceptingError("no"), 503, "service_unavailable"),
        (InputError("bad"), 400, None),
    ],
)
def test_what_the_engine_refuses_has_its_status(
    client: TestClient,
    fake_engine: FakeEngine,
    error: Any,
    status: int,
    code: str | None,
    stream: bool,
) -> None:
    fake_engine.refusal = error
    response = client.post(PATH, json=chat_body(stream=stream))
    assert response.status_code == status
    assert response.json()["error"]["message"] == str(error)
    assert response.json()["error"]["code"] == code
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_what_the_engine_refuses_names_the_field_at_fault(
    client: TestClient, fake_engine: FakeEngine
) -> None:
    """Every refusal of the engine's was blamed on `messages`, a wrong logit_bias too."""
    fake_engine.refusal = InputError("no such token", param="logit_bias")
    assert client.post(PATH, json=chat_body()).json()["error"]["param"] == "logit_bias"
    fake_engine.refusal = InputError("no such template")
    assert client.post(PATH, json=chat_body()).json()["error"]["param"] == "messages"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("kind", "retried"), [("timeout", 0), ("engine", 0), ("draining", 1)])
def test_what_has_cost_a_generation_is_not_to_be_retried(
    client: TestClient, fake_engine: FakeEngine, kind: Any, retried: int, stream: bool
) -> None:
    """OpenAI's clients repeat 408 and 500 twice: a request that timed out cost three times 600 s.

    Another replica may well answer what a shutdown cut off.
    """
    fake_engine.script = plays(Failed(kind, "why"))
    response = client.post(PATH, json=chat_body(stream=stream))
    assert response.headers.get("x-should-retry") == (None if retried else "false")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("kind", "status"), [("timeout", 408), ("draining", 503), ("engine", 500)])
def test_a_failure_before_the_first_token_is_a_status_also_of_a_stream(
    client: TestClient, fake_engine: FakeEngine, kind: Any, status: int, stream: bool
) -> None:
    fake_engine.script = plays(Failed(kind, "why"))
    response = client.post(PATH, json=chat_body(stream=stream))
    assert response.status_code == status
    assert response.json() == {
        "error": {
            "message": "why",
            "type": "server_error",
            "param": None,
            "code": f"generation_{kind}",
        }
    }


def test_a_failure_in_mid_stream_is_an_error_event_and_the_end(
    client: TestClient, fake_engine: FakeEngine
) -> None:
    fake_engine.script = plays(TextEvent(0, "Hel"), Failed("engine", "broken"))
    response = client.post(PATH, json=chat_body(stream=True))
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert json.loads(events[-2])["choices"][0]["delta"]["content"] == "Hel"
    assert json.loads(events[-1])["error"]["message"] == "broken"
    assert client.post(PATH, json=chat_body()).status_code == 500


def test_an_unforeseen_error_is_a_500_that_gives_nothing_away(
    client: TestClient, fake_engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    fake_engine.prepare_error = RuntimeError("secret detail")
    response = client.post(PATH, json=chat_body())
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"
    assert response.headers["x-request-id"] in caplog.text
    fake_engine.prepare_error = None
    assert client.post(PATH, json=chat_body()).status_code == 200


def test_an_unknown_model_is_a_404(client: TestClient) -> None:
    response = client.post(PATH, json=chat_body() | {"model": "gpt-4o"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_more_requests_than_the_engine_holds_are_refused_before_their_images_are_decoded(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    client = client_for(max_rows=1, max_queue=1)
    client.app.state.services.in_flight.count = 2  # type: ignore[attr-defined]
    response = client.post(PATH, json=chat_body(images=1))
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert not fake_engine.prompts


# ------------------------------------------------------------------------------- time and memory


def test_slow_preparation_counts_towards_the_timeout_and_is_a_408(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    """Only the body had a limit, and the engine began to count anew after the preparation."""
    fake_engine.prepare_gate = threading.Event()
    client = client_for(request_timeout_s=0.1)
    response = client.post(PATH, json=chat_body())
    fake_engine.prepare_gate.set()
    assert response.status_code == 408
    assert response.json()["error"]["code"] == "request_timeout"
    assert "x-should-retry" not in response.headers
    assert not fake_engine.requests


def test_the_engine_gets_what_is_left_of_the_requests_time(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    """It got the whole timeout again, so that a request could live twice as long."""
    client = client_for(request_timeout_s=20)
    fake_engine.prepare_gate = threading.Event()
    threading.Timer(0.2, fake_engine.prepare_gate.set).start()
    assert client.post(PATH, json=chat_body()).status_code == 200
    assert 10 < fake_engine.requests[0].timeout_s < 19.9


def test_what_times_out_while_it_waits_for_the_pool_is_never_prepared(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    """Pictures were decoded for requests whose time was over, which kept the pool from others."""
    client = client_for(request_timeout_s=0.2)
    gate, pool = threading.Event(), client.app.state.services.pool  # type: ignore[attr-defined]
    held = [pool.submit(gate.wait, 10) for _ in range(8)]
    assert client.post(PATH, json=chat_body(images=1)).status_code == 408
    gate.set()
    assert all(future.result() for future in held)
    assert client.post(PATH, json=chat_body("after")).status_code == 200
    (only,) = fake_engine.prompts
    assert only[0][0]["content"][0]["text"] == "after"


def test_bodies_that_together_are_too_many_bytes_are_refused_until_others_are_prepared(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    """Each was limited and their sum was not: 272 bodies of 32 MiB could be held at once."""
    client = client_for(max_body_bytes=1024, max_buffered_bytes=1500)
    services = client.app.state.services  # type: ignore[attr-defined]
    fake_engine.prepare_gate = threading.Event()
    body = chat_body("x" * 800)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, PATH, json=body)
        wait_until(lambda: len(fake_engine.prompts) == 1)
        assert 800 < services.bodies.held < 1024
        chunked = iter([json.dumps(body).encode()])
        json_type = {"content-type": "application/json"}
        for refused in (
            client.post(PATH, json=body),
            client.post(PATH, content=chunked, headers=json_type),
        ):
            assert refused.status_code == 429 and "retry-after" in refused.headers
        assert client.post(PATH, content=b"{", headers=json_type).status_code == 400
        fake_engine.prepare_gate.set()
        assert first.result().status_code == 200
    assert services.bodies.held == 0
    assert client.post(PATH, json=body).status_code == 200


def test_a_body_is_given_back_before_its_answer_is_generated(
    client: TestClient, fake_engine: FakeEngine
) -> None:
    """Held as long as the answer takes, the budget would limit generation, not memory."""
    held = []

    def script(request: Any) -> Any:
        held.append(client.app.state.services.bodies.held)  # type: ignore[attr-defined]
        yield from says("x")(request)

    fake_engine.script = script
    assert client.post(PATH, json=chat_body(images=1)).status_code == 200
    assert held == [0]
