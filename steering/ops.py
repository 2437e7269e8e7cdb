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


def dose(delta: Tensor, hidden_norm: Tensor) -> Tensor:
    """|delta_l| / |h_l| per layer: delta (L, D), hidden_norm (L,) -> (L,).

    The unit that compares across models and layers.
    """
    return delta.norm(dim=-1) / hidden_norm.clamp_min(torch.finfo(hidden_norm.dtype).tiny)


def mean_pairwise_cosine(shifts: Tensor) -> Tensor:
    """How uniform the shift is: shifts (N, L, D) -> (L,), the mean cosine over pairs i != j.

    From the norm of the summed unit vectors, so O(N) and not O(N^2). 1 for a single prompt.
    """
    num = shifts.shape[0]
    if num == 1:
        return torch.ones(shifts.shape[1], dtype=shifts.dtype)
    units = torch.nn.functional.normalize(shifts, dim=-1)
    total = units.sum(dim=0).square().sum(dim=-1)
    return (total - units.square().sum(dim=-1).sum(dim=0)) / (num * (num - 1))
