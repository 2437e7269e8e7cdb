"""A run's answers -> verdicts: RUN_DIR/judged.jsonl, and who judged in RUN_DIR/judges.json.

Judging is repeatable: it writes both files anew each time, and asks language models only what
they have not said yet (RUN_DIR/said.jsonl). Counts nothing (summary.py).
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from steering.errors import EvaluationError
from steering.evaluate.adapters.rows import read_jsonl
from steering.evaluate.items import Item
from steering.evaluate.judges import harm, utility
from steering.evaluate.judges.degenerate import is_degenerate
from steering.evaluate.judges.endpoint import Endpoint, Memory, ask_all
from steering.evaluate.judges.refusal import RefusalJudge, is_refused
from steering.evaluate.judges.verdict import Verdict
from steering.evaluate.record import Answer, Key, RunDir

HARM_KINDS = ("harmful",)
USEFUL_KINDS = ("harmless", "over-refusal", "visual")  # where no right answer is known
Progress = Callable[[], None]
Asked = tuple[Item, Answer]
Said = dict[Key, bool | None]  # of the answers that a model was asked about; None: no verdict


@dataclass(frozen=True)
class Judges:
    """harm, useful: language models; None: nobody is asked, and nothing is said about it."""

    refusal: RefusalJudge = field(default_factory=RefusalJudge)
    harm: Endpoint | None = None
    useful: Endpoint | None = None

    def describe(self) -> dict[str, Any]:
        return {
            "refusal": self.refusal.describe(),
            "degenerate": {"name": "rules, steering/evaluate/judges/degenerate.py"},
            "harm": _described(self.harm, harm.PROMPT_DIGEST),
            "useful": _described(self.useful, utility.PROMPT_DIGEST),
        }


@dataclass(frozen=True)
class Judged:
    """num_errors: answers that never came, which nobody can judge. num_unjudged: of those that a
    language model was asked about, the ones where it gave no verdict."""

    num: int
    num_errors: int
    num_unjudged: int


def judge_run(
    run_dir: Path, judges: Judges | None = None, progress: Progress = lambda: None
) -> Judged:
    """Judge every answer of a run. progress: called for every question to a language model.

    Not to be called from an event loop. Raises EvaluationError: no run, an answer whose item is
    missing, a language model that does not answer.
    """
    judges = judges or Judges()
    run = RunDir(run_dir)
    items = {(item.suite, item.id): item for item in run.items()}
    answers = run.answers()
    asked = [(_item(items, answer, run_dir), answer) for answer in answers if answer.error is None]
    memory = Memory(run_dir / "said.jsonl")
    unsafe, useful = asyncio.run(_ask_models(judges, asked, memory, progress))
    verdicts = [verdict_of(judges, item, answer, unsafe, useful) for item, answer in asked]
    _write(run_dir / "judged.jsonl", "".join(json.dumps(asdict(v)) + "\n" for v in verdicts))
    _write(run_dir / "judges.json", json.dumps(judges.describe(), indent=1))
    unjudged = [*unsafe.values(), *useful.values()].count(None)
    return Judged(len(verdicts), len(answers) - len(asked), unjudged)


def verdicts_of(run_dir: Path) -> list[Verdict]:
    """As `judge_run` wrote them. Raises EvaluationError, naming the line; where there are none."""
    path = run_dir / "judged.jsonl"
    if not path.exists():
        raise EvaluationError(f"{run_dir} is not judged yet")
    found = []
    for row in read_jsonl(path):
        try:
            found.append(Verdict.from_dict(row.values))
        except (KeyError, TypeError):
            raise EvaluationError(f"{row.place}: not a verdict") from None
    return found


def answer_digest(answer: Answer) -> str:
    """Of what was judged; half a character, which older runs may hold, has a digest too."""
    content = f"{answer.digest}\0{answer.answer}".encode(errors="surrogatepass")
    return hashlib.sha256(content).hexdigest()


async def _ask_models(
    judges: Judges, asked: list[Asked], memory: Memory, progress: Progress
) -> tuple[Said, Said]:
    """Unsafe or not, useful or not."""
    harmful = [pair for pair in asked if pair[1].kind in HARM_KINDS]
    open_ended = [pair for pair in asked if pair[1].kind in USEFUL_KINDS and not pair[0].answers]
    return (
        await _said(judges.harm, harm.question, harm.is_unsafe, harmful, memory, progress),
        await _said(
            judges.useful, utility.question, utility.is_useful, open_ended, memory, progress
        ),
    )


async def _said(
    endpoint: Endpoint | None,
    question: Callable[[Item, str], str],
    verdict: Callable[[str], bool | None],
    asked: list[Asked],
    memory: Memory,
    progress: Progress,
) -> Said:
    if endpoint is None:
        return {}
    questions = [question(item, answer.answer) for item, answer in asked]
    said = await ask_all(
        endpoint, questions, lambda text: verdict(text) is not None, memory, progress
    )
    return {answer.key: verdict(text) for (_, answer), text in zip(asked, said, strict=True)}


def verdict_of(
    judges: Judges,
    item: Item,
    answer: Answer,
    unsafe: Mapping[Key, bool | None] = MappingProxyType({}),
    useful: Mapping[Key, bool | None] = MappingProxyType({}),
) -> Verdict:
    """What the judges say of one answer. unsafe, useful: what language models have said.

    A degenerate answer is no good one: never a refusal, never right, and never safe.
    """
    refused_by = judges.refusal.judge(item.prompt, answer.answer)
    degenerate = is_degenerate(answer.answer)
    right = utility.exactly_right(item, answer.answer)
    right = useful.get(answer.key) if right is None else right
    harms = unsafe.get(answer.key)
    return Verdict(
        condition=answer.condition,
        suite=answer.suite,
        kind=answer.kind,
        id=answer.id,
        answer_digest=answer_digest(answer),
        refused=is_refused(refused_by) and not degenerate,
        refused_by=refused_by,
        degenerate=degenerate,
        right=False if degenerate and right else right,
        unsafe=None if degenerate and not harms else harms,
    )


def _item(items: dict[tuple[str, str], Item], answer: Answer, run_dir: Path) -> Item:
    item = items.get((answer.suite, answer.id))
    if item is None:
        raise EvaluationError(f"{run_dir}: no item {answer.suite}/{answer.id}, which has an answer")
    return item


def _described(endpoint: Endpoint | None, prompt_digest: str) -> dict[str, Any] | None:
    if endpoint is None:
        return None
    return {"url": endpoint.url, "model": endpoint.model, "prompt_digest": prompt_digest}


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    part.replace(path)
