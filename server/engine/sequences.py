"""The mutable state of requests and sequences inside the engine; owned by the engine thread."""

import math
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from server.engine.stats import Asker
from server.engine.text import Detokenizer, StopMatcher
from server.engine.types import (
    ChoiceFinished,
    EngineError,
    EngineRequest,
    Finished,
    FinishReason,
    Prompt,
    RequestTimings,
    SamplingParams,
    TextEvent,
    TokenLogprob,
)

if TYPE_CHECKING:
    from torch import Tensor

    from server.engine.cache import PromptCache
    from server.engine.prefix import Block
    from steering.methods import GateReader

T = TypeVar("T")


class MissingShiftError(EngineError):
    """A request that is to be steered does not bring what its shift comes from."""


class Sequence:
    """One choice of a request: its generated tokens, its text, its random numbers."""

    def __init__(self, active: "ActiveRequest", index: int, tokenizer: Any) -> None:
        self.active = active
        self.index = index
        self.token_ids: list[int] = []
        self.last_token_at: float | None = None  # monotonic
        self.finish_reason: FinishReason | None = None
        params = active.request.params
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopMatcher(params.stop)
        # Every choice draws its own numbers, so a seed gives the same answer in any batch.
        seed = None if params.seed is None else f"{params.seed}/{index}"
        self._random = random.Random(seed)

    @property
    def params(self) -> SamplingParams:
        return self.active.request.params

    @property
    def kv_len(self) -> int:
        """Tokens whose KV is stored: the prompt and all but the newest generated token."""
        return self.active.prompt_len + len(self.token_ids) - 1

    @property
    def rope_position(self) -> int:
        """Rotary position of the newest generated token, the next pass's input."""
        return self.active.request.inputs.prompt.next_position + len(self.token_ids) - 1

    def uniform(self) -> float:
        """The next random number of this sequence, in [0, 1)."""
        return self._random.random()

    def append(self, token_id: int, logprob: TokenLogprob | None, eos: frozenset[int]) -> None:
        """Take a sampled token: decode it, look for an end, and emit what is new."""
        self.token_ids.append(token_id)
        is_eos = token_id in eos and not self.params.ignore_eos
        text, met_stop = "", False
        if not is_eos:
            text, met_stop = self._stops.step(self._detokenizer.step(token_id))
        if is_eos or met_stop:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.active.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and not met_stop:
            tail, met_stop = self._stops.step(self._detokenizer.flush())
            text += tail if met_stop else tail + self._stops.flush()
            self.finish_reason = "stop" if met_stop else self.finish_reason
        emit = self.active.request.emit
        if text or logprob is not None:
            emit(TextEvent(self.index, text, () if logprob is None else (logprob,)))
        if self.finish_reason is not None:
            emit(ChoiceFinished(self.index, self.finish_reason))


@dataclass(eq=False)
class PromptState:
    """One prompt on its way through prefill: the request's own, or one of its pair.

    end: where prefill stops for now; before the prompt's own last token only while a gate is read.
    blocks: what the prefix cache knows it by. num_done: tokens whose KV is in `cache`; num_cached
    of them came from the prefix cache. embeds (T, D): of the tokens from `embeds_start` on, once
    the first chunk is due.
    """

    prompt: Prompt
    role: Literal["own", "corrupted", "text-only"]
    blocks: "list[Block]" = field(default_factory=list)
    num_done: int = 0
    num_cached: int = 0
    cache: "PromptCache | None" = None
    embeds: "Tensor | None" = None
    embeds_start: int = 0

    def __post_init__(self) -> None:
        self.end = len(self.prompt)

    @property
    def asker(self) -> Asker:
        return "own" if self.role == "own" else "shift"

    @property
    def num_left(self) -> int:
        return self.end - self.num_done

    def release(self) -> None:
        """Let go of everything that takes memory."""
        self.cache = self.embeds = None

    def keep_last(self) -> None:
        """Of what was embedded, keep the last token alone."""
        assert self.embeds is not None
        self.embeds, self.embeds_start = self.embeds[-1:].clone(), len(self.prompt) - 1


@dataclass(eq=False)
class ActiveRequest:
    """One accepted request on its way through the engine: waiting, prefilling, running.

    prompts: those that prefill still has to run, the request's own last. What its tokens subtract
    is delta (L, D) or their own part in the subspace of basis (L, k, D): known from the start, or
    measured, with its doses (L,), by the pass that ends its prefill.

    gate: still to be read, None otherwise. A prompt is run unsteered to its end for it: in mode
    dataset the own one, in mode sample the pair, while the own one stops before its last token.
    Then `opening` () scales delta or basis, and the own prompt's last token runs, steered, in the
    next step, over what that place of its cache held. So a gate costs one step, and in mode dataset
    one token that runs twice.

    Raises MissingShiftError for an active plan that does not come with what it needs: none is
    served unsteered in silence.
    """

    request: EngineRequest
    max_tokens: int  # resolved: params.max_tokens, else as many as fit
    accepted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None
    inject_s: float = 0.0
    shift_s: float = 0.0
    projection: "Tensor | None" = None  # () float32, once it was probed
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.own = PromptState(self.request.inputs.prompt, "own")
        self.prompts = [self.own]
        self.reference = self.request.reference
        self.delta: Tensor | None = None
        self.basis: Tensor | None = None
        self.gate: GateReader | None = None
        self.opening: Tensor | None = None
        self.doses: Tensor | None = None
        if self.request.plan.is_active:
            self._take_up_plan()

    def _take_up_plan(self) -> None:
        plan, steering = self.request.plan, self.request.steering
        if plan.mode == "sample":
            pair = self._needed("pair of prompts", self.request.inputs.pair)
            if plan.method == "safety-projected":
                self._needed("directions", steering.directions)
            self.prompts = [
                PromptState(pair.corrupted, "corrupted"),
                PromptState(pair.text_only, "text-only"),
                self.own,
            ]
        elif plan.method == "project":
            self.basis = self._needed("basis", steering.basis)
        else:
            self.delta = self._needed("delta", steering.delta)
        if plan.gate is not None:
            self.gate = self._needed("gate", steering.gate)
            if plan.mode == "sample":
                self.own.end -= 1

    def _needed(self, what: str, part: "T | None") -> "T":
        if part is not None:
            return part
        plan = self.request.plan
        raise MissingShiftError(
            f"request {self.request.request_id}: a plan of mode {plan.mode} with method "
            f"{plan.method} and alpha {plan.alpha:g} came without its {what}"
        )

    @property
    def measures_shift(self) -> bool:
        """Whether prefill has its own shift still to measure."""
        return len(self.prompts) > 1

    @property
    def gate_prompt(self) -> PromptState | None:
        """Whose last token the gate, if it is still to be read, reads."""
        if self.gate is None:
            return None
        return self.prompts[1] if self.measures_shift else self.own

    def go_on_through_gate(self, opening: float) -> None:
        """The gate is read: what the tokens subtract is scaled, for this request alone, and the
        own prompt's last token is due."""
        if self.delta is not None:
            self.delta = opening * self.delta
        if self.basis is not None:  # it is in the product twice
            self.basis = math.sqrt(opening) * self.basis
        self.prompts, self.gate = [self.own], None
        self.own.end = len(self.own.prompt)
        self.own.num_done = self.own.end - 1

    def give_up_shift(self) -> None:
        """Go on unsteered, from what the prefix cache gave: a shift that was no number has spread
        over the prompt, since a masked key that is NaN still makes its scores NaN."""
        self.prompts, self.gate, self.doses = [self.own], None, None
        self.delta = self.basis = None
        self.own.end = len(self.own.prompt)
        self.own.num_done = self.own.num_cached
        if self.own.cache is not None:
            self.own.cache.clear(self.own.num_cached)

    def book_shift(self, seconds: float) -> None:
        self.shift_s += seconds

    @property
    def is_probed(self) -> bool:
        """Whether its prompt's last token, once it has its rows, runs once more, unsteered."""
        return self.request.probe and self.reference is not None and self.projection is None

    def release(self, keeps_last: bool = False) -> None:
        """Let go of everything that takes memory, but for what it takes to run the own prompt's
        last token again."""
        for state in self.prompts:
            if keeps_last and state is self.own:
                state.keep_last()
            else:
                state.release()

    def finished(self) -> Finished:
        """Its last event, now."""
        assert self.started_at is not None and self.first_token_at is not None
        timings = RequestTimings(
            queue_s=self.started_at - self.accepted_at,
            prefill_s=self.first_token_at - self.started_at,
            time_to_first_token_s=self.first_token_at - self.accepted_at,
            e2e_s=time.monotonic() - self.accepted_at,
            inject_s=self.inject_s,
            shift_s=self.shift_s,
        )
        projection = math.nan if self.projection is None else float(self.projection)
        return Finished(
            prompt_tokens=self.prompt_len,
            completion_tokens=sum(len(row.token_ids) for row in self.sequences),
            timings=timings,
            cached_tokens=self.own.num_cached,
            projection=projection if math.isfinite(projection) else None,
        )

    @property
    def prompt_len(self) -> int:
        return len(self.request.inputs.prompt)

    @property
    def max_len(self) -> int:
        """Tokens of KV that one of its rows may come to need."""
        return self.prompt_len + self.max_tokens

    @property
    def num_rows(self) -> int:
        return self.request.params.n

    @property
    def deadline(self) -> float:
        return self.accepted_at + self.request.timeout_s

    @property
    def is_finished(self) -> bool:
        return bool(self.sequences) and all(s.finish_reason for s in self.sequences)
