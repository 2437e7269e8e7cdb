"""/health, /ready and /v1/models: who is alive, fit, and served."""

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from steering.stores import MemoryStore
from tests.server.conftest import Tenants, wait_until
from tests.server.fakes import AUTHOR, NUM_LAYERS, FakeEngine, chat_body, make_vectors, publish


def test_a_started_server_is_alive_and_ready(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "alive", "engine": "ready"}
    ready = client.get("/ready")
    assert ready.status_code == 200
    body = ready.json()
    assert 0 <= body["store"].pop("age_s") < 10
    assert body["store"].pop("epoch")
    assert body == {
        "status": "ready",
        "model": "tiny",
        "draining": False,
        "engine": {
            "state": "ready",
            "detail": "ready",
            "waiting": 0,
            "running": 0,
            "num_layers": NUM_LAYERS,
        },
        "store": {
            "place": "memory",
            "state": "ok",
            "problem": None,
            "revision": 1,
            "num_unreadable": 0,
        },
        "steering": {
            "policy": "mode=dataset; alpha=0.5; schedule=all",
            "alias": "default",
            "vector": make_vectors().id,
            "problem": None,
            "kill": "none",
            "vectors": {"default": make_vectors().id},
            "problems": {},
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
    assert client.portal is not None
    client.portal.call(publish, store, 0.5, "later")
    wait_until(lambda: client.get("/ready").status_code == 200)


def test_a_server_whose_policy_is_off_is_ready_without_vectors(
    client_for: Callable[..., TestClient],
) -> None:
    assert client_for(vector_alias="none", steering_mode="off").get("/ready").status_code == 200


def test_a_default_policy_that_would_overdose_is_not_ready(
    client_for: Callable[..., TestClient],
) -> None:
    """0.5 * 1.5 / 10 = 0.075 at the last layer."""
    ready = client_for(max_relative_dose=0.05).get("/ready")
    assert ready.status_code == 503 and "0.075" in ready.json()["steering"]["problem"]


def test_another_tenants_broken_alias_is_shown_and_leaves_the_server_ready(
    client: TestClient, tenants: Tenants
) -> None:
    tenants.create(vector_alias="gone")
    wait_until(lambda: bool(client.get("/ready").json()["steering"]["problems"]))
    ready = client.get("/ready")
    assert ready.status_code == 200
    assert "no alias 'gone'" in ready.json()["steering"]["problems"]["gone"]


def test_an_unreadable_document_is_counted_and_its_tenant_not_named(
    client: TestClient, tenants: Tenants
) -> None:
    tenants.write("tenant/secret-customer", "bees")
    wait_until(lambda: client.get("/ready").json()["store"]["num_unreadable"] == 1)
    ready = client.get("/ready")
    assert ready.status_code == 200 and "secret-customer" not in ready.text


def test_a_default_policy_that_cannot_be_read_is_not_ready(
    client: TestClient, tenants: Tenants
) -> None:
    tenants.write("tenant/default", "bees")
    wait_until(lambda: client.get("/ready").status_code == 503)
    steering = client.get("/ready").json()["steering"]
    assert steering["policy"] is None and "cannot be read" in steering["problem"]


def test_the_kill_switch_is_shown(client: TestClient, tenants: Tenants) -> None:
    tenants.do(lambda control: control.set_kill("reject", AUTHOR))
    assert client.get("/ready").json()["steering"]["kill"] == "reject"


def test_a_store_that_was_emptied_is_shown_and_what_is_in_force_stays(
    client_for: Callable[..., TestClient], store: MemoryStore
) -> None:
    client = client_for(sync_interval_s=0.02)
    store.__dict__.update(MemoryStore().__dict__)
    wait_until(lambda: client.get("/ready").json()["store"]["state"] == "foreign")
    ready = client.get("/ready")
    assert ready.status_code == 200 and "empty" in ready.json()["store"]["problem"]
    assert ready.json()["store"]["revision"] == 1


def test_the_stores_place_is_shown_without_its_password(
    client_for: Callable[..., TestClient],
) -> None:
    client = client_for(store="redis://deshift-server:hunter2@redis.example:6379/0?db=1")
    ready = client.get("/ready")
    assert ready.json()["store"]["place"] == "redis://redis.example:6379/0"
    assert "hunter2" not in ready.text


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
