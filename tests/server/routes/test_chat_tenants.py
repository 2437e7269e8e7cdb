"""Chat under tenants' policies: one plan and one revision per answer, whatever comes between."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from starlette.testclient import TestClient

from server.engine.types import PairError, TextEvent
from tests.server.conftest import Tenants, wait_until
from tests.server.fakes import AUTHOR, FakeEngine, chat_body, make_vectors, plays, publish, says

PATH = "/v1/chat/completions"


def ask(client: TestClient, key: str | None, **fields: Any) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return client.post(PATH, json=chat_body(**fields), headers=headers)


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ---------------------------------------------------------------------------------------- toggles


@pytest.mark.parametrize("moment", ["prepare", "stream"])
def test_a_toggle_during_an_answer_leaves_it_its_plan_and_one_revision(
    client: TestClient, tenants: Tenants, fake_engine: FakeEngine, moment: str
) -> None:
    key = tenants.create(alpha=0.5)
    before = tenants.directory.policy("acme", 0).revision
    gate = threading.Event()
    if moment == "prepare":
        fake_engine.prepare_gate = gate
    else:
        fake_engine.script = plays(TextEvent(0, "x"), gate, *says("y")(_one_choice()))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, client, key, images=1, stream=True)
        wait_until(lambda: bool(fake_engine.prompts))
        after = tenants.set_policy(alpha=0.0, on_error="serve-unsteered")
        gate.set()
        old = running.result()
    new = ask(client, key, images=1, stream=True)
    assert after > before
    assert (
        f"alpha=0.5; schedule=all; vector={make_vectors().id}; revision={before}"
        in (old.headers["x-deshift-steering"])
    )
    assert {chunk["steering_revision"] for chunk in chunks_of(old)} == {before}
    assert chunks_of(old)[-1]["steering"]["revision"] == before
    assert new.headers["x-deshift-steering"] == f"mode=off; reason=alpha-zero; revision={after}"
    assert {chunk["steering_revision"] for chunk in chunks_of(new)} == {after}
    assert chunks_of(new)[-1]["steering"]["revision"] == after
    first, second = fake_engine.requests
    assert (first.plan.alpha, first.plan.revision, first.on_error) == (0.5, before, "reject")
    delta = first.steering.delta
    assert delta is not None and torch.equal(delta, 0.5 * make_vectors().mean)
    assert (second.steering.delta, second.on_error) == (None, "serve-unsteered")


def _one_choice() -> Any:
    """Enough of a request for the script `says`."""
    from types import SimpleNamespace

    return SimpleNamespace(
        inputs=SimpleNamespace(prompt="x", pair=None), params=SimpleNamespace(n=1), on_error=""
    )


def test_while_policies_are_toggled_every_answer_is_of_one_revision_and_its_alpha(
    client: TestClient, tenants: Tenants
) -> None:
    key = tenants.create(alpha=0.5)
    alpha_of = {tenants.directory.policy("acme", 0).revision: 0.5}
    with ThreadPoolExecutor(4) as pool:
        answers = []
        for number in range(30):
            answers += [pool.submit(ask, client, key, images=1, stream=True) for _ in range(2)]
            alpha = 0.1 + number / 100
            alpha_of[tenants.set_policy(alpha=alpha)] = alpha
    seen = set()
    for answer in answers:
        chunks = chunks_of(answer.result())
        (revision,) = {chunk["steering_revision"] for chunk in chunks}
        assert chunks[-1]["steering"]["alpha"] == alpha_of[revision]
        seen.add(revision)
    assert len(seen) > 1


def test_each_tenant_has_the_vectors_of_its_alias(
    client: TestClient, tenants: Tenants, fake_engine: FakeEngine
) -> None:
    other = tenants.do(lambda control: publish(control.store, 0.25, alias="other"))
    keys = [tenants.create("a"), tenants.create("b", vector_alias="other")]
    vectors = client.app.state.services.vectors  # type: ignore[attr-defined]
    wait_until(lambda: vectors.active("other") is not None)
    ids = [ask(client, key, images=1).json()["steering"]["vector"] for key in keys]
    assert ids == [make_vectors().id, other]
    missing = tenants.create("c", vector_alias="missing")
    refused = ask(client, missing, images=1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "vectors_unavailable")
    assert "missing" in refused.json()["error"]["message"]
    assert len(fake_engine.requests) == 2


@pytest.mark.parametrize(
    ("policy", "code", "reason"),
    [
        ({"max_relative_dose": 0.05}, "vectors_unavailable", "vectors-unavailable"),
        ({"mode": "sample", "schedule": "single:3"}, "shift_unavailable", "shift-failed"),
    ],
)
def test_a_policy_that_cannot_be_followed_is_not_the_clients_fault(
    client: TestClient,
    tenants: Tenants,
    fake_engine: FakeEngine,
    policy: Any,
    code: str,
    reason: str,
) -> None:
    """It was a 400 for every picture, whatever the policy's on_error said."""
    refused = ask(client, tenants.create("a", **policy), images=1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, code)
    assert not fake_engine.requests
    served = ask(client, tenants.create("b", on_error="serve-unsteered", **policy), images=1)
    assert (served.status_code, served.json()["steering"]["reason"]) == (200, reason)
    (request,) = fake_engine.requests
    assert not request.plan.is_active and request.steering.delta is None


# ----------------------------------------------------------------------------- what clients may ask


@pytest.mark.parametrize("steering", [{"alpha": 0}, {"mode": "off"}, {"alpha": 0.4}, {"alpha": 99}])
@pytest.mark.parametrize("kill", ["none", "unsteered", "reject"])
def test_no_client_weakens_its_tenants_policy_whatever_the_servers_lets_others_do(
    client_for: Callable[..., TestClient],
    tenants_of: Callable[[TestClient], Tenants],
    fake_engine: FakeEngine,
    steering: Any,
    kill: Any,
) -> None:
    client = client_for(client_override="any")
    tenants = tenants_of(client)
    key = tenants.create(client_override="none", rollout=50)
    tenants.do(lambda control: control.set_kill(kill, AUTHOR))
    for fields in ({"images": 1}, {}, {"images": 1, "stream": True}):
        response = ask(client, key, steering=steering, **fields)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (403, "steering_override_forbidden")
        assert "client_override is 'none'" in error["message"]
    assert not fake_engine.requests


def test_strengthen_and_any_are_the_tenants_own(client: TestClient, tenants: Tenants) -> None:
    more, free = (tenants.create(name, client_override=name) for name in ("strengthen", "any"))
    assert ask(client, more, images=1, steering={"alpha": 0.6}).json()["steering"]["alpha"] == 0.6
    assert ask(client, more, images=1, steering={"alpha": 0.4}).status_code == 403
    assert ask(client, free, images=1, steering={"alpha": 0.4}).json()["steering"]["alpha"] == 0.4


# ------------------------------------------------------------------------ on_error, kill, rollout


def test_on_error_is_the_tenants_own(
    client: TestClient, tenants: Tenants, fake_engine: FakeEngine
) -> None:
    keys = [
        tenants.create("strict", mode="sample"),
        tenants.create("lenient", mode="sample", on_error="serve-unsteered"),
    ]
    fake_engine.pair_error = PairError("no pair")
    strict, lenient = (ask(client, key, images=1) for key in keys)
    assert strict.status_code == 400
    assert lenient.json()["steering"]["reason"] == "shift-failed"
    fake_engine.pair_error, fake_engine.script = None, says("x", shift_failure="not finite")
    strict, lenient = (ask(client, key, images=1) for key in keys)
    assert strict.status_code == 500
    assert lenient.json()["steering"]["reason"] == "shift-failed"


@pytest.mark.parametrize("where", ["store", "replica"])
def test_the_kill_switch_holds_for_every_tenant_and_keeps_their_values(
    client: TestClient, tenants: Tenants, fake_engine: FakeEngine, where: str
) -> None:
    keys = [tenants.create("a"), tenants.create("b", mode="sample")]

    def kill(action: Any) -> None:
        if where == "store":
            tenants.do(lambda control: control.set_kill(action, AUTHOR))
        else:
            tenants.directory.local_kill = action

    kill("unsteered")
    for key in keys:
        steering = ask(client, key, images=1).json()["steering"]
        assert (steering["mode"], steering["reason"]) == ("off", "kill-switch")
    assert [request.steering.delta for request in fake_engine.requests] == [None, None]
    kill("reject")
    for key in keys:
        response = ask(client, key, images=1)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "steering_killed")
        assert ask(client, key).status_code == 200, "text is served"
    kill("none")
    modes = [ask(client, key, images=1).json()["steering"]["mode"] for key in keys]
    assert modes == ["dataset", "sample"]


@pytest.mark.parametrize("field", ["user", "safety_identifier"])
def test_a_rollout_goes_by_the_end_user_or_else_by_the_key(
    client: TestClient, tenants: Tenants, field: str
) -> None:
    key = tenants.create(rollout=50)
    policy = tenants.directory.policy("acme", 0)
    reasons = set()
    for number in range(20):
        user = f"user-{number}"
        for _ in range(2):
            steering = ask(client, key, images=1, **{field: user}).json()["steering"]
            assert steering["reason"] == (None if policy.is_rolled_out(user) else "rollout")
        reasons.add(steering["reason"])
    assert reasons == {None, "rollout"}
    for nobody in ({}, {field: ""}, {field: None}):
        steering = ask(client, key, images=1, **nobody).json()["steering"]
        assert steering["reason"] == (None if policy.is_rolled_out("first") else "rollout")
    assert ask(client, key, images=1, **{field: 5}).status_code == 400
