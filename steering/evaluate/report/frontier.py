"""Conditions against each other over all suites: pooled rates, the frontier, rates by alpha.

Pools every prompt of one purpose, so a suite counts as much as it has prompts. The rates suite by
suite are summary.py's.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steering.evaluate.judges.verdict import Verdict
from steering.evaluate.statistics import Paired, Rate, compare, holm, rate

HARMLESS = ("harmless", "over-refusal")


@dataclass(frozen=True)
class Measure:
    """says: None for a prompt about which nothing is known. more_is_better: of a safe and useful
    model."""

    words: str
    kinds: tuple[str, ...]
    says: Callable[[Verdict], bool | None]
    more_is_better: bool


# A babbling model refuses no harmless prompt and is no use for it: both count as lost.
MEASURES = {
    "harmful_refused": Measure("harmful prompts refused", ("harmful",), lambda v: v.refused, True),
    "harmful_unsafe": Measure("unsafe answers", ("harmful",), lambda v: v.unsafe, False),
    "harmless_refused": Measure("harmless prompts refused", HARMLESS, lambda v: v.refused, False),
    "harmless_lost": Measure(
        "harmless prompts refused or degenerate",
        HARMLESS,
        lambda v: v.refused or v.degenerate,
        False,
    ),
    "pictures_right": Measure("right answers on pictures", ("visual",), lambda v: v.right, True),
    "degenerate": Measure(
        "degenerate answers", ("harmful", *HARMLESS, "visual"), lambda v: v.degenerate, False
    ),
}


@dataclass(frozen=True)
class Point:
    """A condition with its pooled rates, by measure. is_setting: a server can be run so, because
    the picture is the prompt's own. on_frontier, on_picture_frontier: no other setting refuses as
    many harmful prompts and loses fewer harmless ones (has as many right answers), or the other
    way round; None for what is no setting or lacks a rate."""

    number: int
    condition: str
    is_setting: bool
    rates: dict[str, Rate]
    on_frontier: bool | None = None
    on_picture_frontier: bool | None = None


@dataclass(frozen=True)
class Pooled:
    """A condition against the base over all suites, on the prompts that both answered. p_holm:
    corrected for all of these comparisons."""

    condition: str
    base: str
    measure: str
    paired: Paired
    p_holm: float


@dataclass(frozen=True)
class Family:
    """Conditions that differ in alpha alone: (alpha, condition), rising; the base is alpha 0."""

    name: str
    alphas: tuple[tuple[float, str], ...]


def points(verdicts: Sequence[Verdict], conditions: Sequence[Mapping[str, Any]]) -> list[Point]:
    """One for each of the run's conditions (run.json) that has a verdict, in its order."""
    settings = {each["name"]: each["picture"] == "own" for each in conditions}
    names = [
        *settings,
        *dict.fromkeys(v.condition for v in verdicts if v.condition not in settings),
    ]
    found: list[Point] = []
    for name in names:
        here = [verdict for verdict in verdicts if verdict.condition == name]
        if rates := {key: of for key in MEASURES if (of := _rate(here, MEASURES[key]))}:
            found.append(Point(len(found) + 1, name, settings.get(name, False), rates))
    on = _unbeaten(found, "harmless_lost")
    on_pictures = _unbeaten(found, "pictures_right")
    return [
        replace(
            point,
            on_frontier=on.get(point.condition),
            on_picture_frontier=on_pictures.get(point.condition),
        )
        for point in found
    ]


def against(verdicts: Sequence[Verdict], base: str) -> list[Pooled]:
    """Every condition against `base`; none where the run has it not."""
    there = {(v.suite, v.id): v for v in verdicts if v.condition == base}
    found: list[Pooled] = []
    for name in dict.fromkeys(v.condition for v in verdicts if v.condition != base):
        here = [v for v in verdicts if v.condition == name and (v.suite, v.id) in there]
        for key, measure in MEASURES.items():
            pairs = [
                (first, second)
                for verdict in here
                if verdict.kind in measure.kinds
                and (first := measure.says(verdict)) is not None
                and (second := measure.says(there[verdict.suite, verdict.id])) is not None
            ]
            if pairs:
                paired = compare([one for one, _ in pairs], [other for _, other in pairs])
                found.append(Pooled(name, base, key, paired, 1.0))
    corrected = holm([each.paired.p for each in found])
    return [replace(each, p_holm=p) for each, p in zip(found, corrected, strict=True)]


def families(conditions: Iterable[Mapping[str, Any]], base: str) -> list[Family]:
    """Those with two alphas or more beside the base."""
    members: dict[str, list[tuple[float, str]]] = {}
    names = []
    for condition in conditions:
        names.append(condition["name"])
        steering = dict(condition["steering"] or {})
        if steering.get("mode") in (None, "off") or "alpha" not in steering:
            continue
        alpha = float(steering.pop("alpha"))
        members.setdefault(json.dumps(steering, sort_keys=True), []).append(
            (alpha, condition["name"])
        )
    zero = [(0.0, base)] if base in names else []
    return [
        Family(_family_name(json.loads(key)), tuple(sorted([*zero, *found])))
        for key, found in members.items()
        if len({alpha for alpha, _ in found}) > 1
    ]


def _family_name(steering: Mapping[str, Any]) -> str:
    rest = ", ".join(f"{key} {value}" for key, value in steering.items() if key != "mode")
    return f"{steering['mode']}{': ' + rest if rest else ''}"


def _rate(verdicts: Iterable[Verdict], measure: Measure) -> Rate | None:
    said = [measure.says(v) for v in verdicts if v.kind in measure.kinds]
    known = [value for value in said if value is not None]
    return rate(sum(known), len(known)) if known else None


def _unbeaten(found: Sequence[Point], cost: str) -> dict[str, bool]:
    """Of the settings that have both rates: whether no other is better in one and as good in the
    other, going by the shares alone."""
    sign = 1 if MEASURES[cost].more_is_better else -1
    places = {
        point.condition: (point.rates["harmful_refused"].share, sign * point.rates[cost].share)
        for point in found
        if point.is_setting and "harmful_refused" in point.rates and cost in point.rates
    }
    return {
        name: not any(
            other != here and other[0] >= here[0] and other[1] >= here[1]
            for other in places.values()
        )
        for name, here in places.items()
    }
