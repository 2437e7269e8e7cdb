"""What goes beyond plain subtraction: the refusal direction's part, the subspace, the gate."""

import math
from typing import Any

import pytest
import torch

from steering.errors import PlanError
from steering.methods import SampleShift, row_delta, row_steering, sample_delta
from steering.plan import Gate, Schedule, SteeringPlan
from steering.vectors import ShiftVectors
from tests.steering.samples import identity, manifest, shift_vectors

CPU = torch.device("cpu")
MEAN = torch.tensor([[3.0, 4.0, 0.0], [6.0, 8.0, 2.0]])
REFUSAL = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
TEXT = torch.tensor([[1.0, 1.0, 1.0], [5.0, 5.0, 5.0]])
BASIS = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[0.0, 0.6, 0.8], [1.0, 0.0, 0.0]]])


def vectors(**changes: Any) -> ShiftVectors:
    fields: dict[str, Any] = {
        "manifest": manifest(model=identity(num_layers=2, hidden_size=3)),
        "mean": MEAN,
        "hidden_norm": torch.tensor([10.0, 20.0]),
        "consistency": torch.ones(2),
        "basis": BASIS,
        "singular_values": torch.ones(2, 2),
        "refusal_direction": REFUSAL,
        "text_mean": TEXT,
    }
    return shift_vectors(**(fields | changes))


def plan(**changes: Any) -> SteeringPlan:
    fields: dict[str, Any] = {
        "mode": "dataset",
        "alpha": 0.5,
        "vector_id": vectors().id,
        "reason": None,
    }
    return SteeringPlan(**(fields | changes))


def test_safety_projected_subtracts_the_shifts_part_along_the_refusal_direction() -> None:
    delta = row_delta(plan(method="safety-projected"), vectors())
    assert delta.tolist() == [[1.5, 0.0, 0.0], [0.0, 0.0, 1.0]]
    incremental = plan(method="safety-projected", schedule=Schedule.parse("incremental"))
    assert row_delta(incremental, vectors()).tolist() == [[1.5, 0.0, 0.0], [-1.5, 0.0, 1.0]]


@pytest.mark.parametrize("schedule", ["all", "incremental", "single:1"])
def test_a_sample_level_shift_is_projected_likewise(schedule: str) -> None:
    vector_set = vectors()
    projected = plan(
        mode="sample", method="safety-projected", schedule=Schedule.parse(schedule), alpha=0.25
    )
    plain = plan(mode="sample", schedule=Schedule.parse(schedule), vector_id=None)
    directions = row_steering(projected, vector_set).directions
    assert directions is not None and directions.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    corrupted, text_only = torch.randn(2, 2, 3).unbind()
    expected = sample_delta(projected, corrupted, text_only, directions)
    by_hand = torch.stack(
        [(s @ d) * d for s, d in zip(corrupted - text_only, directions, strict=True)]
    )
    if schedule == "all":
        torch.testing.assert_close(expected, 0.25 * by_hand)
    shift = SampleShift([plain, projected], 2, CPU, [None, directions])
    for layer in range(2):
        shift.at(layer, corrupted[layer].expand(2, -1), text_only[layer].expand(2, -1))
    torch.testing.assert_close(shift.deltas[:, 1], expected)
    torch.testing.assert_close(shift.deltas[:, 0], sample_delta(plain, corrupted, text_only))


def test_project_takes_the_states_own_part_in_the_subspace() -> None:
    row = row_steering(plan(method="project", alpha=1.0), vectors())
    assert row.delta is None and row.basis is not None
    hidden = torch.randn(2, 3)
    taken = torch.einsum("lkd,lke,le->ld", row.basis, row.basis, hidden)
    left = torch.einsum("lkd,ld->lk", BASIS, hidden - taken)
    torch.testing.assert_close(left, torch.zeros(2, 2), atol=1e-6, rtol=0)
    half = row_steering(plan(method="project", schedule=Schedule.parse("single:1")), vectors())
    assert half.basis is not None and not half.basis[0].any()
    taken_half = torch.einsum("kd,ke,e->d", half.basis[1], half.basis[1], hidden[1])
    torch.testing.assert_close(taken_half, 0.5 * taken[1])


def test_projects_dose_is_what_the_mean_state_loses() -> None:
    row = row_steering(plan(method="project", alpha=1.0), vectors())
    state = TEXT + MEAN  # [4, 5, 1] loses its first two numbers
    expected = max(math.hypot(4, 5) / 10, math.hypot(11, 0.6 * 13 + 0.8 * 7) / 20)
    assert state[0].tolist() == [4, 5, 1] and row.max_dose == pytest.approx(expected)
    with pytest.raises(PlanError, match="max_relative_dose"):
        row_steering(plan(method="project", alpha=1.0, max_relative_dose=0.5), vectors())


@pytest.mark.parametrize(("mode", "shift"), [("dataset", MEAN[1]), ("sample", torch.zeros(3))])
def test_a_gate_opens_with_the_prompts_place_along_the_refusal_direction(
    mode: Any, shift: torch.Tensor
) -> None:
    """Halfway between the anchors' classes it is half open, whatever the shift adds."""
    gate = row_steering(plan(mode=mode, gate=Gate(1, 0.0, 0.1)), vectors()).gate
    assert gate is not None
    middle = TEXT[1] + shift
    assert float(gate.opening(middle)) == pytest.approx(0.5)
    harmful, harmless = middle + REFUSAL[1] / 2, middle - REFUSAL[1] / 2
    assert float(gate.opening(harmful)) == pytest.approx(1 / (1 + math.exp(-5)))
    assert float(gate.opening(harmless)) == pytest.approx(1 / (1 + math.exp(5)))
    assert math.isnan(float(gate.opening(middle * math.nan)))


@pytest.mark.parametrize(
    ("changes", "missing", "what"),
    [
        ({"method": "safety-projected"}, "refusal_direction", "no refusal direction"),
        ({"gate": Gate(0)}, "refusal_direction", "no refusal direction"),
        ({"gate": Gate(0)}, "text_mean", "no mean state of text"),
        ({"method": "project"}, "text_mean", "no mean state of text"),
    ],
)
def test_a_set_that_lacks_what_a_method_needs_is_refused(
    changes: dict[str, Any], missing: str, what: str
) -> None:
    lacking = vectors(**{missing: None})
    with pytest.raises(PlanError, match=what):
        row_steering(plan(vector_id=lacking.id, **changes), lacking)


def test_a_set_without_a_subspace_is_refused() -> None:
    lacking = vectors(basis=None, singular_values=None)
    with pytest.raises(PlanError, match="--basis-rank"):
        row_steering(plan(method="project", vector_id=lacking.id), lacking)


def test_a_gate_beyond_the_model_is_refused() -> None:
    with pytest.raises(PlanError, match="names layer 2; the model has 2"):
        row_steering(plan(gate=Gate(2)), vectors())


def test_a_plain_sample_plan_needs_no_set_and_others_need_their_own() -> None:
    plain = row_steering(plan(mode="sample", vector_id=None), None)
    assert (plain.delta, plain.basis, plain.directions, plain.gate) == (None, None, None, None)
    with pytest.raises(PlanError, match="asks for vector set"):
        row_steering(plan(gate=Gate(0)), None)
    with pytest.raises(PlanError, match="asks for vector set"):
        row_steering(plan(), vectors(text_mean=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "sample", "method": "project"}, "needs mode dataset"),
        ({"method": "project", "schedule": Schedule.parse("incremental")}, "needs mode dataset"),
        ({"method": "project", "alpha": 1.5}, "everything at alpha 1"),
        ({"mode": "sample", "gate": Gate(1), "vector_id": None}, "needs the id"),
        ({"mode": "sample"}, "names no vector set"),
    ],
)
def test_plans_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(**changes)


def test_a_gates_text_is_its_normal_form() -> None:
    assert str(Gate.parse("15")) == "15:0:0.1" and Gate.parse("none") is None
    assert Gate.parse("15:0.25:0.5") == Gate(15, 0.25, 0.5)
    for text in ("", "x", "1:2:3:4", "-1", "1:nan", "1:0:0", "1:0:inf"):
        with pytest.raises(PlanError):
            Gate.parse(text)


def test_method_and_gate_are_part_of_the_fingerprint() -> None:
    plans = [plan(), plan(method="safety-projected"), plan(gate=Gate(1)), plan(gate=Gate(1, 0.1))]
    assert len({each.fingerprint for each in plans}) == 4
