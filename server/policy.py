"""Policy and a request's wish -> the plan of that request. Pure.

Does not cover tenants (there is one policy, from the settings) nor tensors (steering/methods.py).
"""

from dataclasses import dataclass, replace
from typing import Protocol

from server.config import ClientOverride, Settings
from server.engine.types import OnError
from server.errors import InvalidRequestError, OverrideForbiddenError, UnavailableError
from steering.corruption import Corruption
from steering.plan import Mode, Reason, Schedule, SteeringPlan


@dataclass(frozen=True)
class Policy:
    """What the operator decided.

    `client_override` says how far a request may depart from it, `on_error` what happens to one
    that is to be steered, by the policy or by its own wish, and cannot be.
    """

    mode: Mode
    alpha: float
    schedule: Schedule
    vector_alias: str
    corruption: Corruption
    on_error: OnError
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
            corruption=settings.corruption,
            on_error=settings.on_error,
            client_override=settings.client_override_in_force,
            alpha_max=settings.alpha_max,
            max_relative_dose=settings.max_relative_dose,
        )

    @property
    def is_active(self) -> bool:
        """Whether image requests are steered when nobody asks for anything else."""
        return self.mode != "off" and self.alpha > 0

    @property
    def needs_vectors(self) -> bool:
        """Whether image requests are refused while there is no valid vector set."""
        return self.is_active and self.mode == "dataset" and self.on_error == "reject"

    @property
    def in_force(self) -> tuple[Mode, float, Schedule, Corruption | None] | None:
        """What reaches the hidden states; None, equal for every spelling of nothing."""
        corruption = self.corruption if self.mode == "sample" else None
        return (self.mode, self.alpha, self.schedule, corruption) if self.is_active else None

    def __str__(self) -> str:
        if not self.is_active:
            return "mode=off"
        text = f"mode={self.mode}; alpha={self.alpha:g}; schedule={self.schedule}"
        return f"{text}; corruption={self.corruption}" if self.mode == "sample" else text


@dataclass(frozen=True)
class Override:
    """A request's `steering` field; None is the policy's value."""

    mode: Mode | None = None
    alpha: float | None = None
    schedule: Schedule | None = None
    corruption: Corruption | None = None


class HasId(Protocol):
    """The part of a vector set that a plan needs."""

    @property
    def id(self) -> str: ...


def decide(
    policy: Policy, override: Override | None, has_images: bool, vectors: HasId | None
) -> SteeringPlan:
    """Fix the steering of one request, for its life.

    Raises OverrideForbiddenError, InvalidRequestError (alpha out of bounds, a corruption where
    nothing is measured with it) and UnavailableError (it would be steered by vectors, there are
    none, and the policy does not say to serve it unsteered then). The dose's cap travels in the
    plan and is applied where the shift is (steering/methods.py).
    """
    wanted = _permitted(policy, override or Override())
    if wanted.mode == "off":
        return _unsteered(policy, "disabled")
    if wanted.alpha == 0:
        return _unsteered(policy, "alpha-zero")
    if not has_images:
        return _unsteered(policy, "text-only")
    vector_id = None
    if wanted.mode == "dataset":
        if vectors is None:
            return _without_vectors(policy)
        vector_id = vectors.id
    return SteeringPlan(
        mode=wanted.mode,
        alpha=wanted.alpha,
        schedule=wanted.schedule,
        vector_id=vector_id,
        corruption=wanted.corruption,
        max_relative_dose=policy.max_relative_dose,
        revision=policy.revision,
        reason=None,
    )


def _without_vectors(policy: Policy) -> SteeringPlan:
    if policy.on_error == "serve-unsteered":
        return _unsteered(policy, "vectors-unavailable")
    raise UnavailableError(
        "this request is to be steered by shift vectors, and there is no valid set of them under "
        f"the alias {policy.vector_alias!r}; /ready says why",
        code="vectors_unavailable",
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
        corruption=policy.corruption if override.corruption is None else override.corruption,
    )
    if wanted.alpha < 0 or wanted.alpha > policy.alpha_max:
        raise InvalidRequestError(
            f"steering.alpha {wanted.alpha:g} is outside 0..{policy.alpha_max:g} "
            "(the operator's alpha_max)",
            param="steering.alpha",
        )
    if override.corruption is not None and wanted.mode == "dataset":
        raise InvalidRequestError(
            "steering.corruption has no effect in mode dataset, where the vector set was made "
            "with a corruption of its own: leave it out, or ask for mode sample",
            param="steering.corruption",
        )
    if policy.client_override == "any" or wanted.in_force == policy.in_force:
        return wanted
    if policy.client_override == "none":
        raise OverrideForbiddenError(
            "this server's policy does not let requests change the steering "
            f"(client_override is 'none'; in force: {policy})"
        )
    if wanted.alpha < policy.alpha or wanted != replace(policy, alpha=wanted.alpha):
        raise OverrideForbiddenError(
            "this server's policy lets requests only raise alpha and change nothing else "
            f"(client_override is 'strengthen'; in force: {policy}; asked: {wanted})"
        )
    return wanted
