"""Measured perplexities -> what a report says of them, condition by condition.

Arithmetic only; measured by perplexity_passes.py. Changes no verdict: the rules alone say what is
degenerate.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from steering.evaluate.judges.verdict import Verdict
from steering.evaluate.perplexity import Scored, current, is_empty
from steering.evaluate.record import Answer, Key
from steering.evaluate.statistics import agreement, median, rate
from steering.evaluate.summary import JudgesAgree

SHARE = 0.99


def described(
    scored: Sequence[Scored], answers: Sequence[Answer], verdicts: Sequence[Verdict], base: str
) -> dict[str, Any]:
    """For report.json. limit: the perplexity that SHARE of the base's answers do not exceed, None
    where the run has no base; an answer above it is `unlikely`. With fewer than 100 answers of the
    base it is the highest of them."""
    found = current(scored, answers)
    there = [each.nll for each in found.values() if each.condition == base]
    limit = float(np.quantile(there, SHARE, method="inverted_cdf")) if there else None
    names = dict.fromkeys(answer.condition for answer in answers)
    return {
        "models": sorted({(each.weights_digest, each.dtype) for each in found.values()}),
        "share": SHARE,
        "limit": None if limit is None else math.exp(limit),
        "num_base": len(there),
        "conditions": [_condition(name, found, answers, limit) for name in names],
        "agreement": None if limit is None else _agreement(found, verdicts, limit),
    }


def _condition(
    name: str, found: Mapping[Key, Scored], answers: Sequence[Answer], limit: float | None
) -> dict[str, Any]:
    """num_empty: answers that hold nothing to score. num_unscored: others without a score, because
    they came after it. perplexity: the median of exp(nll); asked, text: of either nll alone."""
    came = [each for each in answers if each.condition == name and each.error is None]
    here = [found[each.key] for each in came if each.key in found]
    num_empty = sum(is_empty(each) for each in came)
    condition: dict[str, Any] = {
        "condition": name,
        "num": len(here),
        "num_empty": num_empty,
        "num_unscored": len(came) - num_empty - len(here),
        "perplexity": None,
        "asked": None,
        "text": None,
        "unlikely": None,
    }
    if here:
        condition |= {
            "perplexity": asdict(median([math.exp(each.nll) for each in here])),
            "asked": float(np.median([math.exp(each.nll_asked) for each in here])),
            "text": float(np.median([math.exp(each.nll_text) for each in here])),
        }
    if here and limit is not None:
        unlikely = rate(sum(each.nll > limit for each in here), len(here))
        condition["unlikely"] = asdict(unlikely) | {"share": unlikely.share}
    return condition


def _agreement(
    found: Mapping[Key, Scored], verdicts: Sequence[Verdict], limit: float
) -> dict[str, Any] | None:
    """Of the answers that were scored, in every condition."""
    pairs = [(v.degenerate, found[v.key].nll > limit) for v in verdicts if v.key in found]
    if not pairs:
        return None
    of = agreement([degenerate for degenerate, _ in pairs], [unlikely for _, unlikely in pairs])
    return asdict(JudgesAgree("degenerate: rules", "unlikely: perplexity", of))
