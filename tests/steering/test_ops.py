"""The tensor mathematics, against numbers written out by hand and naive loops."""

import pytest
import torch
from torch import Tensor

from steering.errors import PlanError
from steering.ops import dose, pairwise_cosine_of_sum, scheduled, within
from steering.plan import Schedule

MEAN = torch.tensor([[1.0, 2.0], [4.0, 8.0], [5.0, 5.0]])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("all", [[1, 2], [4, 8], [5, 5]]),
        ("incremental", [[1, 2], [3, 6], [1, -3]]),
        ("range:1-2", [[0, 0], [4, 8], [5, 5]]),
        ("single:0", [[1, 2], [0, 0], [0, 0]]),
        ("single:2", [[0, 0], [0, 0], [5, 5]]),
        ("incremental:1-2", [[0, 0], [3, 6], [1, -3]]),
        ("incremental:0-1", [[1, 2], [3, 6], [0, 0]]),
    ],
)
def test_a_schedule_weighs_each_layer_exactly(schedule: str, expected: list[list[int]]) -> None:
    before = MEAN.clone()
    assert torch.equal(scheduled(MEAN, Schedule.parse(schedule)), torch.tensor(expected).float())
    assert torch.equal(MEAN, before)


def test_the_incremental_terms_add_up_to_the_last_layers_shift() -> None:
    assert torch.equal(scheduled(MEAN, Schedule("incremental")).sum(dim=0), MEAN[-1])


def test_a_schedule_beyond_the_model_is_refused() -> None:
    with pytest.raises(PlanError, match="layer 3"):
        scheduled(MEAN, Schedule.parse("range:1-3"))


def test_the_dose_is_the_ratio_of_norms() -> None:
    delta = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]])
    assert dose(delta, torch.tensor([10.0, 1.0, 0.5])).tolist() == [0.5, 0.0, 4.0]


def consistency(shifts: Tensor) -> Tensor:
    units = torch.nn.functional.normalize(shifts, dim=-1)
    return pairwise_cosine_of_sum(units.sum(dim=0), units.square().sum(dim=(0, 2)), len(shifts))


def naive_cosine(shifts: Tensor) -> list[float]:
    num, num_layers, _ = shifts.shape
    means = []
    for layer in range(num_layers):
        cosines = [
            float(torch.cosine_similarity(shifts[i, layer], shifts[j, layer], dim=0))
            for i in range(num)
            for j in range(num)
            if i != j
        ]
        means.append(sum(cosines) / len(cosines))
    return means


def test_consistency_equals_the_mean_over_all_pairs() -> None:
    shifts = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    assert consistency(shifts).tolist() == pytest.approx(naive_cosine(shifts), abs=1e-5)


def test_consistency_is_one_for_parallel_and_minus_one_for_opposed_shifts() -> None:
    direction = torch.tensor([[1.0, 2.0, 2.0]])
    assert consistency(torch.stack([direction, 5 * direction])).item() == pytest.approx(1)
    assert consistency(torch.stack([direction, -direction])).item() == pytest.approx(-1)
    assert consistency(direction[None]).tolist() == [1.0]


def test_a_shift_of_zero_counts_as_no_direction() -> None:
    shifts = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]]])
    assert consistency(shifts).item() == pytest.approx(1 / 3)


def test_the_part_within_a_subspace() -> None:
    hidden = torch.tensor([[3.0, 4.0, 5.0], [3.0, 4.0, 5.0], [1.0, 2.0, 3.0]])
    plane = [[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]]
    line = [[0.0, 0.0, 0.5], [0.0, 0.0, 0.0]]  # a quarter of it, filled up
    basis = torch.tensor([plane, line, [[0.0] * 3] * 2])
    expected = [[3.0, 0.6 * 6.4, 0.8 * 6.4], [0.0, 0.0, 1.25], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(within(hidden, basis), torch.tensor(expected))
