"""Policy and a request's wish -> the plan of that request. Pure.

Does not cover where a tenant's policy comes from (directory.py) nor tensors (steering/methods.py).
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from pydantic import ValidationError

from server.config import ClientOverride, Settings
from server.documents import DEFAULT_TENANT, KillAction, PolicyFields, explain
from server.engine.types import OnError
from server.errors import (
    ConfigError,
    InvalidRequestError,
    OverrideForbiddenError,
    UnavailableError,
)
from steering.corruption import Corruption
from steering.plan import (
    Gate,
    Method,
    Mode,
    Reason,
    Schedule,
    Scope,
    SteeringPlan,
    needs_vectors,
)


@dataclass(frozen=True)
class Policy:
    """What the operator decided for one tenant.

    `client_override` says how far a request may depart from it, `on_error` what happens to one
    that is to be steered, by the policy or by its own wish, and cannot be. `rollout`: the per cent
    of units (a request's end user, else its key) that are steered. It is for trying a policy, not
    a safety boundary: who chooses the unit chooses on which side it falls. requests_per_minute,
    concurrency: of one replica (limits.py).
    """

    tenant: str
    mode: Mode
    method: Method
    alpha: float
    alpha_max: float
    schedule: Schedule
    gate: Gate | None
    scope: Scope
    vector_alias: str
    corruption: Corruption
    on_error: OnError
    client_override: ClientOverride
    max_relative_dose: float
    rollout: float = 100.0
    requests_per_minute: int | None = None
    concurrency: int | None = None
    revision: int = 0

    @classmethod
    def of(cls, fields: PolicyFields, revision: int, tenant: str = DEFAULT_TENANT) -> "Policy":
        return cls(
            tenant=tenant,
            mode=fields.mode,
            method=fields.method,
            alpha=fields.alpha,
            alpha_max=fields.alpha_max,
            schedule=Schedule.parse(fields.schedule),
            gate=Gate.parse(fields.gate),
            scope=fields.scope,
            vector_alias=fields.vector_alias,
            corruption=fields.corruption,
            on_error=fields.on_error,
            client_override=fields.client_override,
            max_relative_dose=fields.max_relative_dose,
            rollout=fields.rollout,
            requests_per_minute=fields.requests_per_minute,
            concurrency=fields.concurrency,
            revision=revision,
        )

    @property
    def is_active(self) -> bool:
        """Whether image requests are steered when nobody asks for anything else."""
        return self.mode != "off" and self.alpha > 0

    @property
    def may_use_vectors(self) -> bool:
        """Whether some request may be steered by the alias's vector set, by its own wish too."""
        return self.needs_vectors or self.client_override == "any"

    @property
    def needs_vectors(self) -> bool:
        """Whether its own steering takes part of the alias's vector set."""
        return needs_vectors(self.mode, self.method, self.gate)

    @property
    def in_force(self) -> tuple[object, ...] | None:
        """What reaches the hidden states; None, equal for every spelling of nothing."""
        corruption = self.corruption if self.mode == "sample" else None
        what = (self.mode, self.method, self.alpha, self.schedule, self.gate, corruption)
        return what if self.is_active else None

    def is_rolled_out(self, unit: str) -> bool:
        """Whether `unit` is among the steered ones: always the same answer for the same unit."""
        digest = hashlib.sha256(f"{self.tenant}\0{unit}".encode()).digest()
        return 100 * int.from_bytes(digest[:8]) < self.rollout * 2**64

    def __str__(self) -> str:
        if not self.is_active:
            return "mode=off"
        text = f"mode={self.mode}; alpha={self.alpha:g}; schedule={self.schedule}"
        if self.method != "subtract":
            text += f"; method={self.method}"
        if self.gate is not None:
            text += f"; gate={self.gate}"
        return f"{text}; corruption={self.corruption}" if self.mode == "sample" else text


def default_fields(settings: Settings) -> PolicyFields:
    """The policy of requests without a tenant's key. Raises ConfigError."""
    try:
        return PolicyFields(
            mode=settings.steering_mode,
            method=settings.method,
            alpha=settings.alpha,
            alpha_max=settings.alpha_max,
            schedule=settings.schedule,
            gate=settings.gate,
            vector_alias=settings.vector_alias,
            corruption=settings.corruption,
            on_error=settings.on_error,
            client_override=settings.client_override_in_force,
            max_relative_dose=settings.max_relative_dose,
            rollout=100.0,
        )
    except ValidationError as error:
        raise ConfigError(f"the policy of the settings: {explain(error)}") from None


@dataclass(frozen=True)
class Override:
    """A request's `steering` field; None is the policy's value."""

    mode: Mode | None = None
    alpha: float | None = None
    schedule: Schedule | None = None
    corruption: Corruption | None = None
    method: Method | None = None
    gate: Gate | Literal["none"] | None = None


class HasId(Protocol):
    """The part of a vector set that a plan needs."""

    @property
    def id(self) -> str: ...


def decide(
    policy: Policy,
    override: Override | None,
    has_images: bool,
    vectors: HasId | None,
    *,
    kill: KillAction = "none",
    unit: str = "",
) -> SteeringPlan:
    """Fix the steering of one request, for its life. `unit` is what a rollout counts.

    Raises, in this order, OverrideForbiddenError; InvalidRequestError (alpha out of bounds, a
    corruption where nothing is measured with it); UnavailableError (the kill switch refuses
    pictures; or it would be steered by vectors, there are none, and the policy does not say to
    serve it unsteered then). The dose's cap travels in the plan and is applied where the shift is
    (steering/methods.py).
    """
    wanted = _permitted(policy, override or Override())
    if has_images and kill == "reject":
        raise UnavailableError(
            "the operators have stopped requests with pictures; text is served",
            code="steering_killed",
        )
    reason = _why_unsteered(wanted, has_images, kill, unit)
    if reason is not None:
        return _unsteered(policy, reason)
    if wanted.needs_vectors and vectors is None:
        return unsteerable(
            policy,
            "dataset",
            f"there is no valid set of them under the alias {policy.vector_alias!r}",
        )
    return SteeringPlan(
        mode=wanted.mode,
        method=wanted.method,
        alpha=wanted.alpha,
        schedule=wanted.schedule,
        scope=wanted.scope,
        gate=wanted.gate,
        vector_id=vectors.id if vectors is not None and wanted.needs_vectors else None,
        corruption=wanted.corruption,
        max_relative_dose=policy.max_relative_dose,
        revision=policy.revision,
        reason=None,
    )


def unsteerable(policy: Policy, mode: Mode, problem: str) -> SteeringPlan:
    """The plan of a request that is to be steered and cannot be, as the policy's on_error says.

    Raises UnavailableError with the problem where it says `reject`.
    """
    if policy.on_error == "serve-unsteered":
        return _unsteered(policy, "vectors-unavailable" if mode == "dataset" else "shift-failed")
    by = "shift vectors" if mode == "dataset" else "its own shift"
    raise UnavailableError(
        f"this request is to be steered by {by}, and {problem}; /ready says why",
        code="vectors_unavailable" if mode == "dataset" else "shift_unavailable",
    )


def _why_unsteered(wanted: Policy, has_images: bool, kill: KillAction, unit: str) -> Reason | None:
    """The first reason not to steer; None: the request is to be steered."""
    if wanted.mode == "off":
        return "disabled"
    if wanted.alpha == 0:
        return "alpha-zero"
    if not has_images:
        return "text-only"
    if kill == "unsteered":
        return "kill-switch"
    return None if wanted.is_rolled_out(unit) else "rollout"


def _unsteered(policy: Policy, reason: Reason) -> SteeringPlan:
    return SteeringPlan(revision=policy.revision, reason=reason)


def _permitted(policy: Policy, override: Override) -> Policy:
    """The policy with the override applied, if the policy allows it and it makes sense."""
    if override == Override():
        return policy
    wanted = replace(
        policy,
        mode=policy.mode if override.mode is None else override.mode,
        alpha=policy.alpha if override.alpha is None else override.alpha,
        schedule=policy.schedule if override.schedule is None else override.schedule,
        corruption=policy.corruption if override.corruption is None else override.corruption,
        method=policy.method if override.method is None else override.method,
        gate=_gate(policy, override),
    )
    if wanted.in_force != policy.in_force:
        _check_allowed(policy, wanted)
    if not 0 <= wanted.alpha <= policy.alpha_max:
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
    return wanted


def _gate(policy: Policy, override: Override) -> Gate | None:
    if override.gate is None:
        return policy.gate
    return None if override.gate == "none" else override.gate


def _check_allowed(policy: Policy, wanted: Policy) -> None:
    """Raises OverrideForbiddenError unless the policy lets a request ask for `wanted`."""
    if policy.client_override == "none":
        raise OverrideForbiddenError(
            "this server's policy does not let requests change the steering "
            f"(client_override is 'none'; in force: {policy})"
        )
    is_stronger = wanted.alpha >= policy.alpha and wanted == replace(policy, alpha=wanted.alpha)
    if policy.client_override == "strengthen" and not is_stronger:
        raise OverrideForbiddenError(
            "this server's policy lets requests only raise alpha and change nothing else "
            f"(client_override is 'strengthen'; in force: {policy}; asked: {wanted})"
        )
