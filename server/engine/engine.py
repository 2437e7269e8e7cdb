"""The embedded engine: one thread that owns the model, the KV cache and the sequences.

The event loop's threads talk to it through `submit` and `cancel`, which only leave messages; it
talks back through each request's `emit`. What a step does is stepper.py's.
"""

import logging
import queue
import threading
import time
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image

from server.engine.cache import RowCache
from server.engine.canary import run_canary
from server.engine.decoders import DecoderChoice, build_decoder
from server.engine.families import family_of
from server.engine.inputs import InputBuilder
from server.engine.messages import Cancel, Drain, Message, Submit
from server.engine.pacing import Pacer
from server.engine.prefix import PrefixCache
from server.engine.runner import Runner, SteeringFaultError
from server.engine.scheduler import Scheduler
from server.engine.selfcheck import SelfCheck
from server.engine.sequences import ActiveRequest
from server.engine.stats import Counters, EngineStats
from server.engine.stepper import Stepper
from server.engine.text import eos_token_ids
from server.engine.threads import take_all_cores
from server.engine.types import (
    EngineError,
    EngineInputs,
    EngineRequest,
    EngineStatus,
    Failed,
    FailureKind,
    InputError,
    NotAcceptingError,
    PromptTooLongError,
    QueueFullError,
    worded,
)
from server.engine.vision import VisionCache
from steering.corruption import Corruption
from steering.layers import text_config
from steering.models import LoadedModel, ModelIdentity

logger = logging.getLogger(__name__)

STEP_GRACE_S = 30.0  # a step under way cannot be interrupted; draining waits this long for it


@dataclass(frozen=True)
class EngineConfig:
    """Sizes. kv_tokens None: max_rows * max_model_len, so that memory never makes anyone wait.

    max_queue: requests accepted beyond the rows there are. prefill_chunk: prompt tokens in one
    step at most. A cache of 0 bytes is off.
    """

    max_model_len: int = 2048
    max_rows: int = 16
    kv_tokens: int | None = None
    max_queue: int = 256
    prefill_chunk: int = 1024
    prefix_cache_bytes: int = 0
    vision_cache_bytes: int = 0
    decoder: DecoderChoice = "auto"

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_rows", "max_queue", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise EngineError(f"{name} is {getattr(self, name)}; it must be at least 1")
        longest = self.footprint(self.max_model_len)
        if self.kv_budget < longest:
            raise EngineError(
                f"kv_tokens is {self.kv_budget}; one request of max_model_len "
                f"{self.max_model_len} takes {longest}"
            )

    def footprint(self, length: int) -> int:
        """KV tokens that a row of up to `length` tokens takes."""
        return RowCache.footprint(length, self.max_model_len)

    @property
    def kv_budget(self) -> int:
        if self.kv_tokens is not None:
            return self.kv_tokens
        return self.max_rows * self.footprint(self.max_model_len)


State = Literal["starting", "ready", "draining", "failed", "stopped"]


class EmbeddedEngine:
    """Implements `server.engine.api.Engine` on a Hugging Face model, which it takes over."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig) -> None:
        self._model: Any = loaded.model
        self._identity = loaded.identity
        self._tokenizer = loaded.processor.tokenizer
        self._config = config
        self._family = family_of(self._model)
        self._eos = eos_token_ids(self._model, self._tokenizer)
        self._inputs = InputBuilder(self._family, self._model, loaded.processor)
        self._processor = loaded.processor
        self._scheduler = Scheduler(
            config.max_rows,
            config.kv_budget,
            config.footprint,
            on_admit=self._admit,
            keep_pictures_whole=self._family.has_bidirectional_images,
        )
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._places = threading.BoundedSemaphore(config.max_rows + config.max_queue)
        self._accepting = threading.Lock()  # no submit may slip in behind the drain message
        self._stop_at: float | None = None  # set once draining: give up on what runs then
        self._state: State = "starting"
        self._detail = "not started"
        self._counters = Counters()
        self._prefix = PrefixCache(config.prefix_cache_bytes)
        self._vision = VisionCache(config.vision_cache_bytes)
        self._stepper: Stepper | None = None  # once the model has passed its checks
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    @property
    def max_model_len(self) -> int:
        return self._config.max_model_len

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    def prepare(
        self,
        messages: Seq[dict[str, Any]],
        images: Seq[Image.Image],
        corruption: Corruption | None = None,
    ) -> EngineInputs:
        return self._inputs.build(messages, images, corruption)

    def submit(self, request: EngineRequest) -> None:
        active = ActiveRequest(request, self._max_tokens(request))
        with self._accepting:
            if self._state != "ready":
                raise NotAcceptingError(f"the engine is {self._state}: {self._detail}")
            if not self._places.acquire(blocking=False):
                num = self._config.max_rows + self._config.max_queue
                raise QueueFullError(f"{num} requests are running or waiting already")
            self._inbox.put(Submit(active))

    def cancel(self, request_id: str) -> None:
        self._inbox.put(Cancel(request_id))

    def status(self) -> EngineStatus:
        return EngineStatus(
            state=self._state,
            detail=self._detail,
            num_waiting=len(self._scheduler.waiting) + self._inbox.qsize(),
            num_running=self._scheduler.num_rows,
            kv_tokens_reserved=self._scheduler.reserved,
            kv_tokens_budget=self._config.kv_budget,
        )

    def stats(self) -> EngineStats:
        return self._counters.snapshot(self._prefix.use(), self._vision.use())

    def start(self) -> None:
        self._thread.start()
        self._started.wait()
        if self._state != "ready":
            raise EngineError(self._detail)

    def drain(self, timeout_s: float) -> None:
        with self._accepting:
            if self._state == "ready":
                self._state, self._detail = "draining", "shutting down"
            stop_at = time.monotonic() + timeout_s
            self._stop_at = stop_at if self._stop_at is None else min(stop_at, self._stop_at)
        self._inbox.put(Drain())
        if self._thread.is_alive():
            self._thread.join(timeout_s + STEP_GRACE_S)

    def _max_tokens(self, request: EngineRequest) -> int:
        """How many tokens the answer may have. Raises what `submit` raises for bad requests."""
        params, prompt = request.params, len(request.inputs.prompt)
        vocabulary = text_config(self._model).vocab_size
        if unknown := [token for token in params.logit_bias if not 0 <= token < vocabulary]:
            raise InputError(
                f"logit_bias names token {unknown[0]}; there are {vocabulary}", param="logit_bias"
            )
        if params.n > self._config.max_rows:
            raise InputError(f"n is {params.n}; at most {self._config.max_rows} rows run", "n")
        longest = self._config.max_model_len
        limit = RowCache.longest(params.n, self._config.kv_budget, longest)
        wanted = params.max_tokens if params.max_tokens is not None else max(1, limit - prompt)
        if prompt + wanted > limit:
            reason = "max_model_len" if limit == longest else f"kv_tokens, for n = {params.n}"
            raise PromptTooLongError(
                f"the prompt has {prompt} tokens and up to {wanted} are asked for: "
                f"{prompt + wanted} together, but the limit is {limit} ({reason})"
            )
        return wanted

    # Everything below runs on the engine thread.

    def _main(self) -> None:
        """The thread: checks, then steps until drained or failed."""
        take_all_cores()
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode())
                stepper = self._stepper = self._checked_stepper(stack)
                with self._accepting:
                    if self._stop_at is None:
                        self._state, self._detail = "ready", "ready"
                self._started.set()
                while self._receive(stepper):
                    stepper.step()
                with self._accepting:
                    self._state, self._detail = "stopped", "drained"
        except Exception as error:  # boundary: nothing may leave the thread unseen
            logger.exception("the engine has failed")
            if isinstance(error, SteeringFaultError):
                self._counters.failures["hooks"] += 1
            with self._accepting:
                self._state, self._detail = "failed", worded(error)
        finally:
            self._started.set()
            self._fail_all()

    def _checked_stepper(self, stack: ExitStack) -> Stepper:
        """Take the model over and check it: against the bare model first, then by the canary."""
        check = SelfCheck(self._family, self._model, self._processor, self._inputs)
        decoder = build_decoder(self._config.decoder, self._model, stack)
        check.compare(decoder)
        self._counters.is_canary_passed = False
        run_canary(self._family, self._model, decoder)
        self._counters.is_canary_passed = True
        runner = Runner(
            self._family,
            self._model,
            decoder,
            self._counters,
            self._config.max_model_len,
            self._config.max_rows,
            self._config.kv_budget,
            self._prefix,
            self._vision,
        )
        pacer = Pacer(self._config.prefill_chunk)
        return Stepper(
            runner,
            self._scheduler,
            pacer,
            self._counters,
            self._tokenizer,
            self._eos,
            self._places.release,
        )

    def _admit(self, active: ActiveRequest) -> None:
        assert self._stepper is not None, "nothing is scheduled before there is a stepper"
        self._stepper.admit(active)

    def _fail_all(self) -> None:
        """The last act: whatever was accepted and has not ended ends here."""
        kind: FailureKind = "engine" if self._state == "failed" else "draining"
        message = f"the server stopped: {self._detail}"
        while not self._inbox.empty():
            left = self._inbox.get()
            if isinstance(left, Submit):
                left.active.request.emit(Failed(kind, message))
        if self._stepper is not None:
            self._stepper.fail_all(kind, message)

    def _receive(self, stepper: Stepper) -> bool:
        """Take in all messages, waiting for one when idle; False when the thread shall end."""
        while True:
            wait = stepper.is_idle and self._stop_at is None
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                break
            if isinstance(message, Submit):
                stepper.accept(message.active)
            elif isinstance(message, Cancel):
                stepper.cancel(message.request_id)
        stepper.expire()
        is_late = self._stop_at is not None and time.monotonic() > self._stop_at
        return not (self._stop_at is not None and (stepper.is_idle or is_late))
