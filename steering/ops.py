"""Pure tensor mathematics of the method: differences, layer weights, doses. Device-agnostic."""

import torch
from torch import Tensor

from steering.plan import Schedule


def scheduled(mean: Tensor, schedule: Schedule) -> Tensor:
    """w_l * Delta_l for every layer: mean (L, D) -> (L, D), zero where the schedule is silent.

    `incremental` subtracts what each layer adds to the shift, Delta_l - Delta_{l-1}: the stream
    already carries what the layer below subtracted. A restricted incremental schedule starts with
    the difference at its first layer, so what lies below that layer stays in the stream.
    Raises PlanError for a layer that the model does not have.
    """
    terms = mean
    if schedule.kind == "incremental":
        terms = mean - torch.cat([torch.zeros_like(mean[:1]), mean[:-1]])
    weights = torch.zeros_like(mean[:, :1])
    weights[list(schedule.layers(mean.shape[0]))] = 1.0
    return weights * terms


def along(hidden: Tensor, directions: Tensor) -> Tensor:
    """The component of each state along its own direction: (..., D), unit vectors (..., D)."""
    return (hidden * directions).sum(dim=-1, keepdim=True) * directions


def within(hidden: Tensor, basis: Tensor) -> Tensor:
    """B^T B h, each state's part in the subspace of its own basis: (N, D), (N, k, D) -> (N, D).

    B (k, D) is orthonormal, but for a factor that makes it less than the whole part. Rows of zeros
    count for nothing. Both of one dtype and device.
    """
    taken = torch.bmm(basis, hidden[:, :, None])
    return torch.bmm(basis.transpose(1, 2), taken)[:, :, 0]


def dose(delta: Tensor, hidden_norm: Tensor) -> Tensor:
    """|delta_l| / |h_l| per layer: delta (L, D), hidden_norm (L,) -> (L,).

    The unit that compares across models and layers.
    """
    return delta.norm(dim=-1) / hidden_norm.clamp_min(torch.finfo(hidden_norm.dtype).tiny)


def pairwise_cosine_of_sum(unit_sum: Tensor, square_sum: Tensor, num: int) -> Tensor:
    """How uniform shifts are: their mean cosine over pairs i != j, from running sums in O(N).

    unit_sum (L, D): the sum of N unit vectors; square_sum (L,): of their squared norms (a shift
    of zero has none). 1 for a single prompt.
    """
    if num == 1:
        return torch.ones_like(square_sum)
    return (unit_sum.square().sum(dim=-1) - square_sum) / (num * (num - 1))
