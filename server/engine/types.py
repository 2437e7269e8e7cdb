"""The engine's vocabulary: what a request brings in and which events come out.

Plain dataclasses without FastAPI or pydantic; the wire format is `server/protocol.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from steering.errors import SteeringError
from steering.plan import SteeringPlan

if TYPE_CHECKING:
    import torch

    from steering.methods import RowSteering
    from steering.projection import Reference

FinishReason = Literal["stop", "length"]
FailureKind = Literal["cancelled", "timeout", "draining", "engine"]
OnError = Literal["reject", "serve-unsteered"]


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


class PairError(InputError):
    """The sample level's two prompts cannot be made (HTTP 400)."""


def worded(error: Exception) -> str:
    """For clients: our own words, never another library's internals (the log has those)."""
    is_ours = isinstance(error, EngineError | SteeringError)
    return str(error) if is_ours else "an internal error; see the log"


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
class ImageInput:
    """One picture of a prompt.

    digest: sha256 of mode, size and pixels (`steering.corruption.image_digest`), or, of a blank or
    gray picture made here, of its tensors. tensors: what
    the vision tower takes for this picture alone, with the processor's own leading dimension.
    [start, end): the prompt's tokens from its first placeholder to its last; a family that cuts
    pictures into tiles has other tokens between. num_features: its placeholders.
    """

    digest: str
    tensors: "dict[str, torch.Tensor]"
    start: int
    end: int
    num_features: int


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the model; made by `inputs.py` off the engine thread.

    token_ids: with image placeholders expanded. position_ids (P, T), int64: P = 1, or 3 for
    M-RoPE; next_position: the position of the first generated token. shared_len: how many leading
    tokens hold nothing of any client's (template and corrupted pictures), so that their keys and
    values may serve every tenant.
    """

    token_ids: tuple[int, ...]
    images: tuple[ImageInput, ...]
    position_ids: "torch.Tensor"
    next_position: int
    shared_len: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class ShiftPair:
    """The two prompts whose last hidden states differ by the request's own shift.

    corrupted: the same tokens as the request's prompt, with meaningless pictures of the same
    sizes. text_only: the same conversation with the image parts left out.
    """

    corrupted: Prompt
    text_only: Prompt


@dataclass(frozen=True)
class EngineInputs:
    """What a request asks the model; `pair` where the sample-level shift is to be measured, and
    `pair_s`, the seconds that making it took."""

    prompt: Prompt
    pair: ShiftPair | None = None
    pair_s: float = 0.0


@dataclass(frozen=True)
class EngineRequest:
    """One accepted request.

    `steering` is what `steering.methods.row_steering` makes of the plan: what every steered token
    subtracts, and the gate that scales it; of no account when the plan is not active. In mode
    `sample` the engine measures the shift from `inputs.pair`. `on_error` says what happens when
    that, or reading the gate, fails.
    `namespace` (a tenant) separates what the caches hold. `request_id` is unique. `emit` is called
    on the engine thread with each event and must neither block nor raise. `probe` asks how far
    the prompt lies from text, measured against `reference`, in mode `sample` against its own pair;
    where there is neither, or its answer ends at its first token, it is not told. In mode
    `dataset` with a gate, which reads the same states, it is always.
    """

    request_id: str
    inputs: EngineInputs
    params: SamplingParams
    plan: SteeringPlan
    steering: "RowSteering"
    emit: "Callable[[EngineEvent], None]"
    timeout_s: float = math.inf
    namespace: str = ""
    on_error: OnError = "reject"
    probe: bool = False
    reference: "Reference | None" = None


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
class SteeringApplied:
    """What was measured for a request of the sample level, or with a gate; precedes its first
    TextEvent.

    relative_dose: the largest |delta_l| / |h_l| over the layers, after gate and cap. failure: why
    shift or gate could not be measured; then nothing is subtracted (`on_error` is serve-unsteered).
    opening: the share of alpha, 0..1, that the gate lets through; None without a gate.
    """

    relative_dose: float
    failure: str | None = None
    opening: float | None = None


@dataclass(frozen=True)
class RequestTimings:
    """Seconds, from a monotonic clock.

    `inject_s`: spent subtracting in this request's passes. `shift_s`: spent on the two extra
    prompts of the sample level, and on the last token that a gate reads and that runs again
    steered, by their share of the tokens of each pass.
    """

    queue_s: float
    prefill_s: float
    time_to_first_token_s: float
    e2e_s: float
    inject_s: float
    shift_s: float = 0.0


@dataclass(frozen=True)
class Finished:
    """Terminal: every choice has ended.

    cached_tokens: how many of the prompt's came from the prefix cache. projection: how far the
    prompt with its pictures lies from text, unsteered, where that was probed: 0 like a text-only
    prompt, 1 as far as a picture without content moves it.
    """

    prompt_tokens: int
    completion_tokens: int
    timings: RequestTimings
    cached_tokens: int = 0
    projection: float | None = None


@dataclass(frozen=True)
class Failed:
    """Terminal: the request ended without its answer."""

    kind: FailureKind
    message: str


EngineEvent = SteeringApplied | TextEvent | ChoiceFinished | Finished | Failed


@dataclass(frozen=True)
class EngineStatus:
    """A snapshot for /health, /ready and gauges.

    num_waiting: requests that are not taken up yet. num_running: rows of those that are, whether
    their prompts prefill or their answers decode; a request of n choices has n.
    """

    state: Literal["starting", "ready", "draining", "failed", "stopped"]
    detail: str
    num_waiting: int
    num_running: int
    kv_tokens_reserved: int
    kv_tokens_budget: int
