"""What one request gets: an immutable plan, fixed at admission for the request's life.

Covers parsing and bounds. Does not cover who may ask for what (the server's policy) nor the
tensors (methods.py).
"""

import hashlib
import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from steering.corruption import CORRUPTIONS, Corruption
from steering.errors import PlanError

Mode = Literal["off", "dataset", "sample"]
Method = Literal["subtract", "project", "safety-projected"]
Scope = Literal["last"]
# The last two: it should have been steered and could not be, and the policy serves it all the same.
Reason = Literal[
    "text-only",
    "disabled",
    "alpha-zero",
    "kill-switch",  # the operators steer nobody at the moment
    "rollout",  # the policy is tried on others
    "vectors-unavailable",
    "shift-failed",
]


@dataclass(frozen=True)
class Schedule:
    """Which layers subtract, and what: w_l of the method.

    kind `all`: layer l subtracts its own Delta_l. kind `incremental`: Delta_l - Delta_{l-1},
    with Delta_{-1} = 0, because the residual stream still carries what the layer below
    subtracted. `first` and `last` (0-based, inclusive; both None: every layer) restrict either
    kind; outside them nothing is subtracted. Raises PlanError for bounds that are no range.
    """

    kind: Literal["all", "incremental"] = "all"
    first: int | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        if (self.first is None) != (self.last is None):
            raise PlanError("a schedule has a first and a last layer, or neither")
        if self.first is not None and self.last is not None and not 0 <= self.first <= self.last:
            raise PlanError(
                f"schedule layers {self.first} to {self.last}: must satisfy 0 <= first <= last"
            )

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Parse `all`, `incremental`, `range:a-b`, `single:l` or `incremental:a-b`.

        Raises PlanError with the forms allowed.
        """
        name, _, bounds = text.partition(":")
        try:
            if text in ("all", "incremental"):
                return cls(kind="all" if text == "all" else "incremental")
            if name == "single":
                return cls(first=int(bounds), last=int(bounds))
            if name in ("range", "incremental"):
                first, last = (int(part) for part in bounds.split("-"))
                kind: Literal["all", "incremental"] = "all" if name == "range" else "incremental"
                return cls(kind=kind, first=first, last=last)
        except ValueError:
            pass
        raise PlanError(
            f"schedule {text!r} is not one of: all, incremental, range:a-b, single:l, "
            "incremental:a-b (0-based layers, both ends included)"
        )

    def layers(self, num_layers: int) -> range:
        """The layers that subtract in a model of `num_layers`. Raises PlanError beyond them."""
        first = 0 if self.first is None else self.first
        last = num_layers - 1 if self.last is None else self.last
        if last >= num_layers:
            raise PlanError(f"schedule {self} names layer {last}; the model has {num_layers}")
        return range(first, last + 1)

    def __str__(self) -> str:
        if self.first is None or self.last is None:
            return self.kind
        if self.kind == "incremental":
            return f"incremental:{self.first}-{self.last}"
        if self.first == self.last:
            return f"single:{self.first}"
        return f"range:{self.first}-{self.last}"


@dataclass(frozen=True)
class Gate:
    """A strength that depends on the prompt: alpha * sigmoid((score - threshold) / temperature).

    The score reads, at the prompt's last token after `layer` and with the image's shift taken out,
    where the prompt lies along the refusal direction: -0.5 like harmless text, +0.5 like harmful
    text of the anchor set, on average. Raises PlanError.
    """

    layer: int
    threshold: float = 0.0
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise PlanError(f"gate layer {self.layer} is below 0")
        if not math.isfinite(self.threshold):
            raise PlanError(f"gate threshold {self.threshold} is not a finite number")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise PlanError(f"gate temperature {self.temperature} is not a finite number above 0")

    @classmethod
    def parse(cls, text: str) -> "Gate | None":
        """Parse `none` or `layer:threshold:temperature`, of which the last two may be left out.

        Raises PlanError with the form.
        """
        if text == "none":
            return None
        layer, *numbers = text.split(":")
        try:
            if len(numbers) <= 2:
                return cls(int(layer), *(float(number) for number in numbers))
        except ValueError:
            pass
        raise PlanError(f"gate {text!r} is neither none nor layer:threshold:temperature (15:0:0.1)")

    def __str__(self) -> str:
        return f"{self.layer}:{_exact(self.threshold)}:{_exact(self.temperature)}"


@dataclass(frozen=True)
class SteeringPlan:
    """The steering of one request.

    method `subtract` is CMRM's; `safety-projected` subtracts only what of the shift lies along the
    refusal direction; `project` takes the state's own part in the shifts' leading subspace away,
    alpha of it. `gate`: alpha is the most that a prompt gets.

    mode `dataset` subtracts a vector set's shift, mode `sample` the request's own, measured
    against its pictures corrupted as `corruption` says. `vector_id` is the sha256 id of the vector
    set, None when the plan needs none (`needs_vectors`); `reason` says why nothing is applied
    and is None exactly when something is. `revision` is the policy revision that decided.
    `max_relative_dose` caps alpha * |w_l Delta_l| / |h_l| at every layer: in mode `dataset` more
    is refused, in mode `sample`, where nobody knows the shift beforehand, it is scaled down.
    """

    mode: Mode = "off"
    method: Method = "subtract"
    alpha: float = 0.0
    schedule: Schedule = Schedule()
    scope: Scope = "last"
    vector_id: str | None = None
    corruption: Corruption = "blank"
    max_relative_dose: float = math.inf
    revision: int = 0
    reason: Reason | None = "disabled"
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise PlanError(f"alpha {self.alpha} is not a finite number >= 0")
        if not self.max_relative_dose > 0:  # NaN would be no cap at all
            raise PlanError(f"max_relative_dose {self.max_relative_dose} is not above 0")
        if (self.reason is None) != self.is_active:
            raise PlanError(f"plan {self.mode}/{self.alpha}: reason {self.reason!r} contradicts it")
        if self.corruption not in CORRUPTIONS:
            kinds = ", ".join(CORRUPTIONS)
            raise PlanError(f"corruption {self.corruption!r} is not one of: {kinds}")
        if self.is_active:
            self._check_method()

    def _check_method(self) -> None:
        if self.needs_vectors != (self.vector_id is not None):
            raise PlanError(
                f"a plan of mode {self.mode}, method {self.method}, gate {self.gate or 'none'} "
                + ("needs the id of a vector set" if self.needs_vectors else "names no vector set")
            )
        check_method(self.mode, self.method, self.alpha, self.schedule)

    @property
    def is_active(self) -> bool:
        """Whether anything is subtracted."""
        return self.mode != "off" and self.alpha > 0 and self.reason is None

    @property
    def needs_vectors(self) -> bool:
        """Whether a vector set takes part: its shift, its subspace, or its refusal direction."""
        return needs_vectors(self.mode, self.method, self.gate)

    @property
    def corruption_in_force(self) -> Corruption | None:
        """How the pictures are corrupted that this request's own shift is measured with.

        None where no shift is measured: the plan is not active, or a vector set holds its shift.
        """
        return self.corruption if self.is_active and self.mode == "sample" else None

    def unsteered(self, reason: Reason) -> "SteeringPlan":
        """The plan of the same revision that applies nothing, for `reason`."""
        return SteeringPlan(revision=self.revision, reason=reason)

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that changes the output; equal for every spelling of nothing."""
        if not self.is_active:
            return hashlib.sha256(b"unsteered").hexdigest()
        plan = replace(self, alpha=float(self.alpha))
        without = {"revision"} if self.mode == "sample" else {"revision", "corruption"}
        values = [
            f"{f.name}={getattr(plan, f.name)}" for f in fields(plan) if f.name not in without
        ]
        return hashlib.sha256("; ".join(values).encode()).hexdigest()


def _exact(number: float) -> str:
    """As short as it can be read back: fingerprints are made of it."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def check_method(mode: Mode, method: Method, alpha: float, schedule: Schedule) -> None:
    """Raises PlanError where a method cannot go with the rest; mode off goes with everything."""
    if method != "project" or mode == "off":
        return
    if mode != "dataset" or schedule.kind != "all":
        raise PlanError(
            "method project needs mode dataset and a schedule of layers by themselves (all, "
            f"range:a-b, single:l), not mode {mode} with schedule {schedule}"
        )
    if alpha > 1:
        raise PlanError(f"method project takes away everything at alpha 1, not {alpha:g}")


def needs_vectors(mode: Mode, method: Method, gate: Gate | None) -> bool:
    """Whether steering of this kind takes part of a vector set."""
    return mode == "dataset" or (mode == "sample" and (method != "subtract" or gate is not None))
