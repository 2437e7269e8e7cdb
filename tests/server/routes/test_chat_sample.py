"""Mode `sample` through HTTP: the pair of prompts goes in, what came of it is in the answer."""

import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.engine.types import (
    ChoiceFinished,
    Failed,
    Finished,
    InputError,
    PairError,
    SteeringApplied,
    TextEvent,
)
from tests.server.fakes import TIMINGS, FakeEngine, chat_body, plays, says

PATH = "/v1/chat/completions"
SAMPLE = {"steering_mode": "sample", "alpha": 0.2, "schedule": "incremental"}
HEADER = "mode=sample; alpha=0.2; schedule=incremental; corruption=blank; revision=0"
SHIFT_FAILED = "mode=off; reason=shift-failed; revision=0"


@pytest.fixture
def sample_for(client_for: Callable[..., TestClient]) -> Callable[..., TestClient]:
    """A client of a server whose policy is the sample level and whose store is empty to it."""

    def make(**changes: Any) -> TestClient:
        return client_for(**SAMPLE | {"vector_alias": "nothing"} | changes)

    return make


def steering_of(response: Any) -> Any:
    """The steering object of a whole answer, or of a stream's last chunk."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        return response.json()["steering"]
    *chunks, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    return json.loads(chunks[-1])["steering"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_gets_a_pair_and_no_delta_and_the_answer_says_what_came_of_it(
    sample_for: Callable[..., TestClient], fake_engine: FakeEngine, stream: bool
) -> None:
    response = sample_for().post(PATH, json=chat_body("Hi", images=1, stream=stream))
    assert response.headers["x-deshift-steering"] == HEADER
    steering = steering_of(response)
    assert steering.pop("overhead_ms") > 4.5, "2 each for shift and prompts, 0.5 to subtract"
    assert steering == {
        "mode": "sample",
        "alpha": 0.2,
        "gate_opening": None,
        "method": "subtract",
        "schedule": "incremental",
        "vector": None,
        "corruption": "blank",
        "revision": 0,
        "relative_dose": 0.125,  # the engine's
        "shift_ms": 2.0,
        "reason": None,
    }
    (request,) = fake_engine.requests
    assert fake_engine.corruptions == ["blank"]
    assert request.inputs.pair is not None and request.steering.delta is None
    assert (request.on_error, request.namespace) == ("reject", "default")
    assert (request.plan.mode, request.plan.max_relative_dose) == ("sample", 1.0)


def test_a_server_of_the_sample_level_is_ready_without_vectors(
    sample_for: Callable[..., TestClient],
) -> None:
    client = sample_for(client_override="any")
    ready = client.get("/ready")
    assert ready.status_code == 200
    policy = "mode=sample; alpha=0.2; schedule=incremental; corruption=blank"
    assert ready.json()["steering"]["policy"] == policy
    dataset = client.post(PATH, json=chat_body(images=1, steering={"mode": "dataset"}))
    assert dataset.status_code == 503
    assert dataset.json()["error"]["code"] == "vectors_unavailable"


def test_a_text_prompt_or_an_alpha_of_zero_needs_no_pair(
    sample_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    client = sample_for(client_override="any")
    for body in (chat_body("Hi"), chat_body(images=1, steering={"alpha": 0})):
        steering = steering_of(client.post(PATH, json=body))
        assert (steering["mode"], steering["corruption"]) == ("off", None)
        assert (steering["overhead_ms"], steering["shift_ms"]) == (0, 0)
    assert fake_engine.corruptions == [None, None]


def test_a_request_may_ask_for_the_sample_level_where_any_override_is_allowed(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    steering = {"mode": "sample", "alpha": 0.3, "schedule": "range:0-1", "corruption": "noise"}
    client = client_for(client_override="any")
    response = client.post(PATH, json=chat_body(images=1, steering=steering))
    assert response.headers["x-deshift-steering"] == (
        "mode=sample; alpha=0.3; schedule=range:0-1; corruption=noise; revision=0"
    )
    assert fake_engine.corruptions == ["noise"]


@pytest.mark.parametrize(
    "steering",
    [
        {"alpha": 0.1},
        {"mode": "off"},
        {"mode": "dataset"},
        {"schedule": "all"},
        {"corruption": "noise"},
        {"alpha": 0.3, "corruption": "gray"},
    ],
)
@pytest.mark.parametrize("client_override", ["none", "strengthen"])
def test_what_the_policy_does_not_let_a_client_change_is_a_403(
    sample_for: Callable[..., TestClient],
    fake_engine: FakeEngine,
    client_override: str,
    steering: Any,
) -> None:
    client = sample_for(client_override=client_override)
    response = client.post(PATH, json=chat_body(images=1, steering=steering))
    assert response.status_code == 403
    error = response.json()["error"]
    assert "corruption=blank" in error["message"], "what is in force"
    assert (error["param"], error["code"]) == ("steering", "steering_override_forbidden")
    assert not fake_engine.requests


# -------------------------------------------------------------------- what cannot be measured


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fails_in", ["prepare", "engine"])
def test_under_reject_a_shift_that_fails_is_an_error(
    sample_for: Callable[..., TestClient], fake_engine: FakeEngine, fails_in: str, stream: bool
) -> None:
    if fails_in == "prepare":
        fake_engine.pair_error = PairError("the template wants a picture")
    else:
        fake_engine.script = says("x", shift_failure="the shift is not finite")
    response = sample_for().post(PATH, json=chat_body(images=1, stream=stream))
    error = response.json()["error"]
    if fails_in == "prepare":
        assert (response.status_code, error["type"]) == (400, "invalid_request_error")
        assert (error["message"], error["param"]) == ("the template wants a picture", "messages")
        assert not fake_engine.requests
    else:
        assert (response.status_code, error["message"]) == (500, "the shift is not finite")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fails_in", ["prepare", "engine"])
def test_under_serve_unsteered_a_shift_that_fails_is_an_answer_that_says_so(
    sample_for: Callable[..., TestClient],
    fake_engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
    fails_in: str,
    stream: bool,
) -> None:
    caplog.set_level(logging.INFO)
    if fails_in == "prepare":
        fake_engine.pair_error = PairError("no picture beside: my secret question")
    else:
        fake_engine.script = says("x", shift_failure="layer 2 is\nnot finite")
    client = sample_for(on_error="serve-unsteered")
    body = chat_body("my secret question", images=1, stream=stream)
    response = client.post(PATH, json=body)
    assert response.status_code == 200
    assert response.headers["x-deshift-steering"] == SHIFT_FAILED
    # An attempt has cost its time; two prompts that could not be made have cost nothing.
    shift_ms = 2.0 if fails_in == "engine" else 0.0
    assert steering_of(response) == {
        "mode": "off",
        "alpha": 0.0,
        "gate_opening": None,
        "method": None,
        "schedule": None,
        "vector": None,
        "corruption": None,
        "revision": 0,
        "relative_dose": 0.0,
        "overhead_ms": shift_ms,
        "shift_ms": shift_ms,
        "reason": "shift-failed",
    }
    (request,) = fake_engine.requests
    assert (request.plan.is_active, request.inputs.pair is None) == (
        (False, True) if fails_in == "prepare" else (True, False)
    )
    assert fake_engine.corruptions == (["blank", None] if fails_in == "prepare" else ["blank"])
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING][-1:]
    assert response.headers["x-request-id"] in warning and "unsteered" in warning
    assert "secret" not in caplog.text
    assert "mode=off;reason=shift-failed;revision=0" in caplog.text, "the request's own line"
    assert ("layer 2 is\\nnot finite" in warning) == (fails_in == "engine"), "on one line"


def test_a_prompt_that_is_refused_for_itself_is_refused_under_serve_unsteered_too(
    sample_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    fake_engine.prepare_error = InputError("too many roles")
    client = sample_for(on_error="serve-unsteered")
    response = client.post(PATH, json=chat_body(images=1))
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "too many roles"


@pytest.mark.parametrize("kind", ["timeout", "engine"])
def test_a_failure_after_the_shift_and_before_the_first_token_is_a_status_also_of_a_stream(
    sample_for: Callable[..., TestClient], fake_engine: FakeEngine, kind: Any
) -> None:
    """The outcome of the shift is an event without text: sent on its own, it would fix a 200."""
    fake_engine.script = plays(SteeringApplied(0.1), Failed(kind, "why"))
    response = sample_for().post(PATH, json=chat_body(images=1, stream=True))
    assert response.status_code == (408 if kind == "timeout" else 500)
    assert response.json()["error"]["code"] == f"generation_{kind}"


def test_the_streams_head_waits_for_the_shift(
    sample_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    """Also where it arrives alone, long before the first text."""
    gate = threading.Event()
    threading.Timer(0.05, gate.set).start()
    fake_engine.script = plays(
        SteeringApplied(0.0, failure="not finite"),
        gate,
        TextEvent(0, "a"),
        ChoiceFinished(0, "stop"),
        Finished(1, 1, TIMINGS),
    )
    client = sample_for(on_error="serve-unsteered")
    response = client.post(PATH, json=chat_body(images=1, stream=True))
    assert response.headers["x-deshift-steering"] == SHIFT_FAILED
    assert steering_of(response)["reason"] == "shift-failed"


def test_the_answer_tells_what_the_gate_let_through(
    sample_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    """The strength in the answer is the one applied, the header's the policy's."""
    fake_engine.script = plays(
        SteeringApplied(0.03, opening=0.25),
        TextEvent(0, "a"),
        ChoiceFinished(0, "stop"),
        Finished(1, 1, TIMINGS),
    )
    for stream in (False, True):
        response = sample_for().post(PATH, json=chat_body(images=1, stream=stream))
        assert "alpha=0.2;" in response.headers["x-deshift-steering"]
        steering = steering_of(response)
        told = steering["alpha"], steering["gate_opening"], steering["relative_dose"]
        assert told == (0.05, 0.25, 0.03)
