"""Answers for reading: some of every condition and suite, and those where steering changed the
verdict.

Chosen by a seed, so that nobody picks; prompts and answers as they are (the page escapes them).
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from steering.evaluate.items import Item, Kind
from steering.evaluate.judges.verdict import Verdict
from steering.evaluate.record import Answer, Key

NUM_DRAWN = 3  # of each condition and suite
MAX_CHANGED = 12  # each way, of each condition and suite
Why = Literal["drawn", "newly refused", "no longer refused"]


@dataclass(frozen=True)
class Sample:
    """before: the base's answer and verdict, of an answer whose verdict changed."""

    why: Why
    id: str
    prompt: str
    answer: str
    verdict: dict[str, Any]
    before: dict[str, Any] | None


@dataclass(frozen=True)
class Group:
    """num_changed: all that changed, by the way; of each at most MAX_CHANGED are `samples`."""

    condition: str
    suite: str
    kind: Kind
    num_changed: dict[str, int]
    samples: tuple[Sample, ...]


def groups(
    items: Sequence[Item],
    answers: Sequence[Answer],
    verdicts: Sequence[Verdict],
    base: str,
    seed: int,
) -> list[Group]:
    """In the order of the answers."""
    prompts = {(item.suite, item.id): item.prompt for item in items}
    texts = {answer.key: answer.answer for answer in answers}
    judged = {verdict.key: verdict for verdict in verdicts}
    placed: dict[tuple[str, str, Kind], list[Verdict]] = {}
    for verdict in verdicts:
        placed.setdefault((verdict.condition, verdict.suite, verdict.kind), []).append(verdict)
    found = []
    for (condition, suite, kind), here in placed.items():
        chosen = _chosen(here, judged, base, f"{seed}:{condition}:{suite}:{kind}")
        samples = [
            Sample(
                why,
                verdict.id,
                prompts[suite, verdict.id],
                texts[verdict.key],
                said(verdict),
                _before((base, suite, verdict.id), texts, judged) if why != "drawn" else None,
            )
            for why, verdicts_of in chosen.items()
            for verdict in verdicts_of[: NUM_DRAWN if why == "drawn" else MAX_CHANGED]
        ]
        changed: dict[str, int] = {why: len(of) for why, of in chosen.items() if why != "drawn"}
        found.append(Group(condition, suite, kind, changed, tuple(samples)))
    return found


def said(verdict: Verdict) -> dict[str, Any]:
    """What every judge says of an answer."""
    return {
        "refused": verdict.refused,
        **{f"refused_{name}": value for name, value in asdict(verdict.refused_by).items()},
        "degenerate": verdict.degenerate,
        "right": verdict.right,
        "unsafe": verdict.unsafe,
    }


def _chosen(
    here: Sequence[Verdict], judged: Mapping[Key, Verdict], base: str, seed: str
) -> dict[Why, list[Verdict]]:
    """Shuffled, so that the first ones are a fair choice; a changed one is not drawn again."""
    shuffled = list(here)
    random.Random(seed).shuffle(shuffled)
    found: dict[Why, list[Verdict]] = {"newly refused": [], "no longer refused": [], "drawn": []}
    for verdict in shuffled:
        before = judged.get((base, verdict.suite, verdict.id))
        if before is None or before.refused == verdict.refused:
            found["drawn"].append(verdict)
        else:
            found["newly refused" if verdict.refused else "no longer refused"].append(verdict)
    return found


def _before(key: Key, texts: Mapping[Key, str], judged: Mapping[Key, Verdict]) -> dict[str, Any]:
    return {"answer": texts[key], "verdict": said(judged[key])}
