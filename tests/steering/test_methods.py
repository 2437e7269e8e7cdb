"""What a row subtracts, from its plan and a vector set or its own states."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from steering.errors import PlanError
from steering.methods import SampleShift, relative_dose, row_delta, sample_delta
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
        text_mean=None,
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


def test_a_dose_that_is_no_number_is_over_any_cap(vectors: ShiftVectors) -> None:
    """An alpha beyond float32 times a layer's zero is NaN, and it was subtracted."""
    with pytest.raises(PlanError, match="by nan of its hidden state's norm"):
        row_delta(plan(vectors, alpha=1e39, schedule="single:0"), vectors)


def test_another_vector_set_than_the_plans_is_refused(vectors: ShiftVectors) -> None:
    with pytest.raises(PlanError, match=vectors.id):
        row_delta(plan(vectors, 0.5), shift_vectors())


# -------------------------------------------------------------------------------- the sample level

SCHEDULES = ["all", "incremental", "range:1-2", "single:0", "single:3", "incremental:2-3"]
NUM_LAYERS, WIDTH = 4, 5


def sample_plan(alpha: float, schedule: str = "all", cap: float = math.inf) -> SteeringPlan:
    return SteeringPlan(
        mode="sample",
        alpha=alpha,
        schedule=Schedule.parse(schedule),
        max_relative_dose=cap,
        reason=None,
    )


def states(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(L, D)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_LAYERS, WIDTH, generator=generator).to(dtype)


def by_hand(plan: SteeringPlan, corrupted: Tensor, text_only: Tensor) -> list[list[float]]:
    """The definition in plain Python, on numbers instead of tensors."""
    h, t = corrupted.tolist(), text_only.tolist()
    shift = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(h, t, strict=True)]
    deltas = []
    for layer in range(NUM_LAYERS):
        term = [0.0] * WIDTH
        if layer in plan.schedule.layers(NUM_LAYERS):
            term = list(shift[layer])
            if plan.schedule.kind == "incremental" and layer > 0:
                term = [a - b for a, b in zip(term, shift[layer - 1], strict=True)]
        delta = [plan.alpha * value for value in term]
        reached = math.hypot(*delta) / math.hypot(*h[layer])
        if reached > plan.max_relative_dose:
            delta = [value * plan.max_relative_dose / reached for value in delta]
        deltas.append(delta)
    return deltas


def run(
    plans: list[SteeringPlan], corrupted: Tensor, text_only: Tensor
) -> tuple[SampleShift, list[Tensor]]:
    """Feed (L, R, D) states layer by layer; the shift and what each call returned."""
    shift = SampleShift(plans, NUM_LAYERS, torch.device("cpu"))
    returned = [shift.at(layer, corrupted[layer], text_only[layer]) for layer in range(NUM_LAYERS)]
    return shift, returned


@pytest.mark.parametrize("cap", [math.inf, 0.3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_sample_delta_is_the_definition(schedule: str, cap: float) -> None:
    plan, corrupted, text_only = sample_plan(0.7, schedule, cap), states(0), states(1)
    found = sample_delta(plan, corrupted, text_only)
    torch.testing.assert_close(found, torch.tensor(by_hand(plan, corrupted, text_only)))


def test_many_requests_at_once_each_get_what_they_get_alone() -> None:
    """All schedules and caps in one batch, beside a neighbour whose states are beyond measure."""
    plans = [sample_plan(0.7, s, cap) for s in SCHEDULES for cap in (math.inf, 0.3)]
    plans.append(sample_plan(1.0, "incremental"))
    corrupted = torch.stack([states(2 * row) for row in range(len(plans))], dim=1)
    text_only = torch.stack([states(2 * row + 1) for row in range(len(plans))], dim=1)
    corrupted[:, -1] = math.inf
    shift, returned = run(plans, corrupted, text_only)
    for row, plan in enumerate(plans[:-1]):
        alone = sample_delta(plan, corrupted[:, row], text_only[:, row])
        torch.testing.assert_close(shift.deltas[:, row], alone)
        expected = alone.norm(dim=-1) / corrupted[:, row].norm(dim=-1)
        torch.testing.assert_close(shift.doses[:, row], expected)
    assert torch.equal(torch.stack(returned)[:, :-1], shift.deltas[:, :-1])
    assert shift.deltas.shape == (NUM_LAYERS, len(plans), WIDTH)
    assert shift.doses.shape == (NUM_LAYERS, len(plans))
    assert shift.doses[:, 1].max().item() == pytest.approx(0.3)


def test_a_silent_layer_subtracts_exactly_nothing_whatever_its_states_are() -> None:
    """0 times infinity is NaN, which would reach the answer through the subtraction."""
    corrupted, text_only = states(0)[:, None].clone(), states(1)[:, None]
    corrupted[0] = math.inf
    for schedule in ("single:1", "range:2-3", "incremental:2-3"):
        shift, _ = run([sample_plan(1.0, schedule)], corrupted, text_only)
        assert shift.deltas[0].tolist() == [[0.0] * WIDTH]
        assert shift.deltas.isfinite().all()


def test_a_shift_that_is_not_finite_shows_in_the_doses() -> None:
    """So that the engine can tell; taking the smaller of dose and cap would hide an infinity."""
    for broken, cap in product((math.nan, math.inf), (0.5, math.inf)):
        for side in (0, 1):
            pair = [states(0)[:, None].clone(), states(1)[:, None].clone()]
            pair[side][2] = broken
            shift, _ = run([sample_plan(1.0, "all", cap)], pair[0], pair[1])
            assert shift.doses.isfinite().flatten().tolist() == [True, True, False, True]


def test_the_sign_subtracting_the_whole_shift_gives_the_text_only_state() -> None:
    corrupted, text_only = states(0), states(1)
    for layer in range(NUM_LAYERS):
        delta = sample_delta(sample_plan(1.0, f"single:{layer}"), corrupted, text_only)
        torch.testing.assert_close((corrupted - delta)[layer], text_only[layer])
        others = torch.arange(NUM_LAYERS) != layer
        assert torch.equal((corrupted - delta)[others], corrupted[others])


def test_no_shift_is_no_dose() -> None:
    same = states(0)
    assert sample_delta(sample_plan(1.0, cap=0.1), same, same).tolist() == [[0.0] * WIDTH] * 4
    shift, _ = run([sample_plan(1.0, cap=0.1)], same[:, None], same[:, None])
    assert shift.doses.tolist() == [[0.0]] * NUM_LAYERS


def test_half_precision_states_are_subtracted_in_float32() -> None:
    corrupted, text_only = states(0, torch.bfloat16), states(1, torch.bfloat16)
    expected = 0.5 * (corrupted.float() - text_only.float())
    assert torch.equal(sample_delta(sample_plan(0.5), corrupted, text_only), expected)
    shift, _ = run([sample_plan(0.5)], corrupted[:, None], text_only[:, None])
    assert torch.equal(shift.deltas[:, 0], expected)


def test_a_sample_schedule_beyond_the_model_is_refused_before_anything_is_measured() -> None:
    plan = sample_plan(1.0, "single:4")
    with pytest.raises(PlanError, match="names layer 4; the model has 4"):
        SampleShift([sample_plan(1.0), plan], NUM_LAYERS, torch.device("cpu"))
    with pytest.raises(PlanError, match="names layer 4; the model has 4"):
        sample_delta(plan, states(0), states(1))
