"""How far a prompt lies from text, along the shift that a picture without content causes."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reference:
    """What a prompt is measured against: text (L, D), the states of text-only prompts, and delta
    (L, D), the shift; float32, of one device, neither alpha nor schedule multiplied in."""

    text: Tensor
    delta: Tensor


def shift_projection(hidden: Tensor, reference: Reference) -> Tensor:
    """The mean over layers of <h_l - t_l, Delta_l> / <Delta_l, Delta_l>, () float32.

    hidden (L, D): the unsteered states of a prompt's last token. 0: like text, 1: as far as a
    picture without content moves it. Layers without a shift do not count; NaN where none has one.
    On the states' device, which it does not wait for.
    """
    hidden = hidden.float()
    text, delta = reference.text.to(hidden.device), reference.delta.to(hidden.device)
    squares = delta.square().sum(dim=-1)
    counts = squares > 0
    shares = ((hidden - text) * delta).sum(dim=-1) / squares
    return torch.where(counts, shares, 0.0).sum() / counts.sum()
