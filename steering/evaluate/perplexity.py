"""How likely the served model, unsteered, finds a run's answers: RUN_DIR/perplexity.jsonl.

Covers what is kept and its file. How it is measured is in perplexity_passes.py, what is said of it
in report/likelihood.py. Needs no model, so that a report is written without one.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from steering.errors import EvaluationError
from steering.evaluate.adapters.rows import read_jsonl
from steering.evaluate.judge import answer_digest
from steering.evaluate.record import Answer, Key

FILE = "perplexity.jsonl"


@dataclass(frozen=True)
class Scored:
    """One answer's mean negative log-likelihood, in nats a token.

    nll_asked: after the prompt as its condition showed it, with its picture or caption. nll_text:
    after the prompt's text alone. num_tokens: of the answer's text; its end is not one of them.
    answer_digest: as in Verdict. weights_digest, dtype: of the model that was asked.
    """

    condition: str
    suite: str
    id: str
    answer_digest: str
    num_tokens: int
    nll_asked: float
    nll_text: float
    weights_digest: str
    dtype: str

    @property
    def key(self) -> Key:
        return (self.condition, self.suite, self.id)

    @property
    def nll(self) -> float:
        """The lower of the two. A refusal is odd as an answer about a picture, and plain as one to
        text; what the picture shows is odd as an answer to text; babble is odd as both."""
        return min(self.nll_asked, self.nll_text)


def is_empty(answer: Answer) -> bool:
    """Whether there is nothing to score."""
    return not answer.answer.strip()


def save(run_dir: Path, scored: Iterable[Scored]) -> None:
    """Whole or not at all; what was measured before goes."""
    part = run_dir / (FILE + ".part")
    part.write_text("".join(json.dumps(asdict(each)) + "\n" for each in scored), "utf-8")
    part.replace(run_dir / FILE)


def load(run_dir: Path) -> list[Scored] | None:
    """None where none was measured. Raises EvaluationError, naming the line that is no score."""
    path = run_dir / FILE
    if not path.exists():
        return None
    found = []
    for row in read_jsonl(path):
        try:
            found.append(Scored(**row.values))
        except TypeError:
            raise EvaluationError(f"{row.place}: not a perplexity") from None
    return found


def current(scored: Iterable[Scored], answers: Sequence[Answer]) -> dict[Key, Scored]:
    """Those of the answers as they are now; an answer that was asked again has none."""
    digests = {a.key: answer_digest(a) for a in answers if a.error is None}
    return {each.key: each for each in scored if digests.get(each.key) == each.answer_digest}
