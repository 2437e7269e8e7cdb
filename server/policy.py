"""Policy and a request's wish -> the plan of that request. Pure.

Does not cover tenants (there is one policy, from the settings) nor tensors (steering/methods.py).
"""

from dataclasses import dataclass, replace
from typing import Protocol

from server.config import ClientOverride, Settings
from server.errors import InvalidRequestError, OverrideForbiddenError, UnavailableError
from steering.plan import Mode, Reason, Schedule, SteeringPlan


@dataclass(frozen=True)
class Policy:
    """What the operator decided; `client_override` says how far a request may depart from it."""

    mode: Mode
    alpha: float
    schedule: Schedule
    vector_alias: str
    client_override: ClientOverride
    alpha_max: float
    max_relative_dose: float
    revision: int = 0

    @classmethod
    def from_settings(cls, settings: Settings) -> "Policy":
        return cls(
            mode=settings.steering_mode,
            alpha=settings.alpha,
            schedule=Schedule.parse(settings.schedule),
            vector_alias=settings.vector_alias,
            client_override=settings.client_override_in_force,
            alpha_max=settings.alpha_max,
            max_relative_dose=settings.max_relative_dose,
        )

    @property
    def is_active(self) -> bool:
        """Whether image requests are steered when nobody asks for anything else."""
        return self.mode != "off" and self.alpha > 0

    @property
    def in_force(self) -> tuple[Mode, float, Schedule] | None:
        """What reaches the hidden states; None, equal for every spelling of nothing."""
        return (self.mode, self.alpha, self.schedule) if self.is_active else None

    def __str__(self) -> str:
        if not self.is_active:
            return "mode=off"
        return f"mode={self.mode}; alpha={self.alpha:g}; schedule={self.schedule}"


@dataclass(frozen=True)
class Override:
    """A request's `steering` field; None is the policy's value."""

    mode: Mode | None = None
    alpha: float | None = None
    schedule: Schedule | None = None


class HasId(Protocol):
    """The part of a vector set that a plan needs."""

    @property
    def id(self) -> str: ...


def decide(
    policy: Policy, override: Override | None, has_images: bool, vectors: HasId | None
) -> SteeringPlan:
    """Fix the steering of one request, for its life.

    Raises OverrideForbiddenError, InvalidRequestError (alpha out of bounds) and UnavailableError
    (it would be steered and there are no vectors: never served unsteered instead). The dose's cap
    travels in the plan and is checked where the vectors are (methods.row_delta).
    """
    wanted = _permitted(policy, override or Override())
    if wanted.mode == "off":
        return _unsteered(policy, "disabled")
    if wanted.alpha == 0:
        return _unsteered(policy, "alpha-zero")
    if not has_images:
        return _unsteered(policy, "text-only")
    if vectors is None:
        raise UnavailableError(
            f"requests with images are steered here, and there is no valid set of shift vectors "
            f"under the alias {policy.vector_alias!r}; /ready says why",
            code="vectors_unavailable",
        )
    return SteeringPlan(
        mode=wanted.mode,
        alpha=wanted.alpha,
        schedule=wanted.schedule,
        vector_id=vectors.id,
        max_relative_dose=policy.max_relative_dose,
        revision=policy.revision,
        reason=None,
    )


def _unsteered(policy: Policy, reason: Reason) -> SteeringPlan:
    return SteeringPlan(revision=policy.revision, reason=reason)


def _permitted(policy: Policy, override: Override) -> Policy:
    """The policy with the override applied, if the policy allows it and alpha is in bounds."""
    wanted = replace(
        policy,
        mode=policy.mode if override.mode is None else override.mode,
        alpha=policy.alpha if override.alpha is None else override.alpha,
        schedule=policy.schedule if override.schedule is None else override.schedule,
    )
    if wanted.alpha < 0 or wanted.alpha > policy.alpha_max:
        raise InvalidRequestError(
            f"steering.alpha {wanted.alpha:g} is outside 0..{policy.alpha_max:g} "
            "(the operator's alpha_max)",
            param="steering.alpha",
        )
    if policy.client_override == "any" or wanted.in_force == policy.in_force:
        return wanted
    if policy.client_override == "none":
        raise OverrideForbiddenError(
            "this server's policy does not let requests change the steering "
            f"(client_override is 'none'; in force: {policy})"
        )
    if (wanted.mode, wanted.schedule) != (policy.mode, policy.schedule) or (
        wanted.alpha < policy.alpha
    ):
        raise OverrideForbiddenError(
            "this server's policy lets requests only raise alpha, in the same mode and schedule "
            f"(client_override is 'strengthen'; in force: {policy}; asked: {wanted})"
        )
    return wanted
