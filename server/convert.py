"""Wire -> domain, and engine events -> wire: the answer, or the frames of its stream. Pure.

Does not cover validation (protocol.py), images (media.py) nor when anything is sent (routes/).
"""

import json
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from server.engine.types import (
    ChoiceFinished,
    EngineEvent,
    Finished,
    FinishReason,
    SamplingParams,
    SteeringApplied,
    TextEvent,
    TokenLogprob,
)
from server.policy import Override
from server.protocol import (
    ChatCompletionRequest,
    ImagePart,
    Message,
    RefusalPart,
    SteeringOverride,
)
from server.replies import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    PromptTokensDetails,
    TokenLogprobContent,
    TopLogprob,
    Usage,
)
from server.steered import Steered
from steering.plan import Gate, Schedule

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot hold


def engine_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages for Engine.prepare: every content a list of text and image parts, in order."""
    return [_engine_message(message) for message in messages]


def _engine_message(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    parts: list[dict[str, str]] = []
    for part in message.content or []:
        if isinstance(part, ImagePart):
            parts.append({"type": "image"})
        else:
            text = part.refusal if isinstance(part, RefusalPart) else part.text
            parts.append({"type": "text", "text": text})
    if message.role == "assistant" and not parts:
        parts.append({"type": "text", "text": message.refusal or ""})
    return {"role": role, "content": parts}


def sampling_params(wire: ChatCompletionRequest) -> SamplingParams:
    asked = [limit for limit in (wire.max_tokens, wire.max_completion_tokens) if limit is not None]
    default = SamplingParams()
    top_p = _or(wire.top_p, default.top_p)
    return SamplingParams(
        max_tokens=min(asked, default=None),
        temperature=_or(wire.temperature, default.temperature) if top_p > 0 else 0.0,
        top_p=top_p if top_p > 0 else 1.0,  # no mass but the likeliest token's: greedy
        top_k=max(0, _or(wire.top_k, default.top_k)),
        min_p=_or(wire.min_p, default.min_p),
        seed=wire.seed,
        presence_penalty=_or(wire.presence_penalty, default.presence_penalty),
        frequency_penalty=_or(wire.frequency_penalty, default.frequency_penalty),
        repetition_penalty=_or(wire.repetition_penalty, default.repetition_penalty),
        logit_bias={int(token): bias for token, bias in (wire.logit_bias or {}).items()},
        stop=tuple(wire.stop or ()),
        ignore_eos=bool(wire.ignore_eos),
        n=wire.n or 1,
        top_logprobs=(wire.top_logprobs or 0) if wire.logprobs else None,
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def override_of(wire: SteeringOverride | None) -> Override | None:
    if wire is None:
        return None
    schedule = None if wire.schedule is None else Schedule.parse(wire.schedule)
    gate: Gate | Literal["none"] | None = None
    if wire.gate is not None:
        gate = Gate.parse(wire.gate) or "none"
    return Override(
        mode=wire.mode,
        alpha=wire.alpha,
        schedule=schedule,
        corruption=wire.corruption,
        method=wire.method,
        gate=gate,
    )


@dataclass(frozen=True)
class AnswerHead:
    """What every chunk and every answer of one request says about itself."""

    id: str
    created: int
    model: str
    num_choices: int
    with_logprobs: bool


def usage_of(finished: Finished) -> Usage:
    return Usage(
        prompt_tokens=finished.prompt_tokens,
        completion_tokens=finished.completion_tokens,
        total_tokens=finished.prompt_tokens + finished.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=finished.cached_tokens),
    )


@dataclass
class _ChoiceSoFar:
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason = "stop"


class WholeAnswer:
    """Collects one request's events into a chat.completion; `steered` follows them."""

    def __init__(self, head: AnswerHead, steered: Steered) -> None:
        self.steered = steered
        self._head = head
        self._choices = [_ChoiceSoFar() for _ in range(head.num_choices)]
        self._finished: Finished | None = None

    def add(self, event: EngineEvent) -> None:
        match event:
            case SteeringApplied():
                self.steered = self.steered.after(event)
            case TextEvent():
                self._choices[event.index].text.append(event.text)
                self._choices[event.index].logprobs.extend(event.logprobs)
            case ChoiceFinished():
                self._choices[event.index].reason = event.reason
            case Finished():
                self._finished = event

    def body(self) -> bytes:
        """The JSON body; call it after the Finished event."""
        assert self._finished is not None, "the body is made after Finished"
        answer = ChatCompletion(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            choices=[
                Choice(
                    index=index,
                    message=AnswerMessage(content="".join(choice.text)),
                    logprobs=_logprobs(choice.logprobs) if self._head.with_logprobs else None,
                    finish_reason=choice.reason,
                )
                for index, choice in enumerate(self._choices)
            ],
            usage=usage_of(self._finished),
            steering=self.steered.report(self._finished.timings),
        )
        return answer.model_dump_json().encode()


class StreamedAnswer:
    """Turns one request's events into server-sent events; `steered` follows them.

    The chunk with a choice's finish_reason waits for the next event, so that without a usage
    chunk the last one can carry the steering report.
    """

    def __init__(self, head: AnswerHead, steered: Steered, include_usage: bool) -> None:
        self.steered = steered
        self._head = head
        self._include_usage = include_usage
        self._held: ChatCompletionChunk | None = None

    def opening(self) -> bytes:
        """The role of every choice, before any text."""
        role = Delta(role="assistant", content="")
        return b"".join(
            _frame(self._chunk(_choice(index, role))) for index in range(self._head.num_choices)
        )

    def frames(self, event: EngineEvent) -> bytes:
        """What `event` adds to the stream; nothing for a SteeringApplied or a Failed."""
        match event:
            case SteeringApplied():
                self.steered = self.steered.after(event)
            case TextEvent():
                return self._release() + _frame(self._chunk(self._text_choice(event)))
            case ChoiceFinished():
                choice = _choice(event.index, Delta(), event.reason)
                released, self._held = self._release(), self._chunk(choice)
                return released
            case Finished():
                return self._closing(event) + DONE
        return b""

    def _text_choice(self, event: TextEvent) -> ChunkChoice:
        choice = _choice(event.index, Delta(content=event.text))
        if self._head.with_logprobs:
            choice.logprobs = _logprobs(event.logprobs)
        return choice

    def _closing(self, finished: Finished) -> bytes:
        report = self.steered.report(finished.timings)
        if self._include_usage:
            last = self._chunk(None)
            last.usage, last.steering = usage_of(finished), report
            return self._release() + _frame(last)
        if self._held is not None:
            self._held.steering = report
        return self._release()

    def _release(self) -> bytes:
        held, self._held = self._held, None
        return b"" if held is None else _frame(held)

    def _chunk(self, choice: ChunkChoice | None) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self._head.id,
            object="chat.completion.chunk",
            created=self._head.created,
            model=self._head.model,
            choices=[] if choice is None else [choice],
            steering_revision=self.steered.plan.revision,
        )
        if self._include_usage:
            chunk.usage = None  # set, so that it is written
        return chunk


def _choice(index: int, delta: Delta, reason: FinishReason | None = None) -> ChunkChoice:
    return ChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=reason)


def _frame(chunk: ChatCompletionChunk) -> bytes:
    # ASCII only: some clients split lines at U+2028, which JSON may hold unescaped.
    return _event(chunk.model_dump(exclude_unset=True))


def error_frame(body: dict[str, Any]) -> bytes:
    """A failure after the stream began: its HTTP status is already sent."""
    return _event(body)


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n".encode("ascii")


def _logprobs(tokens: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> ChoiceLogprobs:
    return ChoiceLogprobs(
        content=[
            TokenLogprobContent(
                **_top(token).model_dump(), top_logprobs=[_top(other) for other in token.top]
            )
            for token in tokens
        ]
    )


def _top(token: TokenLogprob) -> TopLogprob:
    return TopLogprob(
        token=token.text,
        logprob=max(token.logprob, LOWEST_LOGPROB),
        bytes=list(token.bytes_),
    )
