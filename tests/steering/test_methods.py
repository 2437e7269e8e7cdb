"""What a row subtracts, from its plan and a vector set."""

import pytest
import torch

from steering.errors import PlanError
from steering.methods import relative_dose, row_delta
from steering.plan import Schedule, SteeringPlan
from steering.vectors import ShiftVectors
from tests.steering.samples import identity, manifest, shift_vectors

MEAN = torch.tensor([[3.0, 4.0], [6.0, 8.0]])


@pytest.fixture
def vectors() -> ShiftVectors:
    """|Delta| is 5 and 10, |h| is 10 and 10."""
    return shift_vectors(
        manifest=manifest(model=identity(num_layers=2, hidden_size=2)),
        mean=MEAN,
        hidden_norm=torch.tensor([10.0, 10.0]),
        consistency=torch.ones(2),
        basis=None,
        singular_values=None,
        refusal_direction=None,
    )


def plan(
    vectors: ShiftVectors, alpha: float, schedule: str = "all", cap: float = 9
) -> SteeringPlan:
    return SteeringPlan(
        mode="dataset",
        alpha=alpha,
        schedule=Schedule.parse(schedule),
        vector_id=vectors.id,
        max_relative_dose=cap,
        reason=None,
    )


def test_a_row_subtracts_alpha_times_the_scheduled_shift(vectors: ShiftVectors) -> None:
    assert torch.equal(row_delta(plan(vectors, 0.5), vectors), 0.5 * MEAN)
    incremental = row_delta(plan(vectors, 2.0, "incremental"), vectors)
    assert incremental.tolist() == [[6.0, 8.0], [6.0, 8.0]]
    assert row_delta(plan(vectors, 1.0, "single:1"), vectors).tolist() == [[0.0, 0.0], [6.0, 8.0]]
    assert incremental.dtype == torch.float32


def test_the_vector_set_is_left_as_it_was(vectors: ShiftVectors) -> None:
    row_delta(plan(vectors, 1.0), vectors).add_(1)
    assert torch.equal(vectors.mean, torch.tensor([[3.0, 4.0], [6.0, 8.0]]))


def test_the_relative_dose_is_the_steps_share_of_the_states_norm(vectors: ShiftVectors) -> None:
    assert relative_dose(0.5 * MEAN, vectors).tolist() == [0.25, 0.5]


def test_a_dose_over_the_cap_is_refused_with_layer_dose_and_cap(vectors: ShiftVectors) -> None:
    row_delta(plan(vectors, 0.5, cap=0.5), vectors)
    with pytest.raises(PlanError, match=r"moves layer 1 by 0\.600 .* limit is 0\.5"):
        row_delta(plan(vectors, 0.6, cap=0.5), vectors)
    row_delta(plan(vectors, 0.6, "single:0", cap=0.5), vectors)


def test_another_vector_set_than_the_plans_is_refused(vectors: ShiftVectors) -> None:
    with pytest.raises(PlanError, match=vectors.id):
        row_delta(plan(vectors, 0.5), shift_vectors())
