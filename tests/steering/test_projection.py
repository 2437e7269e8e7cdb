"""The projection's arithmetic, against loops over its numbers."""

import math

import pytest
import torch

from steering.projection import Reference, shift_projection

TEXT = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 4.0]])
DELTA = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])


def test_text_is_at_zero_and_the_whole_shift_at_one() -> None:
    reference = Reference(TEXT, DELTA)
    assert float(shift_projection(TEXT, reference)) == 0.0
    assert float(shift_projection(TEXT + DELTA, reference)) == 1.0
    assert float(shift_projection(TEXT - 0.5 * DELTA, reference)) == -0.5


def test_it_is_the_mean_of_the_layers_own() -> None:
    hidden = torch.tensor([[2.0, 7.0, 1.0], [9.0, 2.0, 9.0]])
    expected = []
    for h, t, d in zip(hidden.tolist(), TEXT.tolist(), DELTA.tolist(), strict=True):
        along = sum((x - y) * z for x, y, z in zip(h, t, d, strict=True))
        expected.append(along / sum(z * z for z in d))
    projection = float(shift_projection(hidden, Reference(TEXT, DELTA)))
    assert projection == pytest.approx(sum(expected) / 2)
    assert projection != pytest.approx(expected[0])


def test_what_lies_across_the_shift_does_not_count() -> None:
    across = torch.tensor([[2.0, 5.0, -1.0], [7.0, 0.0, 1.0]])  # orthogonal to DELTA
    assert float(shift_projection(TEXT + across, Reference(TEXT, DELTA))) == 0.0


def test_layers_without_a_shift_do_not_count() -> None:
    delta = DELTA.clone()
    delta[1] = 0.0
    hidden = TEXT + 0.25 * DELTA
    assert float(shift_projection(hidden, Reference(TEXT, delta))) == 0.25
    assert math.isnan(float(shift_projection(hidden, Reference(TEXT, 0.0 * DELTA))))


def test_states_of_half_precision_are_measured_in_float32() -> None:
    projection = shift_projection((TEXT + DELTA).bfloat16(), Reference(TEXT, DELTA))
    assert (projection.dtype, float(projection)) == (torch.float32, 1.0)
