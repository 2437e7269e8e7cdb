"""A judged run -> everything that its report says, as plain values: RUN_DIR/report.json.

Puts together; counts little itself (summary.py, frontier.py). Draws nothing (page.py). Holds no
time of its own: the same run gives the same bytes.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from steering.evaluate import perplexity, states
from steering.evaluate.adapters.rows import read_text
from steering.evaluate.items import Item
from steering.evaluate.judge import verdicts_of
from steering.evaluate.record import Answer, RunDir
from steering.evaluate.report import conclusion, frontier, geometry, likelihood, samples
from steering.evaluate.report.command import command
from steering.evaluate.summary import BASE, summarise

FORMAT = 1
_FILES = (
    *("run.json", "items.jsonl", "answers.jsonl", "judged.jsonl", "judges.json"),
    *(states.FILE, perplexity.FILE),
)
_LABELS = Path(__file__).parent.parent / "data" / "refusal.json"


def document(run_dir: Path, base: str = BASE, seed: int = 0) -> dict[str, Any]:
    """seed: of the answers that are shown. Raises EvaluationError: not a run, not judged."""
    folder = RunDir(run_dir)
    summary = summarise(run_dir, base).as_dict()
    run = json.loads(read_text(run_dir / "run.json"))
    conditions = run["settings"].get("conditions", [])
    items, answers, verdicts = folder.items(), folder.answers(), verdicts_of(run_dir)
    measured, scored = states.States.load(run_dir), perplexity.load(run_dir)
    points = [_with_shares(asdict(p)) for p in frontier.points(verdicts, conditions)]
    found: dict[str, Any] = {
        "format": FORMAT,
        "base": base if any(answer.condition == base for answer in answers) else None,
        "run": run,
        "command": command(run),
        "files": {name: _digest(run_dir / name) for name in _FILES if (run_dir / name).exists()},
        "pictures": _pictures(items),
        "conditions": _conditions(conditions, answers),
        "summary": summary,
        "labels": _labels(summary["judges"]),
        "points": points,
        "pooled": [asdict(each) for each in frontier.against(verdicts, base)],
        "measures": {key: measure.words for key, measure in frontier.MEASURES.items()},
        "families": [asdict(each) for each in frontier.families(conditions, base)],
        "perplexity": None
        if scored is None
        else likelihood.described(scored, answers, verdicts, base),
        "states": None if measured is None else geometry.described(measured),
        "errors": _errors(answers),
        "samples": {
            "seed": seed,
            "num_drawn": samples.NUM_DRAWN,
            "max_changed": samples.MAX_CHANGED,
            "groups": [asdict(g) for g in samples.groups(items, answers, verdicts, base, seed)],
        },
    }
    found["conclusion"] = conclusion.sentences(found)
    found["limits"] = conclusion.limits(found)
    found["missing"] = conclusion.missing(found)
    return found


def _with_shares(point: dict[str, Any]) -> dict[str, Any]:
    for rate in point["rates"].values():
        rate["share"] = rate["hits"] / rate["num"]
    return point


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pictures(items: Sequence[Item]) -> dict[str, Any]:
    """How many different ones were shown, and a sha256 over their digests, sorted."""
    digests = sorted({item.picture_digest for item in items if item.picture_digest})
    joined = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return {"num": len(digests), "digest": joined if digests else None}


def _conditions(
    conditions: Sequence[Mapping[str, Any]], answers: Sequence[Answer]
) -> list[dict[str, Any]]:
    """What was asked for, and what the server says that it did: medians over the answers that it
    steered; num_cut: answers that ended at the token limit."""
    by_name: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.error is None:
            by_name[answer.condition].append(answer)
    asked = {each["name"]: each for each in conditions}
    found = []
    for name in dict.fromkeys([*asked, *by_name]):
        here = by_name[name]
        steered = [a.steering for a in here if a.steering and a.steering.get("reason") is None]
        steered = [each for each in steered if each.get("mode") not in (None, "off")]
        found.append(
            {
                "name": name,
                "picture": asked.get(name, {}).get("picture"),
                "steering": asked.get(name, {}).get("steering"),
                "num": len(here),
                "num_steered": len(steered),
                "num_cut": sum(answer.finish_reason == "length" for answer in here),
                "vectors": sorted({each["vector"] for each in steered if each.get("vector")}),
                "seconds": _median([answer.seconds for answer in here]),
                **{
                    key: _median([each[key] for each in steered if each.get(key) is not None])
                    for key in ("relative_dose", "gate_opening", "overhead_ms")
                },
            }
        )
    return found


def _median(values: Sequence[float]) -> float | None:
    return round(median(values), 6) if values else None


def _errors(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    found = Counter((a.condition, a.suite, a.error) for a in answers if a.error is not None)
    return [
        {"condition": condition, "suite": suite, "error": error, "num": num}
        for (condition, suite, error), num in found.items()
    ]


def _labels(judges: Mapping[str, Any]) -> dict[str, Any]:
    """What the refusal judge is worth against human labels. is_this_judge: whether these figures
    are of the classifier that judged the run."""
    measured = json.loads(read_text(_LABELS))
    same = measured["judge"] == judges["refusal"]
    families = measured["model_left_out"]["by_family"]
    cut_short = measured["model_left_out_answers_cut_short"]
    return {
        "is_this_judge": same,
        "label": measured["label"],
        "model_left_out": families,
        "answers_cut_short": cut_short,
        "notes": measured["notes"],
    }
