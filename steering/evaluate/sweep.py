"""The full grid of a few arms and strengths on the same items, kept item by item.

For looking at the frontier as a whole and for checking the search against it. `sweep.json`
(format 1): `items`, in order, each as [suite, id, kind]; `points`, by condition (`base`: without
steering), each with `arm`, `alpha`, `refusal` (the server's words, or null), `figures` and, a
character an item, `refused`, `degenerate` and `right` (1, 0, - where nobody knows or no answer
came).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from steering.errors import EvaluationError
from steering.evaluate.arms import Arm
from steering.evaluate.bounds import Bounds, Counts
from steering.evaluate.calibration import Evaluate, Told
from steering.evaluate.conditions import Condition, parse
from steering.evaluate.evidence import frontier
from steering.evaluate.items import Item
from steering.evaluate.judges.verdict import RefusedBy, Verdict

FORMAT = 1
_OUTCOMES = ("refused", "degenerate", "right")


async def sweep(
    arms: Sequence[Arm],
    items: Sequence[Item],
    evaluate: Evaluate,
    bounds: Bounds,
    settings: Mapping[str, Any],
    told: Told = lambda _: None,
) -> dict[str, Any]:
    """Evaluate every strength of every arm: sweep.json. settings: as in run.json. Raises
    EvaluationError."""
    base = parse("base")
    unsteered = await evaluate(base, items)
    if isinstance(unsteered, str):
        raise EvaluationError(f"the server refuses to answer unsteered: {unsteered}")
    points = {base.name: _point(None, None, unsteered, unsteered, items)}
    counts = {base.name: Counts.of(unsteered, unsteered)}
    for arm in arms:
        for alpha in arm.alphas:
            condition = arm.condition(alpha)
            told(condition.name)
            verdicts = await evaluate(condition, items)
            points[condition.name] = _point(arm.name, alpha, verdicts, unsteered, items)
            if not isinstance(verdicts, str):
                counts[condition.name] = Counts.of(verdicts, unsteered)
    on_it = frontier(counts, bounds)
    return {
        "format": FORMAT,
        "settings": dict(settings),
        "bounds": asdict(bounds),
        "items": [[item.suite, item.id, item.kind] for item in items],
        "points": {
            name: {**point, "is_on_frontier": name in on_it} for name, point in points.items()
        },
    }


class Swept:
    """The `evaluate` of calibration.py that answers out of a sweep, and nothing else."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        """document: sweep.json. Raises EvaluationError for another version's."""
        if document.get("format") != FORMAT:
            raise EvaluationError(f"not a sweep of this version (format {FORMAT})")
        self.num_evaluations = 0
        self._points = document["points"]
        keys = [(suite, id_) for suite, id_, _ in document["items"]]
        self._places = {key: place for place, key in enumerate(keys)}
        self.items = [Item(id_, suite, kind, "") for suite, id_, kind in document["items"]]

    @property
    def arms(self) -> list[Arm]:
        """With the strengths that were swept."""
        alphas: dict[str, list[float]] = {}
        for point in self._points.values():
            if point["arm"] is not None:
                alphas.setdefault(point["arm"], []).append(point["alpha"])
        return [Arm(name, tuple(sorted(values))) for name, values in alphas.items()]

    async def __call__(self, condition: Condition, items: Sequence[Item]) -> list[Verdict] | str:
        """Raises EvaluationError for what was not swept."""
        point = self._points.get(condition.name)
        if point is None:
            raise EvaluationError(f"condition {condition.name!r} was not swept")
        self.num_evaluations += 1
        if point["refusal"] is not None:
            return str(point["refusal"])
        found = (self._verdict(condition.name, item, point) for item in items)
        return [verdict for verdict in found if verdict is not None]

    def _verdict(self, name: str, item: Item, point: Mapping[str, Any]) -> Verdict | None:
        place = self._places[item.suite, item.id]
        refused, degenerate, right = (_VALUES[point[outcome][place]] for outcome in _OUTCOMES)
        if refused is None or degenerate is None:
            return None
        said = RefusedBy(prefix=refused, classifier=float(refused))
        where = (name, item.suite, item.kind, item.id, "")
        return Verdict(*where, refused, said, degenerate, right, None)


_VALUES = {"1": True, "0": False, "-": None}
_LETTERS = {True: "1", False: "0", None: "-"}


def _point(
    arm: str | None,
    alpha: float | None,
    verdicts: Sequence[Verdict] | str,
    base: Sequence[Verdict],
    items: Sequence[Item],
) -> dict[str, Any]:
    if isinstance(verdicts, str):
        return {"arm": arm, "alpha": alpha, "refusal": verdicts, "figures": None}
    by_key = {(verdict.suite, verdict.id): verdict for verdict in verdicts}
    found = [by_key.get((item.suite, item.id)) for item in items]
    letters = {
        outcome: "".join(_LETTERS[getattr(verdict, outcome, None)] for verdict in found)
        for outcome in _OUTCOMES
    }
    figures = Counts.of(verdicts, base).as_dict()
    return {"arm": arm, "alpha": alpha, "refusal": None, "figures": figures, **letters}
