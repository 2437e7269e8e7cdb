"""Conditions: what becomes of an item's picture, and which steering is asked for.

Covers reading them. What a condition's request looks like is in requests.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, get_args

from steering.corruption import CORRUPTIONS
from steering.errors import EvaluationError, PlanError
from steering.plan import Gate, Method, Schedule

PictureUse = Literal["own", "none", "caption", "blank", "noise"]
OFF: Mapping[str, Any] = {"mode": "off"}
# Text is never steered, so that these two ask for nothing and any server can answer them.
_FIXED: dict[str, tuple[PictureUse, Mapping[str, Any] | None]] = {
    "base": ("own", OFF),
    "text-only": ("none", None),
    "caption": ("caption", None),
    "blank": ("blank", OFF),
    "noise": ("noise", OFF),
    "served": ("own", None),
}
_STEERED = ("dataset", "sample")
_CHOICES = {"corruption": CORRUPTIONS, "method": get_args(Method)}
_PARSED = {"schedule": Schedule.parse, "gate": Gate.parse}
FIELDS = ("alpha", *_PARSED, *_CHOICES)
TABLE = "conditions.json"  # beside the demonstration model, whose strengths these are


@dataclass(frozen=True)
class Condition:
    """picture: the item's own (or dealt) one, none, its caption as text, or its own made blank or
    noise. steering: the request's `steering` field; None: not sent."""

    name: str
    picture: PictureUse
    steering: Mapping[str, Any] | None

    @property
    def needs_deshift(self) -> bool:
        """Whether only a server that knows the `steering` field can answer it."""
        return self.steering is not None and self.steering != OFF

    def without_steering(self) -> "Condition":
        """The same for a server that knows no steering. Raises EvaluationError if it cannot be."""
        if self.needs_deshift:
            raise EvaluationError(
                f"condition {self.name!r} needs a Deshift server, and this is another one: leave "
                "the steered conditions out"
            )
        return Condition(self.name, self.picture, None)


def parse(text: str, name: str | None = None) -> Condition:
    """Parse base, text-only, caption, blank, noise, served (as the server's policy has it), or
    `dataset` and `sample` with fields: `dataset:alpha=0.2,schedule=incremental`.

    name: what to call it; by default `text`. A field that is absent is left to the policy.
    Raises EvaluationError with what is allowed.
    """
    kind, colon, rest = text.partition(":")
    where = f"condition {text!r}"
    if kind in _FIXED and not colon:
        picture, steering = _FIXED[kind]
        return Condition(name or text, picture, steering)
    if kind in _FIXED:
        raise EvaluationError(f"{where}: {kind} has no fields")
    if kind not in _STEERED:
        known = ", ".join([*_FIXED, *_STEERED])
        raise EvaluationError(f"{where}: {kind!r} is not one of: {known}")
    fields: dict[str, Any] = {}
    for part in rest.split(",") if colon else []:
        field, equals, value = part.partition("=")
        if not (field and equals and value):
            raise EvaluationError(f"{where}: write FIELD=VALUE,... not {part!r}")
        if field in fields:
            raise EvaluationError(f"{where}: {field} is given twice")
        fields[field] = _value(where, field, value)
    if kind == "dataset" and "corruption" in fields:
        raise EvaluationError(f"{where}: a vector set has its corruption already")
    return Condition(name or text, "own", {"mode": kind, **fields})


def parse_all(texts: Sequence[str], table: bool = False) -> list[Condition]:
    """`texts` after the README's set if `table`. Raises EvaluationError, for two alike too."""
    found = (readme_table() if table else []) + [parse(text) for text in texts]
    if not found:
        raise EvaluationError("no condition: give --condition or --conditions-set table")
    for index, condition in enumerate(found):
        for other in found[:index]:
            if (condition.picture, condition.steering) == (other.picture, other.steering):
                raise EvaluationError(
                    f"conditions {other.name!r} and {condition.name!r} are the same"
                )
            if condition.name == other.name:
                raise EvaluationError(f"two conditions are called {condition.name!r}")
    return found


def readme_table() -> list[Condition]:
    """The README's columns, with the strengths that were chosen for the demonstration model."""
    rows = json.loads((resources.files("steering.demo") / TABLE).read_text("utf-8"))
    return [parse(row["condition"], row["name"]) for row in rows]


def _value(where: str, field: str, text: str) -> object:
    """A field's value as the wire has it; its bounds are the server's to check."""
    if field == "alpha":
        try:
            alpha = float(text)
        except ValueError:
            alpha = -1.0
        if not 0 <= alpha < float("inf"):
            raise EvaluationError(f"{where}: alpha {text!r} is not a number >= 0")
        return alpha
    if field in _PARSED:
        try:
            return str(_PARSED[field](text) or "none")
        except PlanError as error:
            raise EvaluationError(f"{where}: {error}") from None
    if field not in _CHOICES:
        raise EvaluationError(f"{where}: {field!r} is not one of: {', '.join(FIELDS)}")
    if text not in _CHOICES[field]:
        raise EvaluationError(
            f"{where}: {field} {text!r} is not one of: {', '.join(_CHOICES[field])}"
        )
    return text
