"""Who may ask for what, and which plan comes out."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

from server.documents import PolicyFields, TenantDocument, parse
from server.errors import (
    ConfigError,
    InvalidRequestError,
    OverrideForbiddenError,
    UnavailableError,
)
from server.policy import Override, Policy, decide, default_fields
from steering.plan import Gate, Schedule, SteeringPlan
from tests.server.conftest import make_settings

ALL = Schedule()
INCREMENTAL = Schedule("incremental")


@dataclass(frozen=True)
class Vectors:
    id: str = "v1"


def make_policy(**changes: Any) -> Policy:
    return replace(Policy.of(PolicyFields(alpha=0.8), revision=7), **changes)


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
        Override(gate=Gate(1)),  # would close for some prompts
        Override(alpha=2.0, gate=Gate(1)),
        Override(method="safety-projected"),
        Override(alpha=1.0, method="project"),
    ],
)
def test_strengthen_forbids_the_rest(override: Override) -> None:
    with pytest.raises(OverrideForbiddenError, match="strengthen"):
        decide(make_policy(client_override="strengthen"), override, True, Vectors())


@pytest.mark.parametrize("gate", ["none", Gate(1, 0.5), Gate(1, temperature=0.2), Gate(2)])
def test_a_policys_gate_is_not_changed_under_strengthen_and_stays_where_alpha_rises(
    gate: Gate | Literal["none"],
) -> None:
    policy = make_policy(client_override="strengthen", gate=Gate(1))
    with pytest.raises(OverrideForbiddenError, match="gate=1:0:0.1"):
        decide(policy, Override(gate=gate), True, Vectors())
    plan = decide(policy, Override(alpha=1.0, gate=Gate(1)), True, Vectors())
    assert (plan.alpha, plan.gate) == (1.0, Gate(1))


def test_a_policy_that_was_stored_before_there_were_methods_and_gates_is_cmrm_itself() -> None:
    stored = '{"policy": {"mode": "dataset", "alpha": 0.5}}'
    policy = Policy.of(parse(TenantDocument, "tenant/a", stored).policy, 3, "a")
    plan = decide(policy, None, True, Vectors())
    assert (plan.alpha, plan.method, plan.gate) == (0.5, "subtract", None)


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


@pytest.mark.parametrize("client_override", ["none", "strengthen"])
@pytest.mark.parametrize("kill", ["none", "unsteered", "reject"])
@pytest.mark.parametrize("rollout", [0.0, 100.0])
@pytest.mark.parametrize("vectors", [None, Vectors()])
@pytest.mark.parametrize(
    "override",
    [Override(alpha=0.0), Override("off"), Override(alpha=0.1), Override("off", alpha=9.0)],
)
def test_a_wish_for_less_is_a_403_whatever_the_rest(
    client_override: Any, kill: Any, rollout: float, vectors: Vectors | None, override: Override
) -> None:
    policy = make_policy(client_override=client_override, rollout=rollout)
    for has_images in (True, False):
        with pytest.raises(OverrideForbiddenError):
            decide(policy, override, has_images, vectors, kill=kill, unit="u")


def test_under_none_an_alpha_out_of_bounds_is_forbidden_before_it_is_out_of_bounds() -> None:
    with pytest.raises(OverrideForbiddenError):
        decide(make_policy(), Override(alpha=9.0), True, Vectors())


def test_strengthen_may_begin_at_zero_but_not_where_the_mode_is_off() -> None:
    zero = make_policy(alpha=0.0, client_override="strengthen")
    assert decide(zero, Override(alpha=0.5), True, Vectors()).alpha == 0.5
    off = make_policy(mode="off", client_override="strengthen")
    assert decide(off, Override(alpha=2.0), True, Vectors()).reason == "disabled"
    with pytest.raises(OverrideForbiddenError):
        decide(off, Override("dataset", 2.0), True, Vectors())


def test_every_field_of_a_tenants_policy_that_steers_reaches_the_plan() -> None:
    fields = PolicyFields(
        mode="sample",
        alpha=0.3,
        schedule="range:1-2",
        corruption="gray",
        max_relative_dose=0.4,
        requests_per_minute=5,
        concurrency=6,
    )
    policy = Policy.of(fields, revision=12, tenant="acme")
    assert (policy.tenant, policy.requests_per_minute, policy.concurrency) == ("acme", 5, 6)
    assert decide(policy, None, True, None) == SteeringPlan(
        mode="sample",
        alpha=0.3,
        schedule=Schedule.parse("range:1-2"),
        corruption="gray",
        max_relative_dose=0.4,
        revision=12,
        reason=None,
    )


def test_the_settings_are_the_default_policy() -> None:
    settings = make_settings(
        steering_mode="sample",
        alpha=0.3,
        alpha_max=0.9,
        schedule="single:1",
        vector_alias="other",
        corruption="noise",
        on_error="serve-unsteered",
        client_override="strengthen",
        max_relative_dose=0.7,
    )
    assert default_fields(settings) == PolicyFields(
        mode="sample",
        alpha=0.3,
        alpha_max=0.9,
        schedule="single:1",
        vector_alias="other",
        corruption="noise",
        on_error="serve-unsteered",
        client_override="strengthen",
        max_relative_dose=0.7,
    )
    with pytest.raises(ConfigError, match="vector_alias"):
        default_fields(make_settings(vector_alias="no name"))


# ------------------------------------------------------------------------- kill switch and rollout


@pytest.mark.parametrize("policy", [make_policy(), sample_policy(), make_policy(mode="off")])
def test_the_kill_switch_reject_refuses_pictures_and_serves_text(policy: Policy) -> None:
    with pytest.raises(UnavailableError) as caught:
        decide(policy, None, True, Vectors(), kill="reject")
    assert caught.value.code == "steering_killed"
    assert not decide(policy, None, False, Vectors(), kill="reject").is_active


@pytest.mark.parametrize("vectors", [None, Vectors()])
def test_the_kill_switch_unsteered_steers_nobody_and_says_so(vectors: Vectors | None) -> None:
    plan = decide(make_policy(), None, True, vectors, kill="unsteered")
    assert plan == SteeringPlan(revision=7, reason="kill-switch")
    assert decide(make_policy(), None, False, vectors, kill="unsteered").reason == "text-only"
    wish = make_policy(client_override="any", mode="off")
    killed = decide(wish, Override("dataset"), True, vectors, kill="unsteered")
    assert killed.reason == "kill-switch"


def rolled_out(policy: Policy, num_units: int = 1000) -> set[int]:
    units = range(num_units)
    plans = {n: decide(policy, None, True, Vectors(), unit=f"user-{n}") for n in units}
    assert {plan.reason for plan in plans.values()} <= {None, "rollout"}
    assert {plan.revision for plan in plans.values()} == {7}
    return {number for number, plan in plans.items() if plan.is_active}


def test_a_rollout_takes_its_share_keeps_it_and_grows_around_it() -> None:
    some = rolled_out(make_policy(rollout=20.0))
    assert 160 <= len(some) <= 240, "3 standard deviations"
    assert some == rolled_out(make_policy(rollout=20.0)), "sticky"
    more = rolled_out(make_policy(rollout=60.0))
    assert some < more, "nobody leaves when it grows"
    assert rolled_out(make_policy(rollout=0.0)) == set()
    assert rolled_out(make_policy(rollout=100.0)) == set(range(1000))
    other = rolled_out(make_policy(rollout=20.0, tenant="other"))
    assert len(some & other) < 80, "each tenant tries on others of its users"


def test_outside_a_rollout_no_vectors_are_needed_and_no_wish_gets_in() -> None:
    policy = make_policy(rollout=0.0, client_override="strengthen")
    assert decide(policy, Override(alpha=2.0), True, None, unit="u").reason == "rollout"
