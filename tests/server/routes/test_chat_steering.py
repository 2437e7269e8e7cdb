"""POST /v1/chat/completions: what a client may say about steering, and without vectors."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.fakes import FakeEngine, chat_body

PATH = "/v1/chat/completions"


def test_a_client_cannot_weaken_the_steering(client: TestClient, fake_engine: FakeEngine) -> None:
    """Peers take the scale from the body; here alpha 0 is refused, and nothing is served."""
    for steering in ({"alpha": 0}, {"mode": "off"}, {"alpha": 0.4}, {"schedule": "single:0"}):
        response = client.post(PATH, json=chat_body(images=1, steering=steering))
        assert response.status_code == 403
        assert "client_override" in response.json()["error"]["message"]
    assert not fake_engine.requests


@pytest.mark.parametrize("steering", [None, {}, {"alpha": None}, {"alpha": 0.5, "mode": "dataset"}])
def test_an_override_that_changes_nothing_is_fine(client: TestClient, steering: Any) -> None:
    response = client.post(PATH, json=chat_body(images=1, steering=steering))
    assert "alpha=0.5" in response.headers["x-deshift-steering"]


def test_where_any_override_is_allowed_alpha_is_the_clients(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    client = client_for(client_override="any")
    body = chat_body(images=1, steering={"alpha": 1.5, "schedule": "incremental"})
    response = client.post(PATH, json=body)
    assert "alpha=1.5; schedule=incremental" in response.headers["x-deshift-steering"]
    off = client.post(PATH, json=chat_body(images=1, steering={"mode": "off"}))
    assert off.headers["x-deshift-steering"] == "mode=off; reason=disabled; revision=0"
    zero = client.post(PATH, json=chat_body(images=1, steering={"alpha": 0}))
    assert zero.headers["x-deshift-steering"] == "mode=off; reason=alpha-zero; revision=0"
    deltas = [request.steering.delta for request in fake_engine.requests]
    assert [delta is None for delta in deltas] == [False, True, True]
    assert fake_engine.corruptions == [None] * 3


@pytest.mark.parametrize(
    ("steering", "words"),
    [
        ({"alpha": 2.5}, ["2.5", "0..2"]),
        ({"alpha": -1}, ["greater than or equal to 0"]),
        ({"schedule": "single:3"}, ["layer 3", "has 3"]),
        ({"schedule": "sometimes"}, ["sometimes", "incremental"]),
        ({"mode": "samples"}, ["'off'", "'sample'"]),
        ({"mode": "sample", "schedule": "single:3"}, ["layer 3", "has 3"]),
        ({"mode": "sample", "corruption": "black"}, ["'blank'", "'mean-colour'"]),
        ({"mode": "sample", "corruption": 1}, ["'blank'"]),
        ({"corruption": "noise"}, ["no effect in mode dataset"]),
        ({"alfa": 1}, ["not supported"]),
        ("off", ["object"]),
        ({"alpha": True}, ["number"]),
    ],
)
def test_a_malformed_override_is_a_400(
    client_for: Callable[..., TestClient], steering: Any, words: list[str]
) -> None:
    client = client_for(client_override="any")
    response = client.post(PATH, json=chat_body(images=1, steering=steering))
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("steering")
    for word in words:
        assert word in response.json()["error"]["message"]


def test_a_dose_over_the_cap_is_a_400_with_the_numbers(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    client = client_for(client_override="any", max_relative_dose=0.1)
    response = client.post(PATH, json=chat_body(images=1, steering={"alpha": 1.0}))
    assert response.status_code == 400
    assert "0.150" in response.json()["error"]["message"]  # 1.0 * 1.5 / 10
    assert not fake_engine.requests


def test_without_vectors_image_requests_are_refused_and_text_is_served(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    """Fail closed: a steered server never answers about an image unsteered instead."""
    client = client_for(vector_alias="missing")
    response = client.post(PATH, json=chat_body(images=1))
    assert response.status_code == 503
    assert "missing" in response.json()["error"]["message"]
    assert not fake_engine.requests
    assert client.post(PATH, json=chat_body()).status_code == 200
    assert client.get("/ready").status_code == 503


def test_without_vectors_an_operator_may_choose_to_serve_unsteered_and_the_answer_says_so(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    client = client_for(vector_alias="missing", on_error="serve-unsteered")
    response = client.post(PATH, json=chat_body(images=1))
    assert (
        response.headers["x-deshift-steering"] == "mode=off; reason=vectors-unavailable; revision=0"
    )
    assert response.json()["steering"]["reason"] == "vectors-unavailable"
    assert fake_engine.requests[0].steering.delta is None
    ready = client.get("/ready")
    assert ready.status_code == 200 and "missing" in ready.json()["steering"]["problem"]
