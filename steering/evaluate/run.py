"""Asking a server every item in every condition, and what counts as an answer of a condition.

Works against any OpenAI-compatible server; judges nothing. The order is evaluation.py's, one chat
client.py's, the file record.py's.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from steering.errors import EvaluationError
from steering.evaluate.client import Patience, Refused, Server, ask
from steering.evaluate.conditions import Condition
from steering.evaluate.evaluation import Asked, Evaluation, Sampling
from steering.evaluate.items import Item
from steering.evaluate.pictures import Shown, asked_text
from steering.evaluate.record import Answer, RunDir

CONCURRENCY = 16
_HIDDEN = (
    "this is a Deshift server behind one that hides it: its policy may steer what is to be "
    "unsteered; ask it directly"
)
Done = Callable[[Answer], None]


@dataclass(frozen=True)
class Tally:
    """num_known: answered before this process began. num_errors: of this process."""

    num_asked: int
    num_known: int
    num_errors: int


@dataclass(frozen=True)
class Asker:
    """Chats with one server."""

    client: httpx.AsyncClient
    server: Server
    sampling: Sampling = Sampling()
    patience: Patience = Patience()
    shown: Shown = field(default_factory=Shown)

    def body(self, item: Item, condition: Condition) -> dict[str, Any]:
        """The request. Raises EvaluationError for a picture that cannot be read."""
        text = asked_text(item, condition.picture)
        content: Any = text
        if url := self.shown.url(item, condition.picture):
            picture = {"type": "image_url", "image_url": {"url": url}}
            content = [picture, {"type": "text", "text": text}]
        steering = {} if condition.steering is None else {"steering": dict(condition.steering)}
        return {
            "model": self.server.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.sampling.max_tokens,
            "temperature": self.sampling.temperature,
            "seed": self.sampling.seed,
            **steering,
        }

    async def answer(self, item: Item, condition: Condition) -> Answer:
        """Ask; the server's refusal of a request, and steering other than asked for, are answers
        with an error. Raises EvaluationError where nothing answers at all."""
        text, finish_reason, steering, seconds, error = "", None, None, 0.0, None
        try:
            reply = await ask(self.client, self.body(item, condition), self.patience)
        except Refused as refused:
            error = str(refused)
        else:
            steering, seconds = reply.steering, round(reply.seconds, 4)
            error = _misapplied(self.server, condition, reply.steering)
            if error is None:
                text, finish_reason = reply.text, reply.finish_reason
        return Answer(
            condition=condition.name,
            suite=item.suite,
            kind=item.kind,
            id=item.id,
            digest=item.digest,
            answer=text,
            finish_reason=finish_reason,
            steering=steering,
            seconds=seconds,
            error=error,
        )

    async def answers(
        self, asked: Sequence[Asked], done: Done, *, concurrency: int = CONCURRENCY
    ) -> None:
        """Ask all, `concurrency` at a time and in order; `done` gets each as it comes.

        Raises EvaluationError where nothing answers at all; what came before has been `done`.
        """
        waiting = iter(asked)

        async def work() -> None:
            for item, condition in waiting:
                done(await self.answer(item, condition))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
        except* EvaluationError as problems:
            first = problems.exceptions[0]
        else:
            return
        raise first

    async def check(self, asked: Sequence[Asked]) -> None:
        """Ask one token in each condition, to learn what the server will not do.

        Raises EvaluationError, which says what to change.
        """
        first: dict[str, Asked] = {}
        for item, condition in asked:
            first.setdefault(condition.name, (item, condition))
        for item, condition in first.values():
            body = self.body(item, condition) | {"max_tokens": 1}
            try:
                reply = await ask(self.client, body, self.patience)
            except Refused as refused:
                if refused.is_lasting:
                    raise _explained(self.server, condition, refused) from None
                continue  # this item's matter, or this moment's: the run counts it
            if problem := _misapplied(self.server, condition, reply.steering):
                raise EvaluationError(f"condition {condition.name!r}: {problem}")


async def run(
    evaluation: Evaluation,
    asker: Asker,
    out: RunDir,
    *,
    start: Mapping[str, Any],
    resume: bool = False,
    concurrency: int = CONCURRENCY,
    begun: Callable[[int, int], None] = lambda _known, _all: None,
    done: Done = lambda _: None,
) -> Tally:
    """Ask what is not answered yet and record it. start: for run.json, of this time. begun: how
    many answers are known, of how many. Errors of an earlier time are asked again.

    Raises EvaluationError: the server will not do it, the folder is another run's, nothing
    answers any more. What was answered until then is kept.
    """
    asked = evaluation.asked()
    await asker.check(asked)
    out.begin(evaluation.settings(asker.server), start, evaluation.items, resume=resume)
    errors = 0
    with out.appending() as append:
        known = {answer.key for answer in out.answers() if answer.error is None}
        left = [each for each in asked if (each[1].name, each[0].suite, each[0].id) not in known]
        begun(len(asked) - len(left), len(asked))

        def keep(answer: Answer) -> None:
            nonlocal errors
            append(answer)
            errors += answer.error is not None
            done(answer)

        await asker.answers(left, keep, concurrency=concurrency)
    return Tally(len(asked), len(asked) - len(left), errors)


def for_server(conditions: Sequence[Condition], server: Server) -> tuple[Condition, ...]:
    """The conditions as this server can be asked for them. Raises EvaluationError."""
    if server.is_deshift:
        return tuple(conditions)
    return tuple(condition.without_steering() for condition in conditions)


def _misapplied(
    server: Server, condition: Condition, applied: Mapping[str, Any] | None
) -> str | None:
    """What the server did instead of what was asked for: a kill switch, a rollout, a server that
    drops fields. Such an answer is none of this condition."""
    wanted = condition.steering
    if not server.is_deshift:  # so that it was asked for nothing, and its policy may have steered
        return None if applied is None else _HIDDEN
    if wanted is None:
        return None
    if applied is None:
        return "the answer does not say how it was steered"
    is_off = wanted["mode"] == "off" or wanted.get("alpha") == 0
    expected = dict(wanted) if not is_off else {"mode": "off"}
    if not is_off and wanted.get("gate", "none") != "none":
        if applied.get("mode") != "off" and applied.get("gate_opening") is None:
            return "the answer does not say that a gate was read"
        expected.pop("alpha", None)  # the most that a prompt may get: what it got is the gate's
    for name, value in expected.items():
        if name in applied and (applied[name] or "none") != value:
            reason = f" ({applied.get('reason')})" if applied.get("reason") else ""
            return f"steering.{name} was {applied[name]!r}{reason}, asked for was {value!r}"
    return None


def _explained(server: Server, condition: Condition, refused: Refused) -> EvaluationError:
    """The server's words, and what to do about the ones that are expected."""
    where = f"condition {condition.name!r}: {refused}"
    match refused.code:
        case "steering_override_forbidden":
            hint = (
                "this key's policy does not let requests choose their steering: start the server "
                "with DESHIFT_CLIENT_OVERRIDE=any, or use the key of a tenant whose policy has "
                "client_override any"
            )
        case "vectors_unavailable":
            steering = (server.ready or {}).get("steering") or {}
            hint = (
                "the model has no shift vectors in force: make some with `deshift extract`, or "
                f"leave dataset conditions out ({steering.get('problem') or 'see /ready'})"
            )
        case _:
            return EvaluationError(where)
    return EvaluationError(f"{where}; {hint}")
