"""The factory with nothing faked: a checkpoint on disk, a store file, the embedded engine."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from server import app as module
from server.app import create_app
from server.config import Settings
from server.control import activate
from server.errors import ConfigError, ServerError
from steering.errors import StoreError
from steering.models import ModelIdentity
from steering.stores import MemoryStore, opened_store
from steering.stores.base import Changes
from tests.server.conftest import make_settings, wait_until
from tests.server.fakes import FakeEngine, chat_body, make_identity, make_vectors
from tests.server.fakes import publish as publish_in
from tests.tiny_models import TinyModel

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def checkpoint(tiny_llava: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava.save(tmp_path_factory.mktemp("llava"))


def settings_for(checkpoint: Path, tmp_path: Path, **changes: object) -> Settings:
    values = {
        "model": str(checkpoint),
        "served_model_name": "tiny",
        "dtype": "float32",
        "device": "cpu",
        "max_rows": 2,
        "cache": tmp_path,
        "drain_timeout_s": 5.0,
        "alpha": 0.5,
    }
    return Settings.from_env({}, {**values, **changes})


def publish(settings: Settings, identity: ModelIdentity) -> None:
    async def keep() -> None:
        async with opened_store(settings.store_url) as store:
            vectors = make_vectors(identity=identity)
            await store.put_vectors(vectors.to_bytes())
            await activate(store, "default", vectors.id, by="the tests", reason="to be tested")

    asyncio.run(keep())


@pytest.fixture
def real(checkpoint: Path, tmp_path: Path) -> Iterator[TestClient]:
    """A server of the tiny model, steered by vectors in a store file that was there before it."""
    settings = settings_for(checkpoint, tmp_path)
    app = create_app(settings)
    publish(settings, app.state.services.engine.identity)
    with TestClient(app, "http://127.0.0.1") as client:
        yield client


def test_a_picture_goes_in_and_a_steered_answer_comes_out(real: TestClient) -> None:
    assert real.get("/ready").status_code == 200, real.get("/ready").json()
    body = chat_body("What is it?", images=1, temperature=0, max_tokens=5, ignore_eos=True)
    whole = real.post(PATH, json=body)
    assert whole.status_code == 200, whole.text
    assert "mode=dataset; alpha=0.5" in whole.headers["x-deshift-steering"]
    assert whole.json()["usage"]["completion_tokens"] == 5
    assert whole.json()["choices"][0]["finish_reason"] == "length"
    # This server is on loopback without a key: a newcomer may try alpha by hand.
    off = real.post(PATH, json=body | {"steering": {"alpha": 0}})
    assert off.headers["x-deshift-steering"] == "mode=off; reason=alpha-zero; revision=0"
    assert real.post(PATH, json=body | {"stream": True}).text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("decoder", ["eager", "fused"])
@pytest.mark.parametrize("cache_bytes", [0, 2**24])
def test_the_sample_level_needs_no_vectors_and_the_caches_have_their_budgets(
    checkpoint: Path, tmp_path: Path, decoder: str, cache_bytes: int
) -> None:
    settings = settings_for(
        checkpoint,
        tmp_path,
        steering_mode="sample",
        max_relative_dose=0.01,
        decoder=decoder,
        prefix_cache_bytes=cache_bytes,
        vision_cache_bytes=cache_bytes,
    )
    question = "What is in this picture, and what is beside it? " * 4
    body = chat_body(question, images=1, temperature=0, max_tokens=3, ignore_eos=True)
    with TestClient(create_app(settings), "http://127.0.0.1") as client:
        assert client.get("/ready").status_code == 200
        first, second = (client.post(PATH, json=body) for _ in range(2))
    assert first.headers["x-deshift-steering"] == (
        "mode=sample; alpha=0.5; schedule=all; corruption=blank; revision=0"
    )
    steering = first.json()["steering"]
    assert steering["relative_dose"] == pytest.approx(0.01, rel=1e-3), "scaled down to the cap"
    assert 0 < steering["shift_ms"] <= steering["overhead_ms"]
    cached_tokens = second.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert (cached_tokens > 0) == (cache_bytes > 0)


def test_a_request_that_can_never_fit_names_both_lengths(real: TestClient) -> None:
    limit = real.app.state.services.engine.max_model_len  # type: ignore[attr-defined]
    response = real.post(PATH, json=chat_body("Hi", max_tokens=limit))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded" and str(limit) in error["message"]


def test_an_unknown_token_in_logit_bias_harms_nobody_else(real: TestClient) -> None:
    """It made the sampler raise on the engine thread, and with it every later request fail."""
    response = real.post(PATH, json=chat_body(max_tokens=2, logit_bias={"999999999": 1}))
    assert response.status_code == 400
    assert real.post(PATH, json=chat_body(max_tokens=2)).status_code == 200


def test_vectors_for_another_model_leave_the_server_up_and_not_ready(
    checkpoint: Path, tmp_path: Path
) -> None:
    settings = settings_for(checkpoint, tmp_path)
    publish(settings, make_identity())
    with TestClient(create_app(settings), "http://127.0.0.1") as client:
        ready = client.get("/ready")
        assert ready.status_code == 503
        assert "does not fit" in ready.json()["steering"]["problem"]
        assert client.post(PATH, json=chat_body(images=1)).status_code == 503
        assert client.post(PATH, json=chat_body(max_tokens=1)).status_code == 200


def test_the_context_is_at_most_the_models_own(checkpoint: Path, tmp_path: Path) -> None:
    app = create_app(settings_for(checkpoint, tmp_path, max_model_len=10**9, steering_mode="off"))
    assert app.state.services.engine.max_model_len < 10**6


@pytest.mark.parametrize("mode", ["off", "dataset", "sample"])
def test_a_schedule_beyond_the_models_layers_stops_the_start(mode: str) -> None:
    """At sample level every request would have been blamed for it."""
    settings = make_settings(steering_mode=mode, schedule="single:99")
    with pytest.raises(ConfigError, match="DESHIFT_SCHEDULE.* layer 99; the model has 3"):
        create_app(settings, engine=FakeEngine())


def test_without_a_model_there_is_nothing_to_build(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="DESHIFT_MODEL"):
        create_app(Settings(cache=tmp_path))


class LostStore(MemoryStore):
    """Fails, or never answers."""

    def __init__(self, *, hangs: bool = False) -> None:
        super().__init__()
        self.is_lost, self.hangs = True, hangs

    async def changes(self, since: int = 0) -> Changes:
        if self.is_lost and self.hangs:
            await asyncio.Event().wait()
        if self.is_lost:
            raise StoreError("no route to the store")
        return await super().changes(since)


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("cold_start", ["default-policy", "refuse"])
def test_a_cold_start_without_the_store_does_what_the_setting_says_and_gets_well_by_itself(
    cold_start: str, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "START_WAIT_S", 0.2)
    monkeypatch.setattr("server.sync.READ_TIMEOUT_S", 0.1 if hangs else 3.0)
    store = LostStore(hangs=hangs)
    asyncio.run(publish_in(store))
    settings = make_settings(cold_start=cold_start, sync_interval_s=0.05, steering_mode="sample")
    with TestClient(
        create_app(settings, engine=FakeEngine(), store=store), "http://127.0.0.1"
    ) as client:
        ready = client.get("/ready")
        assert ready.json()["store"]["state"] == "unreachable"
        assert ready.json()["store"]["age_s"] is None
        expected = 200 if cold_start == "default-policy" else 503
        assert ready.status_code == client.post(PATH, json=chat_body()).status_code == expected
        store.is_lost = False
        wait_until(lambda: client.get("/ready").json()["store"]["state"] == "ok")
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert client.post(PATH, json=chat_body()).status_code == 200


def test_a_cold_start_that_must_steer_by_vectors_serves_no_picture_unsteered() -> None:
    app = create_app(make_settings(), engine=FakeEngine(), store=LostStore())
    with TestClient(app, "http://127.0.0.1") as client:
        assert client.get("/ready").status_code == 503
        assert client.post(PATH, json=chat_body(images=1)).status_code == 503
        assert client.post(PATH, json=chat_body()).status_code == 200


def test_a_store_that_hangs_does_not_hold_up_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "START_WAIT_S", 0.2)
    started = time.monotonic()
    app = create_app(make_settings(), engine=FakeEngine(), store=LostStore(hangs=True))
    with TestClient(app, "http://127.0.0.1"):
        assert time.monotonic() - started < 2


def test_a_replica_is_seen_while_it_runs_and_its_stores_are_closed_if_they_are_its_own(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path / 'own.db'}"
    settings = make_settings(store=url, admin_store=url, replica="rack-1")
    app = create_app(settings, engine=FakeEngine())
    services = app.state.services
    assert services.control.store is not services.store

    async def told() -> dict[str, str]:
        async with opened_store(url) as store:
            return await store.replicas()

    with TestClient(app, "http://127.0.0.1"):
        wait_until(lambda: bool(asyncio.run(told())))
        status = json.loads(asyncio.run(told())["rack-1"])
        assert (status["replica"], status["store"], status["model"]) == ("rack-1", "ok", "tiny")
    assert not asyncio.run(told())
    for store in (services.store, services.control.store):
        with pytest.raises(StoreError):
            asyncio.run(store.changes())


def test_a_store_that_was_lent_stays_open_and_serves_operators_too(store: MemoryStore) -> None:
    app = create_app(make_settings(), engine=FakeEngine(), store=store)
    assert app.state.services.control.store is app.state.services.store
    with TestClient(app, "http://127.0.0.1"):
        pass
    assert asyncio.run(store.changes()).revision == 1, "the alias of its vectors"


def test_no_request_is_dropped_while_an_alias_moves(
    client_for: Callable[..., TestClient], store: MemoryStore
) -> None:
    client = client_for()
    assert client.portal is not None
    old = make_vectors().id
    wait_until(lambda: client.get("/ready").status_code == 200)
    seen = []
    for length in (0.25, 0.125, 0.0625):
        new = client.portal.call(publish_in, store, length)
        while not seen or seen[-1] != new:
            response = client.post(PATH, json=chat_body(images=1))
            assert response.status_code == 200, response.text
            seen.append(response.json()["steering"]["vector"])
    assert set(seen) <= {old, *(make_vectors(length).id for length in (0.25, 0.125, 0.0625))}
