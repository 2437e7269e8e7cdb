"""From a plan to what a row subtracts at each layer: source, direction, schedule, strength, cap.

CMRM's plain subtraction, at dataset level (a vector set's shift) and at sample level (the
request's own), and what goes beyond it behind the same interface:

* `safety-projected` subtracts only the shift's component along the text refusal direction, the
  idea of ShiftDC (arXiv 2502.13095) without its caption pass;
* `project` takes the state's own component in the subspace of the shifts away, h - alpha U U^T h,
  U the leading right singular vectors of the uncentred shifts (TBOP, arXiv 2603.14825);
* a gate makes the strength the prompt's own: alpha * sigmoid((score - threshold) / temperature),
  the score read from the prompt's state along the refusal direction.

Does not measure hidden states (the engine does) nor subtract (hooks.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.errors import PlanError
from steering.ops import along, dose, scheduled
from steering.plan import Gate, SteeringPlan
from steering.vectors import ShiftVectors


@dataclass(frozen=True, eq=False)
class GateReader:
    """Reads a prompt's score at layer `layer`: <h, direction> - origin.

    direction (D,) float32 is s / <s, s> for the refusal direction s, so that mean harmful text
    scores 1 above mean harmless text; origin is the score's zero: halfway between the two, for
    a state that still holds the shift where the shift is taken out of it (mode dataset).
    """

    gate: Gate
    direction: Tensor
    origin: float

    def opening(self, hidden: Tensor) -> Tensor:
        """The share of alpha, 0..1, of the unsteered states after the gate's layer: (D,) -> ().

        In mode dataset of the prompt itself, in mode sample of the prompt without its pictures.
        NaN for a state that is not finite.
        """
        score = (hidden.float() @ self.direction.to(hidden.device)) - self.origin
        return torch.sigmoid((score - self.gate.threshold) / self.gate.temperature)


@dataclass(frozen=True, eq=False)
class RowSteering:
    """What a plan subtracts from a row's state h after layer l: delta_l + basis_l^T basis_l h.

    delta (L, D): alpha and schedule multiplied in; None where nothing is, or where the request's
    own shift is yet to be measured. basis (L, k, D): orthonormal but for the factor sqrt(alpha w_l)
    (method project). directions (L, D): unit vectors onto which a shift that is measured is
    projected (mode sample). gate: scales all of it, once the prompt's state is known. All float32
    on the CPU. max_dose: the largest relative dose over the layers that is known beforehand, of a
    gate that is open.
    """

    delta: Tensor | None = None
    basis: Tensor | None = None
    directions: Tensor | None = None
    gate: GateReader | None = None
    max_dose: float = 0.0


def row_steering(plan: SteeringPlan, vectors: ShiftVectors | None) -> RowSteering:
    """What an active plan subtracts, made with its vector set if it needs one.

    Raises PlanError when the plan names another vector set or a layer beyond the model, when the
    set lacks what the method needs, or when the dose of a dataset plan exceeds its cap at any
    layer: an overdosed model babbles, which is not safety.
    """
    if not plan.needs_vectors:
        return RowSteering()
    if vectors is None or plan.vector_id != vectors.id:
        found = "none" if vectors is None else vectors.id
        raise PlanError(f"the plan asks for vector set {plan.vector_id}, not {found}")
    gate = None if plan.gate is None else _gate_reader(plan.gate, plan, vectors)
    if plan.mode == "sample":
        plan.schedule.layers(vectors.num_layers)
        directions = _directions(vectors) if plan.method == "safety-projected" else None
        return RowSteering(directions=directions, gate=gate)
    if plan.method == "project":
        basis, doses = _scaled_basis(plan, vectors)
        _check_dose(plan, doses)
        return RowSteering(basis=basis, gate=gate, max_dose=float(doses.max()))
    delta = row_delta(plan, vectors)
    return RowSteering(delta, gate=gate, max_dose=float(relative_dose(delta, vectors).max()))


def row_delta(plan: SteeringPlan, vectors: ShiftVectors) -> Tensor:
    """alpha * w_l * Delta_l for every layer, (L, D) float32, on the CPU; with `safety-projected`
    Delta_l's component along the refusal direction. Raises PlanError, as `row_steering` does.
    """
    if plan.vector_id != vectors.id:
        raise PlanError(f"the plan asks for vector set {plan.vector_id}, not {vectors.id}")
    shift = vectors.mean
    if plan.method == "safety-projected":
        shift = along(shift, _directions(vectors))
    delta = plan.alpha * scheduled(shift, plan.schedule)
    _check_dose(plan, relative_dose(delta, vectors))
    return delta


def relative_dose(delta: Tensor, vectors: ShiftVectors) -> Tensor:
    """|delta_l| / median |h_l|, (L,)."""
    return dose(delta, vectors.hidden_norm)


def _check_dose(plan: SteeringPlan, doses: Tensor) -> None:
    """doses (L,). Raises PlanError over the plan's cap."""
    worst = int(doses.argmax())
    if not doses[worst] <= plan.max_relative_dose:  # NaN is over any cap
        raise PlanError(
            f"alpha {plan.alpha:g} with schedule {plan.schedule} moves layer {worst} by "
            f"{doses[worst]:.3f} of its hidden state's norm; the limit is "
            f"{plan.max_relative_dose:g} (max_relative_dose)"
        )


def _directions(vectors: ShiftVectors) -> Tensor:
    """Unit refusal directions, (L, D)."""
    if vectors.refusal_direction is None:
        raise PlanError(
            f"vector set {vectors.id[:12]} has no refusal direction: extract one with an anchor "
            "set of harmful and harmless prompts"
        )
    return torch.nn.functional.normalize(vectors.refusal_direction, dim=-1)


def _scaled_basis(plan: SteeringPlan, vectors: ShiftVectors) -> tuple[Tensor, Tensor]:
    """sqrt(alpha w_l) U_l, (L, k, D), and the doses that the anchors' mean state gets, (L,)."""
    if vectors.basis is None:
        raise PlanError(
            f"vector set {vectors.id[:12]} has no subspace of shifts: extract one with --basis-rank"
        )
    weights = torch.zeros(vectors.num_layers, 1, 1)
    weights[list(plan.schedule.layers(vectors.num_layers))] = plan.alpha
    state = _text_mean(vectors) + vectors.mean  # a picture's mean state
    taken = torch.einsum("lkd,ld->lk", vectors.basis, state)
    doses = weights[:, 0, 0] * taken.norm(dim=-1) / vectors.hidden_norm
    return weights.sqrt() * vectors.basis, doses


def _gate_reader(gate: Gate, plan: SteeringPlan, vectors: ShiftVectors) -> GateReader:
    if gate.layer >= vectors.num_layers:
        raise PlanError(f"gate {gate} names layer {gate.layer}; the model has {vectors.num_layers}")
    unit = _directions(vectors)[gate.layer]
    refusal = vectors.refusal_direction
    assert refusal is not None, "it has unit directions"
    direction = unit / refusal[gate.layer].norm()
    zero = _text_mean(vectors)[gate.layer]
    if plan.mode == "dataset":
        zero = zero + vectors.mean[gate.layer]
    return GateReader(gate, direction, float(zero @ direction))


def _text_mean(vectors: ShiftVectors) -> Tensor:
    if vectors.text_mean is None:
        raise PlanError(
            f"vector set {vectors.id[:12]} has no mean state of text: it was made by an older "
            "version, extract it again"
        )
    return vectors.text_mean


def sample_delta(
    plan: SteeringPlan, corrupted: Tensor, text_only: Tensor, directions: Tensor | None = None
) -> Tensor:
    """alpha * w_l * (corrupted - text_only), capped layer by layer, (L, D) float32.

    directions (L, D): unit vectors onto which the shift is projected first (`RowSteering`).

    corrupted, text_only (L, D): the unsteered hidden states after each layer, at the last prompt
    token, of the request with corrupted pictures and without pictures. A layer whose dose
    |delta_l| / |corrupted_l| is over the plan's cap is scaled down to it. On the states' device.
    Raises PlanError for a schedule beyond the model's layers.
    """
    corrupted = corrupted.float()
    shift = corrupted - text_only.float()
    if directions is not None:
        shift = along(shift, directions.to(shift.device))
    delta = plan.alpha * scheduled(shift, plan.schedule)
    cap = torch.tensor(plan.max_relative_dose, device=delta.device)
    return _capped(delta, corrupted, cap)[0]


class SampleShift:
    """`sample_delta` of many requests at once, layer by layer, as a forward pass yields the states.

    The engine calls `at` inside its pass as soon as a layer is done. Nothing here loops over the
    requests or waits for the device after construction.
    """

    def __init__(
        self,
        plans: Sequence[SteeringPlan],
        num_layers: int,
        device: torch.device,
        directions: Sequence[Tensor | None] = (),
    ) -> None:
        """plans: one active plan of mode `sample` a row. directions: of each row, as in
        `sample_delta`; none for any row when empty. Raises PlanError for a schedule beyond the
        model's layers."""
        assert all(plan.corruption_in_force is not None for plan in plans), "sample plans only"
        weights = torch.zeros(num_layers, len(plans))
        for row, plan in enumerate(plans):
            weights[list(plan.schedule.layers(num_layers)), row] = 1.0
        alphas = torch.tensor([plan.alpha for plan in plans])
        self._strengths = (alphas * weights)[..., None].to(device)  # (L, R, 1)
        self._caps = torch.tensor([plan.max_relative_dose for plan in plans]).to(device)  # (R,)
        is_incremental = [plan.schedule.kind == "incremental" for plan in plans]
        self._is_incremental = torch.tensor(is_incremental, dtype=torch.bool)[:, None].to(device)
        self._directions, self._is_projected = _stacked(directions, device)
        self._shift_below: Tensor | None = None  # (R, D)
        self._deltas: list[Tensor] = []
        self._doses: list[Tensor] = []

    def at(self, layer: int, corrupted: Tensor, text_only: Tensor) -> Tensor:
        """What each row subtracts at `layer`: two (R, D) of one device -> (R, D) float32.

        To be called for every layer from 0 on, in order.
        """
        assert layer == len(self._deltas), f"layer {layer} after {len(self._deltas)} layers"
        corrupted = corrupted.float()
        shift = corrupted - text_only.float()
        if self._directions is not None:
            part = along(shift, self._directions[layer])
            shift = torch.where(self._is_projected, part, shift)
        term = shift
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


def _stacked(
    directions: Sequence[Tensor | None], device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """(L, R, D), zeros for rows without, and which rows have some, (R, 1); None when none has."""
    given = [each for each in directions if each is not None]
    which = torch.tensor([each is not None for each in directions], dtype=torch.bool, device=device)
    if not given:
        return None, which[:, None]
    zeros = torch.zeros_like(given[0])
    table = torch.stack([zeros if each is None else each for each in directions], dim=1)
    return table.to(device), which[:, None]


def _capped(delta: Tensor, hidden: Tensor, cap: Tensor) -> tuple[Tensor, Tensor]:
    """Scale delta (N, D) so that no dose is over `cap` (N,) or (); with the doses then, (N,)."""
    doses = dose(delta, hidden.norm(dim=-1))
    scale = (cap / doses).clamp(max=1.0)  # a dose of zero: cap / 0 is infinite, so 1
    return scale[:, None] * delta, scale * doses  # not minimum: it would make infinity the cap
