"""Previews: one prompt at several alphas, through the engine, for nobody else."""

import asyncio
import logging
import threading
from typing import Any

import pytest

from server.engine.types import ChoiceFinished, EngineError, Failed, PairError, TextEvent
from steering.stores.memory import MemoryStore
from tests.server.admin.conftest import API, KEY, Admin, Opened
from tests.server.fakes import FakeEngine, chat_body, data_url, image_bytes, plays, publish, says

pytestmark = pytest.mark.anyio
URL = f"{API}/preview"
SECRET = "words that nobody else may see"


def body(images: int = 1, **fields: Any) -> dict[str, Any]:
    messages = chat_body(SECRET, images=images)["messages"]
    return {"messages": messages, "policy": {"mode": "sample", "alpha_max": 2}} | fields


async def test_each_alpha_is_answered_with_its_own_report(
    admin: Admin, fake_engine: FakeEngine
) -> None:
    fake_engine.script = lambda request: says(f"at {request.plan.alpha:g}")(request)
    response = await admin.post(URL, json=body(alphas=[0, 0.8, 1.5]))
    assert response.status_code == 200, response.text
    answers = response.json()["answers"]
    assert [answer["alpha"] for answer in answers] == [0, 0.8, 1.5]
    assert [answer["text"] for answer in answers] == ["at 0", "at 0.8", "at 1.5"]
    reports = [answer["steering"] for answer in answers]
    assert [report["mode"] for report in reports] == ["off", "sample", "sample"]
    assert [report["alpha"] for report in reports] == [0, 0.8, 1.5]
    assert [report["reason"] for report in reports] == ["alpha-zero", None, None]
    assert response.json()["revision"] == 0
    assert not fake_engine.cancelled and fake_engine.num_running == 0


async def test_a_tenants_policy_is_tried_with_its_vectors(
    opened: Opened, fake_engine: FakeEngine
) -> None:
    store = MemoryStore()
    vector = await publish(store)
    async with opened(store) as admin:
        revision = await admin.created("acme", alpha=0.3, schedule="single:1", rollout=0)
        await admin.services.sync.look()
        await admin.services.vectors.wait_until_settled()
        fields = body(tenant="acme", alphas=[0.5])
        del fields["policy"]
        answers = (await admin.post(URL, json=fields)).json()
        (answer,) = answers["answers"]
        assert answers["revision"] == answer["steering"]["revision"] == revision
        assert (answer["steering"]["vector"], answer["steering"]["schedule"]) == (
            vector,
            "single:1",
        )
        (request,) = fake_engine.requests
        assert request.steering.delta is not None
        # Layer 1's Delta is (1, 0, 0, 0): see make_vectors.
        assert request.steering.delta[:, 0].tolist() == [0, 0.5, 0]
        assert request.namespace not in ("", "acme", "default")
        # The strongest layer's |Delta| / |h| is 0.15, so that alpha 7 is over a dose of 1.
        strong = {"schedule": "all", "alpha_max": 10}
        overdose = await admin.post(URL, json=body(policy=strong, alphas=[0.5, 7]))
        assert overdose.status_code == 400
        assert "alpha 7" in overdose.json()["error"]["message"]


async def test_the_kill_switch_does_not_hide_what_is_tried(admin: Admin) -> None:
    admin.services.directory.local_kill = "reject"
    answers = (await admin.post(URL, json=body(alphas=[0.8]))).json()["answers"]
    assert answers[0]["steering"]["mode"] == "sample"


async def test_the_same_sampling_is_asked_at_every_alpha(
    admin: Admin, fake_engine: FakeEngine
) -> None:
    fields = body(alphas=[0, 1], max_tokens=7, seed=5, temperature=0.5)
    assert (await admin.post(URL, json=fields)).status_code == 200
    first, second = (request.params for request in fake_engine.requests)
    assert first == second
    assert (first.max_tokens, first.seed, first.temperature, first.n) == (7, 5, 0.5, 1)


async def test_nothing_of_it_is_logged_or_stored(
    admin: Admin, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    changes = await admin.services.control.store.changes()
    for fields in (body(), body(alphas=[9])):
        await admin.post(URL, json=fields)
    assert SECRET not in caplog.text and "base64" not in caplog.text
    assert await admin.services.control.store.changes() == changes


async def test_one_preview_at_a_time(admin: Admin, fake_engine: FakeEngine) -> None:
    gate = threading.Event()
    fake_engine.script = lambda request: [gate, *says("done")(request)]
    running = asyncio.create_task(admin.post(URL, json=body(alphas=[1])))
    while not fake_engine.num_running:
        await asyncio.sleep(0.005)
    second = await admin.post(URL, json=body())
    assert second.status_code == 429 and "retry-after" in second.headers
    gate.set()
    assert (await running).status_code == 200
    assert (await admin.post(URL, json=body())).status_code == 200


async def test_a_failed_preview_leaves_room_for_the_next(
    admin: Admin, fake_engine: FakeEngine
) -> None:
    fake_engine.script = plays(TextEvent(0, "so"), Failed("engine", "out of memory"))
    failed = await admin.post(URL, json=body())
    assert failed.status_code == 500
    assert failed.json()["error"]["code"] == "generation_engine"
    fake_engine.refusal = EngineError("the engine has stopped")
    assert (await admin.post(URL, json=body())).status_code == 500
    fake_engine.refusal, fake_engine.script = None, says("again")
    assert (await admin.post(URL, json=body())).status_code == 200


async def test_a_preview_has_a_deadline(opened: Opened, fake_engine: FakeEngine) -> None:
    async with opened(request_timeout_s=0.05) as admin:
        fake_engine.script = plays(threading.Event(), ChoiceFinished(0, "stop"))
        response = await admin.post(URL, json=body())
        assert response.status_code == 408
        assert len(fake_engine.cancelled) == 1


async def test_a_shift_that_cannot_be_measured_does_what_on_error_says(
    admin: Admin, fake_engine: FakeEngine
) -> None:
    fake_engine.pair_error = PairError("its two prompts differ")
    assert (await admin.post(URL, json=body(alphas=[1]))).status_code == 400
    policy = {"mode": "sample", "on_error": "serve-unsteered"}
    (answer,) = (await admin.post(URL, json=body(alphas=[1], policy=policy))).json()["answers"]
    assert (answer["steering"]["mode"], answer["steering"]["reason"]) == ("off", "shift-failed")


async def test_a_shutting_down_server_previews_nothing(admin: Admin) -> None:
    admin.services.in_flight.is_draining = True
    assert (await admin.post(URL, json=body())).status_code == 503


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"alphas": []}, "alphas"),
        ({"alphas": [0, 1, 1, 1, 1]}, "alphas"),
        ({"alphas": [-1]}, "alphas.0"),
        ({"alphas": [2.5]}, "alphas"),
        ({"max_tokens": 513}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"policy": None}, "body"),
        ({"tenant": "acme"}, "body"),
        ({"stream": True}, "stream"),
        ({"seed": -1}, "seed"),
    ],
)
async def test_a_bad_preview_is_a_400(
    admin: Admin, fake_engine: FakeEngine, fields: dict[str, Any], param: str
) -> None:
    response = await admin.post(URL, json=body(**fields))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert SECRET not in response.text and not fake_engine.requests


async def test_pictures_are_held_to_the_limits_of_clients(opened: Opened) -> None:
    async with opened(max_images=1, max_image_pixels=100) as admin:
        assert (await admin.post(URL, json=body(images=1))).status_code == 200
        many = await admin.post(URL, json=body(images=2))
        assert many.status_code == 400 and "2 images" in many.json()["error"]["message"]
        large = chat_body(images=1)["messages"]
        large[0]["content"][1]["image_url"]["url"] = data_url(image_bytes((20, 20)))
        response = await admin.post(URL, json=body() | {"messages": large})
        assert response.status_code == 400


async def test_half_a_character_is_a_400(admin: Admin) -> None:
    content = b'{"policy": {}, "messages": [{"role": "user", "content": "\\ud800"}]}'
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    response = await admin.post(URL, content=content, headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
