"""The engine's vocabulary: what a request brings in and which events come out.

Plain dataclasses without FastAPI or pydantic; the wire format is `server/protocol.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from steering.plan import SteeringPlan

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length"]
FailureKind = Literal["cancelled", "timeout", "draining", "engine"]


class EngineError(Exception):
    """Base of what the engine raises on purpose; the message is for the client."""


class PromptTooLongError(EngineError):
    """A request that can never fit; names both lengths (HTTP 400)."""


class QueueFullError(EngineError):
    """The waiting queue is at its bound (HTTP 429 with Retry-After)."""


class NotAcceptingError(EngineError):
    """The engine drains, has failed or has not started (HTTP 503)."""


class InputError(EngineError):
    """A request that this model cannot take (HTTP 400); `param` names the field at fault."""

    def __init__(self, message: str, param: str = "messages") -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Values are validated at the edge; these are the engine's bounds.

    max_tokens None: as many as fit. temperature 0 is greedy. top_k 0 and min_p 0 are off.
    `repetition_penalty` divides (multiplies when negative) the logits of tokens seen in prompt or
    answer; presence and frequency follow OpenAI: answer tokens only. `top_logprobs` None: none
    asked; 0: the chosen token's alone.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    top_logprobs: int | None = None


@dataclass(frozen=True)
class EngineInputs:
    """One prompt, ready for the model; made by `inputs.py` off the engine thread.

    token_ids: the prompt with image placeholders expanded. image_tensors: what the vision tower
    takes besides (empty for text). position_ids (P, T), int64: P = 1, or 3 for M-RoPE;
    next_position: the position of the first generated token.
    """

    token_ids: tuple[int, ...]
    image_tensors: "dict[str, torch.Tensor]"
    position_ids: "torch.Tensor"
    next_position: int


@dataclass(frozen=True)
class EngineRequest:
    """One accepted request. `delta` (L, D) float32 is what every steered token subtracts at each
    layer, alpha and schedule already multiplied in; None when the plan is not active.
    `request_id` is unique. `emit` is called on the engine thread with each event and must neither
    block nor raise.
    """

    request_id: str
    inputs: EngineInputs
    params: SamplingParams
    plan: SteeringPlan
    delta: "torch.Tensor | None"
    emit: "Callable[[EngineEvent], None]"
    timeout_s: float = math.inf


@dataclass(frozen=True)
class TokenLogprob:
    """One token's log-probability under the unfiltered distribution, with the top ones."""

    token_id: int
    text: str
    bytes_: bytes
    logprob: float
    top: "tuple[TokenLogprob, ...]" = ()


@dataclass(frozen=True)
class TextEvent:
    """New text of one choice; `text` may be empty when only log-probabilities are due."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ChoiceFinished:
    """One choice has ended; its text is complete."""

    index: int
    reason: FinishReason


@dataclass(frozen=True)
class RequestTimings:
    """Seconds, from a monotonic clock. `inject_s`: spent subtracting in this request's passes."""

    queue_s: float
    prefill_s: float
    time_to_first_token_s: float
    e2e_s: float
    inject_s: float


@dataclass(frozen=True)
class Finished:
    """Terminal: every choice has ended."""

    prompt_tokens: int
    completion_tokens: int
    timings: RequestTimings


@dataclass(frozen=True)
class Failed:
    """Terminal: the request ended without its answer."""

    kind: FailureKind
    message: str


EngineEvent = TextEvent | ChoiceFinished | Finished | Failed


@dataclass(frozen=True)
class EngineStatus:
    """A snapshot for /health, /ready and gauges."""

    state: Literal["starting", "ready", "draining", "failed", "stopped"]
    detail: str
    num_waiting: int
    num_running: int
    kv_tokens_reserved: int
    kv_tokens_budget: int
