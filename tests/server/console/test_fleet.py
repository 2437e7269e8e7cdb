"""What is in force where: from heartbeats and documents, without a store."""

import json
from typing import Any

import pytest

from server.console.fleet import Replica, in_force, replicas_of, tenant_page
from server.control import StoreState, TenantState
from server.documents import PolicyFields, TenantDocument, Until

VECTOR = "a" * 64


def state_of(*names: str, revision: int = 5, **policy: Any) -> StoreState:
    document = TenantDocument(policy=PolicyFields.model_validate(policy))
    tenants = {name: TenantState(name, document, revision) for name in names}
    return StoreState("epoch", 9, tenants, {"default": VECTOR}, "none", 0, {})


def replica(**changes: Any) -> Replica:
    values: dict[str, Any] = {
        "revision": 9,
        "epoch": "epoch",
        "age_s": 0.1,
        "store": "ok",
        "vectors": {"default": VECTOR},
    }
    (found,) = replicas_of({"one": json.dumps(values | changes)}).replicas
    return found


@pytest.mark.parametrize(
    ("changes", "state", "text"),
    [
        ({}, "in-force", "0.8"),
        ({"revision": 5}, "in-force", "0.8"),
        ({"revision": 4}, "behind", "at 4"),
        ({"revision": 4, "store": "unreachable"}, "unreachable", "at 4"),
        ({"revision": 4, "age_s": None}, "unreachable", "at 4"),
        ({"revision": 5, "store": "unreachable"}, "in-force", "0.8"),  # the last good one
        ({"epoch": "other"}, "behind", "has other data"),
        (
            {"problems": ["the document 'tenant/acme' cannot be read: x"]},
            "failing",
            "cannot read it",
        ),
        ({"problems": ["the document 'tenant/b' cannot be read: x"]}, "in-force", "0.8"),
        ({"problems": ["a"], "num_problems": 9}, "failing", "unsure: 9 problems"),
        ({"vectors": {}}, "failing", "no vectors default"),
        ({"vectors": {"default": "b" * 64}}, "behind", "older vectors default"),
        ({"kill": "unsteered"}, "killed", "unsteered"),
        ({"kill": "unsteered", "local_kill": "reject"}, "killed", "refuses pictures"),
    ],
)
def test_a_replica_has_what_is_asked_or_says_why_not(
    changes: dict[str, Any], state: str, text: str
) -> None:
    fleet = state_of("acme", alpha=0.8)
    tenant = fleet.tenants["acme"]
    found = in_force(tenant, tenant.document.policy, fleet, replica(**changes))
    assert (found.state, found.text) == (state, text)


@pytest.mark.parametrize("policy", [{"mode": "off"}, {"mode": "sample"}, {"alpha": 0.0}])
def test_vectors_matter_only_where_they_are_used(policy: dict[str, Any]) -> None:
    fleet = state_of("acme", **policy)
    tenant = fleet.tenants["acme"]
    found = in_force(tenant, tenant.document.policy, fleet, replica(vectors={}))
    assert found.state == "in-force"


def test_after_its_end_what_comes_then_is_asked() -> None:
    later = PolicyFields.model_validate({"alpha": 0.25})
    first = PolicyFields.model_validate({})
    document = TenantDocument(policy=first, until=Until(at=50.0, then=later))
    fleet = StoreState(
        "epoch", 9, {"acme": TenantState("acme", document, 5)}, {"default": VECTOR}, "none", 0, {}
    )
    (before,) = tenant_page(fleet, [replica()], 49.0, "", 1, 10).rows
    (after,) = tenant_page(fleet, [replica()], 50.0, "", 1, 10).rows
    assert (before.asked, before.ends_at) == ("1", 50.0)
    assert (after.asked, after.ends_at) == ("0.25", None)


def test_a_thousand_tenants_are_searched_and_paged() -> None:
    fleet = state_of(*(f"Tenant-{i:04d}" for i in range(1000)))
    page = tenant_page(fleet, [], 0.0, "", 20, 50)
    assert (page.num_pages, page.num_found, page.rows[-1].name) == (20, 1000, "Tenant-0999")
    found = tenant_page(fleet, [], 0.0, " tenant-001", 7, 50)
    assert [row.name for row in found.rows] == [f"Tenant-{i:04d}" for i in range(10, 20)]
    assert (found.number, found.num_tenants) == (1, 1000)
    assert tenant_page(fleet, [], 0.0, "nobody", 1, 50).rows == []


def test_a_heartbeat_of_another_version_is_named() -> None:
    view = replicas_of({"b": "{", "a": '{"revision": 1}', "c": "[]", "d": "null"})
    assert view.replicas == [] and view.unreadable == ["a", "b", "c", "d"]
