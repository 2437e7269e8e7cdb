"""From a plan to what a row subtracts at each layer: the shift's source, its schedule, its cap.

CMRM's plain subtraction, at dataset level (a vector set's shift) and at sample level (the
request's own). Does not measure hidden states (the engine does) nor subtract (hooks.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from steering.errors import PlanError
from steering.ops import dose, scheduled
from steering.plan import SteeringPlan
from steering.vectors import ShiftVectors


def row_delta(plan: SteeringPlan, vectors: ShiftVectors) -> Tensor:
    """alpha * w_l * Delta_l for every layer, (L, D) float32, on the CPU.

    Raises PlanError when the plan names another vector set, a layer beyond the model, or when the
    dose exceeds the plan's cap at any layer: an overdosed model babbles, which is not safety.
    """
    if plan.vector_id != vectors.id:
        raise PlanError(f"the plan asks for vector set {plan.vector_id}, not {vectors.id}")
    delta = plan.alpha * scheduled(vectors.mean, plan.schedule)
    doses = relative_dose(delta, vectors)
    worst = int(doses.argmax())
    if not doses[worst] <= plan.max_relative_dose:  # NaN is over any cap
        raise PlanError(
            f"alpha {plan.alpha:g} with schedule {plan.schedule} moves layer {worst} by "
            f"{doses[worst]:.3f} of its hidden state's norm; the limit is "
            f"{plan.max_relative_dose:g} (max_relative_dose)"
        )
    return delta


def relative_dose(delta: Tensor, vectors: ShiftVectors) -> Tensor:
    """|delta_l| / median |h_l|, (L,)."""
    return dose(delta, vectors.hidden_norm)


def sample_delta(plan: SteeringPlan, corrupted: Tensor, text_only: Tensor) -> Tensor:
    """alpha * w_l * (corrupted - text_only), capped layer by layer, (L, D) float32.

    corrupted, text_only (L, D): the unsteered hidden states after each layer, at the last prompt
    token, of the request with corrupted pictures and without pictures. A layer whose dose
    |delta_l| / |corrupted_l| is over the plan's cap is scaled down to it. On the states' device.
    Raises PlanError for a schedule beyond the model's layers.
    """
    corrupted = corrupted.float()
    delta = plan.alpha * scheduled(corrupted - text_only.float(), plan.schedule)
    cap = torch.tensor(plan.max_relative_dose, device=delta.device)
    return _capped(delta, corrupted, cap)[0]


class SampleShift:
    """`sample_delta` of many requests at once, layer by layer, as a forward pass yields the states.

    The engine calls `at` inside its pass as soon as a layer is done. Nothing here loops over the
    requests or waits for the device after construction.
    """

    def __init__(
        self, plans: Sequence[SteeringPlan], num_layers: int, device: torch.device
    ) -> None:
        """plans: one active plan of mode `sample` a row. Raises PlanError for a schedule beyond
        the model's layers."""
        assert all(plan.corruption_in_force is not None for plan in plans), "sample plans only"
        weights = torch.zeros(num_layers, len(plans))
        for row, plan in enumerate(plans):
            weights[list(plan.schedule.layers(num_layers)), row] = 1.0
        alphas = torch.tensor([plan.alpha for plan in plans])
        self._strengths = (alphas * weights)[..., None].to(device)  # (L, R, 1)
        self._caps = torch.tensor([plan.max_relative_dose for plan in plans]).to(device)  # (R,)
        is_incremental = [plan.schedule.kind == "incremental" for plan in plans]
        self._is_incremental = torch.tensor(is_incremental, dtype=torch.bool)[:, None].to(device)
        self._shift_below: Tensor | None = None  # (R, D)
        self._deltas: list[Tensor] = []
        self._doses: list[Tensor] = []

    def at(self, layer: int, corrupted: Tensor, text_only: Tensor) -> Tensor:
        """What each row subtracts at `layer`: two (R, D) of one device -> (R, D) float32.

        To be called for every layer from 0 on, in order.
        """
        assert layer == len(self._deltas), f"layer {layer} after {len(self._deltas)} layers"
        corrupted = corrupted.float()
        term = shift = corrupted - text_only.float()
        if self._shift_below is not None:
            # Chosen, not multiplied by 0: that would make the layer below's infinity a NaN here.
            term = torch.where(self._is_incremental, shift - self._shift_below, shift)
        self._shift_below = shift
        strength = self._strengths[layer]
        delta = torch.where(strength > 0, strength * term, 0.0)
        delta, doses = _capped(delta, corrupted, self._caps)
        self._deltas.append(delta)
        self._doses.append(doses)
        return delta

    @property
    def deltas(self) -> Tensor:
        """All that `at` has returned, (L, R, D) float32."""
        return torch.stack(self._deltas)

    @property
    def doses(self) -> Tensor:
        """|delta_l| / |corrupted_l| after the cap, (L, R) float32.

        Not finite wherever a delta is not: a shift that could not be measured shows here.
        """
        return torch.stack(self._doses)


def _capped(delta: Tensor, hidden: Tensor, cap: Tensor) -> tuple[Tensor, Tensor]:
    """Scale delta (N, D) so that no dose is over `cap` (N,) or (); with the doses then, (N,)."""
    doses = dose(delta, hidden.norm(dim=-1))
    scale = (cap / doses).clamp(max=1.0)  # a dose of zero: cap / 0 is infinite, so 1
    return scale[:, None] * delta, scale * doses  # not minimum: it would make infinity the cap
