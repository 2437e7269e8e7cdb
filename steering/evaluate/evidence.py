"""A calibration as data, as a table and as a policy with its evidence.

`calibration.json` (format 1): `bounds`; `base`, the figures without steering by stage; `trials`,
one for each candidate and number of items, in order, each with `figures` (rates with Wilson
intervals), `broken` (the bounds that it breaks) and `is_on_frontier` (of those in the search that
were asked all its items: what saw fewer is not compared with them); `arms`, what became of each;
`chosen`, the condition, or null and `problem`; `num_answers`. Draws no picture.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from steering.evaluate.bounds import Bounds, Counts
from steering.evaluate.calibration import Calibration, Trial
from steering.evaluate.conditions import parse

FORMAT = 1
_COLUMNS = ("unsafe", "harmless_refused", "right", "degenerate")
_RATES = ("unsafe %", "harmless refused %", "right %", "degenerate %")
HEADINGS = ("", "condition", "n", *_RATES, "breaks")  # of a table


def frontier(counts: Mapping[str, Counts], bounds: Bounds) -> set[str]:
    """The names that no other one beats: fewer unsafe answers, or fewer harmless refusals, and no
    more of the other. What babbles or loses too many right answers is no rival and not on it."""
    fit = {
        name: each.order
        for name, each in counts.items()
        if not {"utility", "degenerate"} & set(bounds.broken(each))
    }
    return {
        name
        for name, own in fit.items()
        if not any(
            other != own and other[0] <= own[0] and other[1] <= own[1] for other in fit.values()
        )
    }


def latest(calibration: Calibration) -> list[Trial]:
    """Of each candidate in the search the trial on the most items, by arm and strength."""
    last = {
        trial.condition: trial
        for trial in sorted(calibration.trials, key=lambda trial: trial.num_items)
        if trial.stage == "search"
    }
    return sorted(last.values(), key=lambda trial: (trial.arm, trial.alpha))


def as_dict(
    calibration: Calibration, bounds: Bounds, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """calibration.json. settings: what the answers depend on, as in run.json."""
    searched = [trial for trial in latest(calibration) if trial.counts]
    most = max((trial.num_items for trial in searched), default=0)
    full = {trial.condition: trial for trial in searched if trial.num_items == most}
    on_it = frontier({name: t.counts for name, t in full.items() if t.counts}, bounds)
    compared = {id(full[name]) for name in on_it}
    chosen = calibration.chosen
    return {
        "format": FORMAT,
        "chosen": chosen.condition if chosen else None,
        "problem": calibration.problem,
        "bounds": asdict(bounds),
        "base": {stage: counts.as_dict() for stage, counts in calibration.base.items()},
        "trials": [
            {**_plain(trial), "is_on_frontier": id(trial) in compared}
            for trial in calibration.trials
        ],
        "arms": calibration.ends,
        "num_answers": calibration.num_answers,
        "settings": dict(settings),
    }


def policy_document(
    calibration: Calibration, bounds: Bounds, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """`policy`: the fields of a tenant's policy that were calibrated, for `deshift policy set
    --file` or the admin API. `evidence`: what they rest on. Needs a chosen strength."""
    chosen = calibration.chosen
    assert chosen is not None and chosen.counts is not None
    searched = [trial for trial in latest(calibration) if trial.condition == chosen.condition]
    on_fresh = calibration.base["confirm"].as_dict()
    evidence = {
        "condition": chosen.condition,
        "bounds": asdict(bounds),
        "search": _plain(searched[0]) if searched else None,
        "confirmation": _plain(chosen),
        "confirmation_without_steering": on_fresh,
        "num_confirmed": sum(trial.stage == "confirm" for trial in calibration.trials),
        "intervals_keep_the_bounds_too": bounds.surely_kept(chosen.counts),
        "frontier": [
            {"condition": each["condition"], "num_items": each["num_items"], **each["figures"]}
            for each in as_dict(calibration, bounds, {})["trials"]
            if each["is_on_frontier"]
        ],
        "num_answers": calibration.num_answers,
        "settings": dict(settings),
    }
    return {"policy": policy_fields(chosen), "evidence": evidence}


def policy_fields(chosen: Trial) -> dict[str, Any]:
    """What the condition asks for, and the defaults of what decides with it, said aloud: a tenant
    that has a gate must lose it where the choice has none."""
    steering = parse(chosen.condition).steering or {}
    return {"method": "subtract", "schedule": "all", "gate": "none", **steering}


def table(calibration: Calibration, bounds: Bounds) -> list[list[str]]:
    """Headings, then the base, every candidate of the search and what was confirmed."""
    document = as_dict(calibration, bounds, {})
    rows = [list(HEADINGS)]
    rows += [row("", f"none ({stage})", figures, "") for stage, figures in _bases(document)]
    shown = {id(trial) for trial in latest(calibration)}
    pairs = zip(calibration.trials, document["trials"], strict=True)
    chosen = calibration.chosen
    for trial, values in sorted(pairs, key=lambda pair: (pair[0].stage == "confirm", _at(pair[0]))):
        if trial.stage == "search" and id(trial) not in shown:
            continue
        mark = "chosen" if trial is chosen else "frontier" if values["is_on_frontier"] else ""
        mark = mark or ("confirm" if trial.stage == "confirm" else "")
        rows.append(row(mark, trial.condition, values["figures"], _note(trial)))
    return rows


def _bases(document: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return list(document["base"].items())


def _at(trial: Trial) -> tuple[str, float]:
    return trial.arm, trial.alpha


def row(mark: str, name: str, figures: Mapping[str, Any] | None, note: str) -> list[str]:
    """Of a table; figures: as `Counts.as_dict` has them, None where the server refused."""
    if figures is None:
        return [mark, name, "", *[""] * len(_COLUMNS), note]
    cells = [_share(figures[column]) for column in _COLUMNS]
    return [mark, name, str(_num(figures)), *cells, note]


def _num(figures: Mapping[str, Any]) -> int:
    return int(figures["degenerate"]["num"])


def _share(rate: Mapping[str, Any] | None) -> str:
    if rate is None:
        return "-"
    return f"{100 * rate['share']:.1f} ({100 * rate['low']:.0f}-{100 * rate['high']:.0f})"


def _note(trial: Trial) -> str:
    return "refused" if trial.refusal else ", ".join(trial.broken)


def _plain(trial: Trial) -> dict[str, Any]:
    values = asdict(trial)
    del values["counts"], values["index"]
    figures = trial.counts.as_dict() if trial.counts else None
    return {**values, "broken": list(trial.broken), "keeps": trial.keeps, "figures": figures}
