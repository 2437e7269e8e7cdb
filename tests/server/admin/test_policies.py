"""Policies over HTTP: whole and in part, stale revisions, ends, writers at once."""

import asyncio
import time
from typing import Any

import pytest

from tests.server.admin.conftest import API, Admin, error_of

pytestmark = pytest.mark.anyio
TENANTS = f"{API}/tenants"


async def test_a_policy_is_replaced_whole(admin: Admin) -> None:
    revision = await admin.created("acme", alpha=0.8, rollout=50)
    body = {"policy": {"alpha": 0.6}, "revision": revision, "reason": "too strong"}
    changed = await admin.put(f"{TENANTS}/acme/policy", json=body)
    assert changed.json() == {"revision": revision + 1}
    policy = (await admin.get(f"{TENANTS}/acme")).json()["policy"]
    assert (policy["alpha"], policy["rollout"]) == (0.6, 100.0)


async def test_a_patch_leaves_the_other_fields(admin: Admin) -> None:
    await admin.created("acme", alpha=0.8, rollout=50, concurrency=3)
    body = {"changes": {"alpha": 0.6, "concurrency": None}, "reason": "too strong"}
    assert (await admin.patch(f"{TENANTS}/acme/policy", json=body)).status_code == 200
    policy = (await admin.get(f"{TENANTS}/acme")).json()["policy"]
    assert (policy["alpha"], policy["rollout"], policy["concurrency"]) == (0.6, 50.0, None)


async def test_a_change_of_nothing_keeps_the_revision_and_leaves_no_trace(admin: Admin) -> None:
    revision = await admin.created("acme", alpha=0.8)
    body = {"policy": {"alpha": 0.8}, "revision": revision, "reason": "again"}
    patch = {"changes": {"alpha": 0.8}, "reason": "again"}
    for response in (
        await admin.put(f"{TENANTS}/acme/policy", json=body),
        await admin.put(f"{TENANTS}/acme/policy", json=body),
        await admin.patch(f"{TENANTS}/acme/policy", json=patch),
    ):
        assert response.json() == {"revision": revision}
    assert await admin.actions() == ["tenant.create"]


async def test_a_stale_revision_is_a_409_that_says_the_current_one(admin: Admin) -> None:
    stale = await admin.created("acme")
    patch = {"changes": {"alpha": 0.5}, "reason": "first"}
    now = (await admin.patch(f"{TENANTS}/acme/policy", json=patch)).json()["revision"]
    change = {"policy": {"alpha": 0.1}, "revision": stale, "reason": "second"}
    narrow = {"changes": {"alpha": 0.1}, "revision": stale, "reason": "second"}
    gone = {"reason": "second", "revision": stale}
    for response in (
        await admin.put(f"{TENANTS}/acme/policy", json=change),
        await admin.patch(f"{TENANTS}/acme/policy", json=narrow),
        await admin.delete(f"{TENANTS}/acme", params=gone),
    ):
        error = error_of(response)
        assert (response.status_code, error["code"]) == (409, "stale_revision")
        assert error["revision"] == now != stale
    assert (await admin.get(f"{TENANTS}/acme")).json()["policy"]["alpha"] == 0.5


async def test_a_temporary_policy_says_what_it_falls_back_to(admin: Admin) -> None:
    revision = await admin.created("acme", alpha=0.6)
    body = {
        "policy": {"alpha": 0.9},
        "revision": revision,
        "reason": "incident",
        "expires_in_s": 1800,
    }
    assert (await admin.put(f"{TENANTS}/acme/policy", json=body)).status_code == 200
    tenant = (await admin.get(f"{TENANTS}/acme")).json()
    assert tenant["in_force"]["alpha"] == 0.9
    assert tenant["until"]["then"]["alpha"] == 0.6
    assert tenant["until"]["at"] == pytest.approx(time.time() + 1800, abs=60)


async def test_a_patch_does_not_make_a_temporary_policy_permanent(admin: Admin) -> None:
    revision = await admin.created("acme", alpha=0.6)
    body = {"policy": {"alpha": 0.1}, "revision": revision, "reason": "try", "expires_in_s": 60}
    await admin.put(f"{TENANTS}/acme/policy", json=body)
    patch = {"changes": {"concurrency": 5}, "reason": "more room"}
    refused = await admin.patch(f"{TENANTS}/acme/policy", json=patch)
    assert refused.status_code == 400 and "temporary" in error_of(refused)["message"]
    patched = await admin.patch(f"{TENANTS}/acme/policy", json=patch | {"expires_in_s": 60})
    assert patched.status_code == 200
    assert (await admin.get(f"{TENANTS}/acme")).json()["until"]["then"]["alpha"] == 0.6


@pytest.mark.parametrize(
    ("policy", "param"),
    [
        ({"alpha": -1}, "policy.alpha"),
        ({"alpha": "0.5x"}, "policy.alpha"),
        ({"alpha": 3}, "policy"),
        ({"mode": "sometimes"}, "policy.mode"),
        ({"schedule": "range:9-1"}, "policy.schedule"),
        ({"strength": 1}, "policy.strength"),
        ({"requests_per_minute": 0}, "policy.requests_per_minute"),
        ({"rollout": 101}, "policy.rollout"),
        ([], "policy"),
    ],
)
async def test_a_policy_out_of_bounds_is_a_400_that_names_the_field(
    admin: Admin, policy: Any, param: str
) -> None:
    revision = await admin.created("acme")
    body = {"policy": policy, "revision": revision, "reason": "try"}
    response = await admin.put(f"{TENANTS}/acme/policy", json=body)
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    if isinstance(policy, dict):
        patch = {"changes": policy, "reason": "try"}
        patched = await admin.patch(f"{TENANTS}/acme/policy", json=patch)
        assert patched.status_code == 400
        field = param.removeprefix("policy").removeprefix(".")
        assert field in error_of(patched)["message"]
    assert await admin.actions() == ["tenant.create"]


async def test_of_writers_at_once_exactly_one_wins(admin: Admin) -> None:
    revision = await admin.created("acme")
    bodies: list[dict[str, Any]] = [
        {"policy": {"alpha": alpha / 10}, "revision": revision, "reason": f"writer {alpha}"}
        for alpha in range(1, 6)
    ]
    url = f"{TENANTS}/acme/policy"
    answers = await asyncio.gather(*(admin.put(url, json=body) for body in bodies))
    statuses = [answer.status_code for answer in answers]
    assert sorted(statuses) == [200, 409, 409, 409, 409]
    winner = bodies[statuses.index(200)]
    assert (await admin.get(f"{TENANTS}/acme")).json()["policy"]["alpha"] == (
        winner["policy"]["alpha"]
    )
    assert (await admin.actions()).count("policy.set") == 1
