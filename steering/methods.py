"""From a plan and a vector set to what a row subtracts at each layer.

CMRM's plain subtraction; other methods join here behind the same two functions.
"""

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
    if doses[worst] > plan.max_relative_dose:
        raise PlanError(
            f"alpha {plan.alpha:g} with schedule {plan.schedule} moves layer {worst} by "
            f"{doses[worst]:.3f} of its hidden state's norm; the limit is "
            f"{plan.max_relative_dose:g} (max_relative_dose)"
        )
    return delta


def relative_dose(delta: Tensor, vectors: ShiftVectors) -> Tensor:
    """|delta_l| / median |h_l|, (L,)."""
    return dose(delta, vectors.hidden_norm)
