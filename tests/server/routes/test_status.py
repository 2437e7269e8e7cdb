"""/health, /ready and /v1/models: who is alive, fit, and served."""

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from steering.stores import MemoryStore
from tests.server.conftest import wait_until
from tests.server.fakes import FakeEngine, chat_body, make_vectors


def test_a_started_server_is_alive_and_ready(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "alive", "engine": "ready"}
    ready = client.get("/ready")
    assert ready.status_code == 200
    assert ready.json() == {
        "status": "ready",
        "model": "tiny",
        "draining": False,
        "engine": {"state": "ready", "detail": "ready", "waiting": 0, "running": 0},
        "steering": {
            "policy": "mode=dataset; alpha=0.5; schedule=all",
            "alias": "default",
            "vector": make_vectors().id,
            "problem": None,
        },
    }


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [("starting", 200, 503), ("draining", 200, 503), ("failed", 503, 503), ("stopped", 503, 503)],
)
def test_the_engines_state_decides(
    client: TestClient, fake_engine: FakeEngine, state: str, health: int, ready: int
) -> None:
    fake_engine.state = state
    assert client.get("/health").status_code == health
    assert client.get("/ready").status_code == ready
    response = client.post("/v1/chat/completions", json=chat_body())
    assert response.status_code == 503


def test_a_server_without_vectors_becomes_ready_when_they_are_activated(
    client_for: Callable[..., TestClient], store: MemoryStore
) -> None:
    client = client_for(vector_alias="later")
    response = client.get("/ready")
    assert response.status_code == 503
    assert "later" in response.json()["steering"]["problem"]
    store.set_alias("later", make_vectors().id)
    wait_until(lambda: client.get("/ready").status_code == 200)


def test_a_server_whose_policy_is_off_is_ready_without_vectors(
    client_for: Callable[..., TestClient],
) -> None:
    assert client_for(vector_alias="none", steering_mode="off").get("/ready").status_code == 200


def test_the_one_model_is_listed_also_when_its_name_has_a_slash(
    client_for: Callable[..., TestClient],
) -> None:
    client = client_for(served_model_name="org/name")
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"]) == ("org/name", "model")
    assert model["max_model_len"] == 100, "the fake engine's"
    assert client.get("/v1/models/org/name").json() == model
    assert client.get("/v1/models/name").json()["error"]["code"] == "model_not_found"
