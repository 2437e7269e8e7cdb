"""What a search asks of a server: conditions on items, each question once, judged by rules.

Answers are kept in a run's folder as `deshift eval` keeps them (record.py), so that a search that
was interrupted goes on, and anybody can judge or read them again. Decides nothing about what is
asked (calibration.py, sweep.py).
"""

import re
from collections.abc import Callable, Sequence

from steering.errors import EvaluationError
from steering.evaluate.client import LASTING
from steering.evaluate.conditions import Condition
from steering.evaluate.items import Item
from steering.evaluate.judge import Judges, verdict_of
from steering.evaluate.judges.verdict import Verdict
from steering.evaluate.record import Answer, Key
from steering.evaluate.run import CONCURRENCY, Asker

MAX_ERRORS = 0.1  # of a condition's answers; more make its rates worthless
# How an answer's error begins (client.py) where the server does not do what is asked, and where
# it is this item's or this moment's matter.
_WILL_NOT = re.compile(r"400\b(?! context_length_exceeded)")
_PASSING = re.compile(rf"4(?:00|08|29)\b|5(?!03 (?:{'|'.join(LASTING)}))\d\d\b")
_HINTS = {
    "vectors_unavailable": "; make some with `deshift extract`, or try arms of mode sample only",
    "steering_override_forbidden": "; the policy has to have client_override any",
}


class Asking:
    """The `evaluate` of calibration.py, by a server. num_asked: questions put by this object."""

    def __init__(
        self,
        asker: Asker,
        known: Sequence[Answer],
        append: Callable[[Answer], None],
        *,
        concurrency: int = CONCURRENCY,
        begun: Callable[[int], None] = lambda _: None,
        done: Callable[[Answer], None] = lambda _: None,
    ) -> None:
        """known: of an earlier time. append: keeps an answer. begun: how many are to come."""
        self.num_asked = 0
        self._asker = asker
        self._append = append
        self._concurrency = concurrency
        self._begun = begun
        self._done = done
        self._judges = Judges()
        self._answers: dict[Key, Answer] = {}
        self._errors: dict[Key, str] = {}
        self._refused: dict[str, str] = {}
        self._done_by_server: set[str] = set()
        for answer in sorted(known, key=lambda answer: answer.error is not None):
            self._keep(answer)

    async def __call__(self, condition: Condition, items: Sequence[Item]) -> list[Verdict] | str:
        """The verdicts of those that were answered; the server's words where it will not.

        Raises EvaluationError: nothing answers, the condition is not done as it is asked for, or
        too many answers are errors.
        """
        left = [item for item in items if self._key(condition, item) not in self._answers]
        if left and condition.name not in self._refused:
            self._begun(len(left))
            if condition.name not in self._done_by_server:
                await self._ask(condition, left[:1])
                self._check_first(condition, left[0])
                left = left[1:]
            if condition.name not in self._refused:
                await self._ask(condition, left)
        if refusal := self._refused.get(condition.name):
            return refusal
        return self._judged(condition, items)

    async def _ask(self, condition: Condition, items: Sequence[Item]) -> None:
        def keep(answer: Answer) -> None:
            self.num_asked += 1
            self._append(answer)
            self._keep(answer)
            self._done(answer)

        pairs = [(item, condition) for item in items]
        await self._asker.answers(pairs, keep, concurrency=self._concurrency)

    def _keep(self, answer: Answer) -> None:
        """Errors are asked again another time, but for what the server will never do: a 400 to a
        condition that it has done before is about the item."""
        error = answer.error
        if error is None:
            self._answers[answer.key] = answer
            self._done_by_server.add(answer.condition)
        elif _WILL_NOT.match(error) and answer.condition not in self._done_by_server:
            self._refused[answer.condition] = error.partition(": ")[2]
        else:
            self._answers.pop(answer.key, None)
            self._errors[answer.key] = error

    def _check_first(self, condition: Condition, item: Item) -> None:
        error = self._errors.get(self._key(condition, item))
        if error and not _PASSING.match(error):
            hint = next((hint for code, hint in _HINTS.items() if code in error), "")
            raise EvaluationError(f"condition {condition.name!r}: {error}{hint}")

    def _judged(self, condition: Condition, items: Sequence[Item]) -> list[Verdict]:
        answered = [
            (item, answer)
            for item in items
            if (answer := self._answers.get(self._key(condition, item))) is not None
        ]
        missing = len(items) - len(answered)
        if missing > MAX_ERRORS * len(items):
            errors = [self._errors.get(self._key(condition, item)) for item in items]
            first = next(error for error in errors if error)
            raise EvaluationError(
                f"condition {condition.name!r}: {missing} of {len(items)} answers are errors, "
                f"first: {first}"
            )
        return [verdict_of(self._judges, item, answer) for item, answer in answered]

    @staticmethod
    def _key(condition: Condition, item: Item) -> Key:
        return (condition.name, item.suite, item.id)
