"""Who may ask for what, and which plan comes out."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from server.errors import InvalidRequestError, OverrideForbiddenError, UnavailableError
from server.policy import Override, Policy, decide
from steering.plan import Schedule, SteeringPlan

ALL = Schedule()
INCREMENTAL = Schedule("incremental")


@dataclass(frozen=True)
class Vectors:
    id: str = "v1"


def make_policy(**changes: Any) -> Policy:
    policy = Policy(
        mode="dataset",
        alpha=0.8,
        schedule=ALL,
        vector_alias="default",
        corruption="blank",
        on_error="reject",
        client_override="none",
        alpha_max=2.0,
        max_relative_dose=1.0,
        revision=7,
    )
    return replace(policy, **changes)


def test_the_policy_alone_makes_the_plan() -> None:
    assert decide(make_policy(), None, True, Vectors()) == SteeringPlan(
        mode="dataset",
        alpha=0.8,
        schedule=ALL,
        vector_id="v1",
        max_relative_dose=1.0,
        revision=7,
        reason=None,
    )


@pytest.mark.parametrize(
    ("policy", "override", "has_images", "reason"),
    [
        (make_policy(), None, False, "text-only"),
        (make_policy(mode="off"), None, True, "disabled"),
        (make_policy(mode="off"), None, False, "disabled"),
        (make_policy(alpha=0.0), None, True, "alpha-zero"),
        (make_policy(client_override="any"), Override(alpha=0.0), True, "alpha-zero"),
        (make_policy(client_override="any"), Override(mode="off"), True, "disabled"),
        (make_policy(client_override="any"), Override(alpha=1.0), False, "text-only"),
    ],
)
def test_every_spelling_of_nothing_is_the_same_plan_with_its_reason(
    policy: Policy, override: Override | None, has_images: bool, reason: str
) -> None:
    plan = decide(policy, override, has_images, Vectors())
    assert not plan.is_active and plan.reason == reason
    assert plan.fingerprint == SteeringPlan().fingerprint
    assert plan.revision == 7


@pytest.mark.parametrize("has_images", [True, False])
@pytest.mark.parametrize(
    "override",
    [
        Override(alpha=0.0),
        Override(mode="off"),
        Override(alpha=1.0),
        Override(schedule=INCREMENTAL),
    ],
)
def test_under_none_a_change_is_forbidden(override: Override, has_images: bool) -> None:
    with pytest.raises(OverrideForbiddenError, match="client_override is 'none'"):
        decide(make_policy(), override, has_images, Vectors())


@pytest.mark.parametrize(
    "override", [Override(), Override(alpha=0.8), Override("dataset", 0.8, ALL)]
)
def test_under_none_a_wish_that_changes_nothing_is_fine(override: Override) -> None:
    assert decide(make_policy(), override, True, Vectors()).alpha == 0.8


def test_under_none_not_even_a_rounding_error_less_is_served() -> None:
    with pytest.raises(OverrideForbiddenError):
        decide(make_policy(), Override(alpha=0.8 - 1e-9), True, Vectors())


def test_where_the_policy_is_off_asking_for_off_or_for_another_alpha_changes_nothing() -> None:
    policy = make_policy(mode="off")
    assert decide(policy, Override(mode="off"), True, Vectors()).reason == "disabled"
    assert decide(policy, Override(alpha=0.1), True, Vectors()).reason == "disabled"
    with pytest.raises(OverrideForbiddenError):
        decide(policy, Override(mode="dataset"), True, Vectors())


@pytest.mark.parametrize("alpha", [0.8, 0.9, 2.0])
def test_strengthen_lets_alpha_rise(alpha: float) -> None:
    policy = make_policy(client_override="strengthen")
    assert decide(policy, Override(alpha=alpha), True, Vectors()).alpha == alpha


@pytest.mark.parametrize(
    "override",
    [
        Override(alpha=0.79),
        Override(alpha=0.0),
        Override(mode="off"),
        Override(alpha=1.0, schedule=INCREMENTAL),
    ],
)
def test_strengthen_forbids_the_rest(override: Override) -> None:
    with pytest.raises(OverrideForbiddenError, match="strengthen"):
        decide(make_policy(client_override="strengthen"), override, True, Vectors())


@pytest.mark.parametrize("client_override", ["strengthen", "any"])
def test_alpha_stays_within_the_operators_bounds(client_override: Any) -> None:
    policy = make_policy(client_override=client_override)
    with pytest.raises(InvalidRequestError, match=r"2\.1 is outside 0\.\.2") as caught:
        decide(policy, Override(alpha=2.1), True, Vectors())
    assert caught.value.param == "steering.alpha"


@pytest.mark.parametrize(
    ("changes", "override"),
    [
        ({}, None),
        ({"mode": "off", "client_override": "any"}, Override("dataset")),
        ({"mode": "sample", "client_override": "any"}, Override("dataset")),
    ],
)
def test_without_vectors_what_they_would_steer_is_refused_or_by_policy_served_unsteered(
    changes: dict[str, Any], override: Override | None
) -> None:
    policy = make_policy(**changes)
    with pytest.raises(UnavailableError, match="default"):
        decide(policy, override, True, None)
    plan = decide(replace(policy, on_error="serve-unsteered"), override, True, None)
    assert plan == SteeringPlan(revision=7, reason="vectors-unavailable")


def test_without_vectors_what_is_not_steered_is_served() -> None:
    assert decide(make_policy(), None, False, None).reason == "text-only"
    assert decide(make_policy(mode="off"), None, True, None).reason == "disabled"


# -------------------------------------------------------------------------------- the sample level


def sample_policy(**changes: Any) -> Policy:
    return make_policy(**{"mode": "sample", "schedule": INCREMENTAL} | changes)


@pytest.mark.parametrize("vectors", [None, Vectors()])
def test_a_sample_plan_names_no_vectors_whether_there_are_any_or_not(
    vectors: Vectors | None,
) -> None:
    assert decide(sample_policy(), None, True, vectors) == SteeringPlan(
        mode="sample",
        alpha=0.8,
        schedule=INCREMENTAL,
        corruption="blank",
        max_relative_dose=1.0,
        revision=7,
        reason=None,
    )


def test_under_any_a_request_chooses_mode_schedule_and_corruption() -> None:
    wish = Override("sample", 0.3, Schedule.parse("range:0-2"), "noise")
    plan = decide(make_policy(client_override="any"), wish, True, None)
    assert (plan.mode, plan.alpha, str(plan.schedule)) == ("sample", 0.3, "range:0-2")
    assert plan.corruption_in_force == "noise"
    back = decide(sample_policy(client_override="any"), Override("dataset"), True, Vectors())
    assert (back.mode, back.vector_id) == ("dataset", "v1")


@pytest.mark.parametrize(
    "override",
    [
        Override(alpha=0.7),
        Override(mode="off"),
        Override(mode="dataset"),
        Override(corruption="noise"),
        Override(schedule=ALL),
        Override(alpha=1.0, corruption="noise"),
        Override(alpha=1.0, schedule=ALL),
        Override(alpha=1.0, mode="dataset"),
    ],
)
@pytest.mark.parametrize("client_override", ["none", "strengthen"])
def test_a_sample_policy_is_not_weakened(override: Override, client_override: Any) -> None:
    with pytest.raises(OverrideForbiddenError, match="corruption=blank"):
        decide(sample_policy(client_override=client_override), override, True, Vectors())


def test_strengthen_lets_alpha_rise_at_sample_level_too() -> None:
    wish = Override("sample", 1.5, INCREMENTAL, "blank")
    assert decide(sample_policy(client_override="strengthen"), wish, True, None).alpha == 1.5


def test_the_sample_level_is_another_steering_not_a_stronger_one() -> None:
    with pytest.raises(OverrideForbiddenError, match="strengthen"):
        decide(make_policy(client_override="strengthen"), Override("sample", 2.0), True, Vectors())


def test_a_corruption_where_nothing_is_measured_with_it_is_refused_not_ignored() -> None:
    for client_override in ("none", "strengthen", "any"):
        policy = make_policy(client_override=client_override)
        with pytest.raises(InvalidRequestError, match="no effect in mode dataset") as caught:
            decide(policy, Override(corruption="noise"), True, Vectors())
        assert caught.value.param == "steering.corruption"


def test_vectors_are_needed_where_requests_would_be_refused_without() -> None:
    assert make_policy().needs_vectors
    assert not make_policy(on_error="serve-unsteered").needs_vectors
    assert not make_policy(alpha=0.0).needs_vectors
    assert not make_policy(mode="off").needs_vectors
    assert not sample_policy().needs_vectors
