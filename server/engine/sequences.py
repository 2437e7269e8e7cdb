"""The mutable state of requests and sequences inside the engine; owned by the engine thread."""

import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from server.engine.text import Detokenizer, StopMatcher
from server.engine.types import (
    ChoiceFinished,
    EngineRequest,
    FinishReason,
    SamplingParams,
    TextEvent,
    TokenLogprob,
)

if TYPE_CHECKING:
    from torch import Tensor

    from server.engine.cache import PromptCache


class Sequence:
    """One choice of a request: its generated tokens, its text, its random numbers."""

    def __init__(self, active: "ActiveRequest", index: int, tokenizer: Any) -> None:
        self.active = active
        self.index = index
        self.token_ids: list[int] = []
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
        return self.active.request.inputs.next_position + len(self.token_ids) - 1

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
class ActiveRequest:
    """One accepted request on its way through the engine: waiting, prefilling, running."""

    request: EngineRequest
    max_tokens: int  # resolved: params.max_tokens, else as many as fit
    accepted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None
    inject_s: float = 0.0
    num_prefilled: int = 0
    embeds: "Tensor | None" = None
    prompt_cache: "PromptCache | None" = None
    sequences: list[Sequence] = field(default_factory=list)

    @property
    def prompt_len(self) -> int:
        return len(self.request.inputs.token_ids)

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
