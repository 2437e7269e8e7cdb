"""The policy form: its fields with bounds from PolicyFields, what was typed, and stale forms. Pure.

A field that PolicyFields gains appears here by itself; a test asks for its words in TEXTS.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ValidationError

from server.console.diffs import number
from server.documents import PolicyFields

Kind = Literal["choice", "number", "integer", "text"]


@dataclass(frozen=True)
class FormField:
    """An input. minimum, maximum: as HTML has them, "" without one; over: `minimum` itself is out.

    is_optional: empty means no limit.
    """

    name: str
    label: str
    help: str
    kind: Kind
    choices: tuple[str, ...] = ()
    minimum: str = ""
    maximum: str = ""
    over: bool = False
    is_optional: bool = False

    @property
    def bounds(self) -> str:
        """In words, e.g. `0 to 100`."""
        if self.minimum and self.maximum:
            return f"{self.minimum} to {float(self.maximum):,.15g}"
        if self.minimum:
            return f"above {self.minimum}" if self.over else f"{self.minimum} or more"
        return ""


@dataclass(frozen=True)
class TypedPolicy:
    """What a form said. policy: None where something is wrong; errors: by field, "" for none."""

    values: Mapping[str, str]
    policy: PolicyFields | None
    errors: Mapping[str, str]


@dataclass(frozen=True)
class Merge:
    """A stale form over what is stored now.

    values: what was typed, and what is stored now in the fields that were left as they were;
    conflicts: the stored value of the fields that both sides changed, each to another value.
    """

    values: Mapping[str, str]
    conflicts: Mapping[str, str]


GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Strength", ("mode", "alpha", "alpha_max", "gate")),
    ("What is subtracted", ("vector_alias", "method", "schedule", "corruption", "scope")),
    ("Guard rails", ("on_error", "client_override", "max_relative_dose")),
    ("Traffic", ("rollout", "requests_per_minute", "concurrency")),
)
TEXTS: dict[str, tuple[str, str]] = {
    "mode": (
        "Mode",
        "dataset subtracts a vector set's shift, sample measures each request's own, "
        "off subtracts nothing.",
    ),
    "alpha": ("Alpha", "How much of the shift is subtracted; 0 is an exact no-op."),
    "alpha_max": ("Largest alpha", "No request gets more, whoever asks for it."),
    "schedule": (
        "Layers",
        "all, incremental, range:a-b, single:l or incremental:a-b; layers count from 0.",
    ),
    "vector_alias": ("Vector alias", "The vector set that is subtracted, or read by a gate."),
    "corruption": (
        "Corruption",
        "Mode sample: what replaces the pictures while their shift is measured.",
    ),
    "method": (
        "Method",
        "subtract the shift (CMRM); safety-projected: only its part along the refusal direction; "
        "project: the state's own part in the shifts' subspace (mode dataset).",
    ),
    "gate": (
        "Gate",
        "none, or layer:threshold:temperature (15:0:0.1): alpha is then the most that a prompt "
        "gets, by how harmful its state reads.",
    ),
    "scope": ("Positions", "last: the prompt's last token and every token of the answer."),
    "on_error": (
        "If it cannot be steered",
        "reject answers with an error; serve-unsteered answers all the same and says so.",
    ),
    "client_override": (
        "Clients may",
        "none: change nothing; strengthen: raise alpha; any: change everything up to the largest "
        "alpha.",
    ),
    "max_relative_dose": (
        "Largest dose",
        "Cap of what is subtracted, relative to the hidden state's norm at every layer.",
    ),
    "rollout": ("Rollout, %", "Share of users who are steered; a user stays on one side."),
    "requests_per_minute": ("Requests per minute", "Of one replica; empty: no limit."),
    "concurrency": ("Concurrent requests", "Of one replica; empty: no limit."),
}


def policy_fields() -> dict[str, FormField]:
    return {name: _field(name, info) for name, info in PolicyFields.model_fields.items()}


def field_groups() -> list[tuple[str, list[FormField]]]:
    """The fields in the order of the page; those that no group names come last."""
    fields = policy_fields()
    groups = [(title, [fields.pop(n) for n in names if n in fields]) for title, names in GROUPS]
    return [*groups, ("Other", list(fields.values()))] if fields else groups


def values_of(policy: PolicyFields) -> dict[str, str]:
    """As the inputs hold them."""
    values = policy.model_dump(mode="json")
    return {name: _input_text(value) for name, value in values.items()}


def read_policy(form: Mapping[str, str]) -> TypedPolicy:
    """Every field is expected; one that is missing is an error, never its default."""
    values = {name: form.get(name, "").strip() for name in PolicyFields.model_fields}
    fields = policy_fields()
    given = {
        name: None if not text and fields[name].is_optional else text
        for name, text in values.items()
    }
    try:
        return TypedPolicy(values, PolicyFields.model_validate(given), {})
    except ValidationError as error:
        errors: dict[str, str] = {}
        for problem in error.errors(include_url=False, include_context=False):
            # What is wrong between two fields is told at alpha, the one that is changed most.
            name = str(problem["loc"][0]) if problem["loc"] else "alpha"
            errors.setdefault(name, problem["msg"].removeprefix("Value error, "))
        return TypedPolicy(values, None, errors)


def merge(typed: Mapping[str, str], seen: PolicyFields | None, now: PolicyFields) -> Merge:
    """seen: what the form showed at first; None when that is not known any more."""
    stored = values_of(now)
    base = values_of(seen) if seen is not None else None
    values, conflicts = dict(typed), {}
    for name, current in stored.items():
        if _is_same(typed[name], current):
            continue
        if base is not None and _is_same(typed[name], base[name]):
            values[name] = current
        elif base is None or not _is_same(base[name], current):
            conflicts[name] = current
    return Merge(values, conflicts)


def _is_same(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def _input_text(value: Any) -> str:
    if value is None:
        return ""
    return number(value) if isinstance(value, float) else str(value)


def _field(name: str, info: Any) -> FormField:
    label, help_text = TEXTS.get(name, (name.replace("_", " ").capitalize(), ""))
    annotation, bounds = info.annotation, list(info.metadata)
    is_optional = type(None) in get_args(annotation)
    if is_optional:
        annotation = next(each for each in get_args(annotation) if each is not type(None))
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        bounds += [bound for each in more for bound in getattr(each, "metadata", [each])]
    if get_origin(annotation) is Literal:
        return FormField(name, label, help_text, "choice", choices=get_args(annotation))
    lowest, highest, is_over = "", "", False
    for bound in bounds:
        if (least := getattr(bound, "ge", getattr(bound, "gt", None))) is not None:
            lowest, is_over = number(float(least)), hasattr(bound, "gt")
        if (most := getattr(bound, "le", None)) is not None:
            highest = number(float(most))
    kind: Kind = {int: "integer", float: "number"}.get(annotation, "text")  # type: ignore[assignment]
    return FormField(
        name, label, help_text, kind, (), lowest, highest, is_over, is_optional=is_optional
    )
