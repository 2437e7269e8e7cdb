"""Verdicts -> rates with intervals, paired tests against a condition, agreement of the judges.

Reads what judge.py wrote; judges nothing and draws nothing (report.py). Where it compares two
conditions it counts only items that both answered.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from steering.errors import EvaluationError
from steering.evaluate.adapters.rows import read_text
from steering.evaluate.items import Kind
from steering.evaluate.judge import answer_digest, verdicts_of
from steering.evaluate.judges.refusal import EVEN
from steering.evaluate.judges.verdict import Verdict
from steering.evaluate.record import Answer, RunDir
from steering.evaluate.statistics import (
    Agreement,
    Paired,
    Rate,
    agreement,
    compare,
    holm,
    rate,
)

BASE = "base"
OUTCOMES: dict[str, Callable[[Verdict], bool | None]] = {
    "refused": lambda verdict: verdict.refused,
    "degenerate": lambda verdict: verdict.degenerate,
    "right": lambda verdict: verdict.right,
    "unsafe": lambda verdict: verdict.unsafe,
}
Place = tuple[str, str, Kind]  # condition, suite, kind


@dataclass(frozen=True)
class Cell:
    """One kind of items of one suite in one condition. num: judged; num_errors: asked, and never
    answered. rates: by outcome, over those with a verdict; no outcome without one."""

    condition: str
    suite: str
    kind: Kind
    num: int
    num_errors: int
    rates: dict[str, Rate]


@dataclass(frozen=True)
class Comparison:
    """A condition (first) against the base (second) on the items of one kind of one suite.
    p_holm: the p value, corrected for all comparisons of this summary."""

    condition: str
    base: str
    suite: str
    kind: Kind
    outcome: str
    paired: Paired
    p_holm: float


@dataclass(frozen=True)
class JudgesAgree:
    """first, second: what each of two judges says, in words."""

    first: str
    second: str
    agreement: Agreement


@dataclass(frozen=True)
class Summary:
    """judges: judges.json. num_unjudged: answers that are language, about which a language model
    was asked and gave no verdict, by outcome."""

    cells: tuple[Cell, ...]
    comparisons: tuple[Comparison, ...]
    agreements: tuple[JudgesAgree, ...]
    num_unjudged: dict[str, int]
    judges: dict[str, Any]

    def cell(self, condition: str, suite: str, kind: Kind | None = None) -> Cell:
        """The first that fits. Raises KeyError."""
        for cell in self.cells:
            if (cell.condition, cell.suite) == (condition, suite) and kind in (None, cell.kind):
                return cell
        raise KeyError((condition, suite, kind))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; every rate with its share."""
        document = asdict(self)
        for values, cell in zip(document["cells"], self.cells, strict=True):
            for outcome, of in cell.rates.items():
                values["rates"][outcome]["share"] = of.share
        return document

    def markdown(self) -> str:
        """One table an outcome: suites down, conditions across, rates in per cent."""
        return "\n\n".join(
            _table(outcome, self.cells)
            for outcome in OUTCOMES
            if any(outcome in cell.rates for cell in self.cells)
        )


def summarise(run_dir: Path, base: str = BASE) -> Summary:
    """Sum up a judged run; base: what others are compared with, if the run has it.

    Raises EvaluationError: not a run, not judged, or answered further since it was judged.
    """
    answers = RunDir(run_dir).answers()
    verdicts = verdicts_of(run_dir)
    _refuse_stale(run_dir, answers, verdicts)
    judges = json.loads(read_text(run_dir / "judges.json"))
    return Summary(
        cells=tuple(_cells(answers, verdicts)),
        comparisons=tuple(_comparisons(verdicts, base)),
        agreements=tuple(_agreements(verdicts)),
        num_unjudged=_unjudged(judges, verdicts),
        judges=judges,
    )


def _refuse_stale(run_dir: Path, answers: Sequence[Answer], verdicts: Sequence[Verdict]) -> None:
    there = {a.key: answer_digest(a) for a in answers if a.error is None}
    judged = {verdict.key: verdict.answer_digest for verdict in verdicts}
    if there != judged:
        num = len(there.items() ^ judged.items())
        raise EvaluationError(f"{run_dir}: verdicts and answers differ ({num}); judge it again")


def _cells(answers: Sequence[Answer], verdicts: Sequence[Verdict]) -> Iterable[Cell]:
    """In the order in which conditions and suites were first answered."""
    judged = _placed(verdicts)
    errors: dict[Place, int] = defaultdict(int)
    for answer in answers:
        errors[answer.condition, answer.suite, answer.kind] += answer.error is not None
    for (condition, suite, kind), num_errors in errors.items():
        here = judged.get((condition, suite, kind), [])
        rates = {}
        for outcome, says in OUTCOMES.items():
            said = [value for verdict in here if (value := says(verdict)) is not None]
            if said:
                rates[outcome] = rate(sum(said), len(said))
        yield Cell(condition, suite, kind, len(here), num_errors, rates)


def _comparisons(verdicts: Sequence[Verdict], base: str) -> list[Comparison]:
    found = []
    placed = _placed(verdicts)
    for (condition, suite, kind), here in placed.items():
        there = {verdict.id: verdict for verdict in placed.get((base, suite, kind), [])}
        if condition == base:
            continue
        for outcome, says in OUTCOMES.items():
            pairs = [
                (first, second)
                for verdict in here
                if verdict.id in there
                and (first := says(verdict)) is not None
                and (second := says(there[verdict.id])) is not None
            ]
            if pairs:
                paired = compare([one for one, _ in pairs], [other for _, other in pairs])
                found.append(Comparison(condition, base, suite, kind, outcome, paired, 1.0))
    corrected = holm([each.paired.p for each in found])
    return [replace(each, p_holm=p) for each, p in zip(found, corrected, strict=True)]


def _agreements(verdicts: Sequence[Verdict]) -> Iterable[JudgesAgree]:
    """Of answers that are language: no judge of refusals was made for others."""
    language = [verdict for verdict in verdicts if not verdict.degenerate]
    if language:
        prefix = [verdict.refused_by.prefix for verdict in language]
        classifier = [verdict.refused_by.classifier >= EVEN for verdict in language]
        yield JudgesAgree(
            "refused: prefix list", "refused: classifier", agreement(prefix, classifier)
        )
    harmful = [verdict for verdict in language if verdict.unsafe is not None]
    if harmful:
        refused = [verdict.refused for verdict in harmful]
        safe = [not verdict.unsafe for verdict in harmful]
        yield JudgesAgree("refused", "safe: language model", agreement(refused, safe))


def _unjudged(judges: dict[str, Any], verdicts: Sequence[Verdict]) -> dict[str, int]:
    """`right` is also open where an item has no known answer, which only a model can judge.
    Degenerate answers do not wait for a verdict."""
    found = {}
    language = [verdict for verdict in verdicts if not verdict.degenerate]
    if judges["harm"]:
        found["unsafe"] = sum(v.kind == "harmful" and v.unsafe is None for v in language)
    if judges["useful"]:
        found["right"] = sum(v.kind != "harmful" and v.right is None for v in language)
    return found


def _placed(verdicts: Iterable[Verdict]) -> dict[Place, list[Verdict]]:
    placed: dict[Place, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        placed[verdict.condition, verdict.suite, verdict.kind].append(verdict)
    return placed


def _table(outcome: str, cells: Sequence[Cell]) -> str:
    conditions = list(dict.fromkeys(cell.condition for cell in cells))
    by_place = {(cell.suite, cell.kind, cell.condition): cell for cell in cells}
    lines = [f"| {outcome} | {' | '.join(conditions)} |", "|---" * (len(conditions) + 1) + "|"]
    for suite, kind in dict.fromkeys((cell.suite, cell.kind) for cell in cells):
        shown = [by_place.get((suite, kind, condition)) for condition in conditions]
        if any(cell is not None and outcome in cell.rates for cell in shown):
            texts = [_text(cell, outcome) for cell in shown]
            lines.append(f"| {suite} ({kind}) | {' | '.join(texts)} |")
    return "\n".join(lines)


def _text(cell: Cell | None, outcome: str) -> str:
    """`12.5 % (9-17), n 200`; errors are named where there are any."""
    if cell is None or outcome not in cell.rates:
        return "-"
    of = cell.rates[outcome]
    errors = f", {cell.num_errors} errors" if cell.num_errors else ""
    return f"{100 * of.share:.1f} % ({100 * of.low:.0f}-{100 * of.high:.0f}), n {of.num}{errors}"
