"""What was done to one answer, and how its header and its `steering` object say it. Pure.

Does not decide it (policy.py) nor send it (answers.py).
"""

from dataclasses import dataclass, replace

from server.engine.types import RequestTimings, SteeringApplied
from server.replies import SteeringReport
from steering.plan import SteeringPlan


@dataclass(frozen=True)
class Overhead:
    """Seconds that steering cost one request. shift: the passes of the sample level's two prompts,
    and of the token that a gate reads; inject: subtracting; store: taking the vectors; admission:
    policy, plan, making the two prompts.
    """

    shift_s: float = 0.0
    inject_s: float = 0.0
    store_s: float = 0.0
    admission_s: float = 0.0

    @property
    def total_s(self) -> float:
        return sum(self.by_stage.values())

    @property
    def by_stage(self) -> dict[str, float]:
        return {
            "shift": self.shift_s,
            "inject": self.inject_s,
            "store": self.store_s,
            "admission": self.admission_s,
        }


@dataclass(frozen=True)
class Steered:
    """The plan in force, the largest |delta_l| / |h_l| over the layers, and the share of alpha that
    a gate lets through, None without one.

    before: what steering cost until the engine was asked. All known at admission, except at sample
    level and with a gate, where the engine's SteeringApplied brings dose and opening or, under
    `serve-unsteered`, says that nothing is subtracted after all.
    """

    plan: SteeringPlan
    relative_dose: float = 0.0
    before: Overhead = Overhead()
    opening: float | None = None

    @property
    def alpha(self) -> float:
        """The strength that was really applied."""
        share = 1.0 if self.opening is None else self.opening
        return self.plan.alpha * share if self.plan.is_active else 0.0

    def after(self, event: SteeringApplied) -> "Steered":
        if event.failure is not None:
            return Steered(self.plan.unsteered("shift-failed"))
        return replace(self, relative_dose=event.relative_dose, opening=event.opening)

    @property
    def header(self) -> str:
        """The value of x-deshift-steering."""
        plan = self.plan
        if not plan.is_active:
            return f"mode=off; reason={plan.reason}; revision={plan.revision}"
        sources = {"corruption": plan.corruption_in_force, "vector": plan.vector_id}
        source = "; ".join(f"{name}={value}" for name, value in sources.items() if value)
        method = "" if plan.method == "subtract" else f"method={plan.method}; "
        gate = "" if plan.gate is None else f"gate={plan.gate}; "
        return (
            f"mode={plan.mode}; {method}alpha={plan.alpha:g}; {gate}schedule={plan.schedule}; "
            f"{source}; revision={plan.revision}"
        )

    @property
    def log_value(self) -> str:
        """The same in the log line of the request, which separates its values by spaces."""
        return self.header.replace(" ", "")

    def overhead(self, timings: RequestTimings) -> Overhead:
        """Of a finished request; answers tell the same as is exported. Where nothing was subtracted
        in the end, what measuring its shift took in vain."""
        if not self.plan.is_active:
            return Overhead(shift_s=timings.shift_s)
        return replace(self.before, shift_s=timings.shift_s, inject_s=timings.inject_s)

    def report(self, timings: RequestTimings) -> SteeringReport:
        plan = self.plan
        return SteeringReport(
            mode=plan.mode if plan.is_active else "off",
            alpha=self.alpha,
            gate_opening=self.opening,
            method=plan.method if plan.is_active else None,
            schedule=str(plan.schedule) if plan.is_active else None,
            vector=plan.vector_id if plan.is_active else None,
            corruption=plan.corruption_in_force,
            revision=plan.revision,
            relative_dose=round(self.relative_dose, 6),
            overhead_ms=round(1000 * self.overhead(timings).total_s, 3),
            shift_ms=round(1000 * timings.shift_s, 3),
            reason=plan.reason,
        )
