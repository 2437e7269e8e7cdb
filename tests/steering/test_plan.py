"""Schedules and plans: parsing, bounds, and every spelling of nothing."""

import math
from typing import Any

import pytest

from steering.errors import PlanError
from steering.plan import Gate, Schedule, SteeringPlan

ID = "f" * 64


def active(**changes: Any) -> SteeringPlan:
    values: dict[str, Any] = {"mode": "dataset", "alpha": 0.5, "vector_id": ID, "reason": None}
    return SteeringPlan(**values | changes)


def sample(**changes: Any) -> SteeringPlan:
    return active(**{"mode": "sample", "vector_id": None} | changes)


@pytest.mark.parametrize(
    ("text", "layers", "kind"),
    [
        ("all", [0, 1, 2, 3], "all"),
        ("incremental", [0, 1, 2, 3], "incremental"),
        ("range:1-2", [1, 2], "all"),
        ("single:3", [3], "all"),
        ("incremental:0-1", [0, 1], "incremental"),
    ],
)
def test_a_schedule_parses_and_prints_back(text: str, layers: list[int], kind: str) -> None:
    schedule = Schedule.parse(text)
    assert (list(schedule.layers(4)), schedule.kind) == (layers, kind)
    assert Schedule.parse(str(schedule)) == schedule
    assert str(schedule) == text


@pytest.mark.parametrize(
    "text",
    ["", "every", "all:", "all:1-2", "range", "range:", "range:1", "range:a-b", "range:1-2-3"]
    + ["single:", "single:x", "single:1-2", "incremental:", "ALL"],
)
def test_what_is_no_schedule_is_refused_with_the_forms_allowed(text: str) -> None:
    with pytest.raises(PlanError, match="range:a-b"):
        Schedule.parse(text)


@pytest.mark.parametrize("text", ["range:3-1", "single:-1"])
def test_layers_out_of_order_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="first <= last"):
        Schedule.parse(text)


def test_a_schedule_bounded_on_one_side_is_refused() -> None:
    """It printed as `all`, so plans that differ had one fingerprint."""
    with pytest.raises(PlanError, match="or neither"):
        Schedule(first=1)


def test_a_layer_beyond_the_model_is_refused_with_both_numbers() -> None:
    with pytest.raises(PlanError, match="names layer 4; the model has 4"):
        Schedule.parse("single:4").layers(4)


def test_every_spelling_of_nothing_is_one_plan() -> None:
    nothing = [
        SteeringPlan(),
        SteeringPlan(mode="off", alpha=0.7, vector_id=ID, reason="disabled"),
        active(alpha=0.0, reason="alpha-zero"),
        active(alpha=-0.0, reason="alpha-zero"),
        active(alpha=0, reason="alpha-zero"),
        active(reason="text-only"),
        active(reason="disabled", revision=9),
        sample(reason="shift-failed", corruption="noise"),
        active(reason="vectors-unavailable"),
    ]
    assert not any(plan.is_active for plan in nothing)
    assert len({plan.fingerprint for plan in nothing}) == 1


def test_the_fingerprint_changes_with_what_changes_the_output_and_not_with_the_revision() -> None:
    plan = active()
    assert active(revision=7).fingerprint == plan.fingerprint
    assert active(alpha=1).fingerprint == active(alpha=1.0).fingerprint
    different = [
        SteeringPlan(),
        active(alpha=0.25),
        active(schedule=Schedule.parse("incremental")),
        active(schedule=Schedule.parse("incremental:0-3")),
        active(vector_id="e" * 64),
        sample(),
        sample(corruption="noise"),
    ]
    assert len({p.fingerprint for p in [plan, *different]}) == 8


def test_the_corruption_counts_only_where_the_shift_is_measured_with_it() -> None:
    """A vector set has a corruption of its own, which its id covers."""
    assert active(corruption="noise").fingerprint == active().fingerprint
    assert active(corruption="noise").corruption_in_force is None
    assert sample(corruption="noise").corruption_in_force == "noise"
    assert sample(alpha=0.0, reason="alpha-zero").corruption_in_force is None


def test_a_plan_that_could_not_be_followed_keeps_its_revision() -> None:
    plan = sample(revision=9).unsteered("shift-failed")
    assert plan == SteeringPlan(revision=9, reason="shift-failed")
    assert plan.fingerprint == SteeringPlan().fingerprint


@pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf])
def test_an_alpha_that_is_no_finite_positive_number_is_refused(alpha: float) -> None:
    with pytest.raises(PlanError, match="alpha"):
        active(alpha=alpha)


@pytest.mark.parametrize("cap", [math.nan, 0.0, -1.0])
def test_a_dose_cap_that_caps_nothing_is_refused(cap: float) -> None:
    """A comparison with NaN is false, so a NaN cap let every dose pass."""
    with pytest.raises(PlanError, match="max_relative_dose"):
        active(max_relative_dose=cap)


def test_a_reason_stands_exactly_where_nothing_is_applied() -> None:
    with pytest.raises(PlanError, match="reason"):
        active(alpha=0.0)
    with pytest.raises(PlanError, match="reason"):
        SteeringPlan(reason=None)
    with pytest.raises(PlanError, match="id of a vector set"):
        active(vector_id=None)


def test_a_sample_plan_names_no_vector_set_and_a_corruption_that_exists() -> None:
    assert sample().is_active
    with pytest.raises(PlanError, match="names no vector set"):
        sample(vector_id=ID)
    with pytest.raises(PlanError, match="'black' is not one of: blank, noise"):
        sample(corruption="black")


@pytest.mark.parametrize("threshold", [0.0, 0.1, -0.25, 0.1234567, 0.1234568, 1234567.5, 1e-9])
def test_a_gate_reads_back_as_it_was_written(threshold: float) -> None:
    """It printed six digits, so that gates that differ beyond them had one fingerprint."""
    gate = Gate(1, threshold, temperature=0.7654321)
    assert Gate.parse(str(gate)) == gate
    assert str(Gate(15)) == "15:0:0.1"


def test_gates_that_differ_have_fingerprints_that_do() -> None:
    gates = [Gate(1, 0.1234567), Gate(1, 0.1234568), Gate(1, temperature=0.1234567), None]
    assert len({active(gate=gate).fingerprint for gate in gates}) == 4
