"""The embedded engine: one thread that owns the model, the KV cache and the sequences.

The event loop's threads talk to it through `submit` and `cancel`, which only leave messages; it
talks back through each request's `emit`. Its heart is `_step`: schedule, run, apply the tokens.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from server.engine.cache import RowCache
from server.engine.canary import run_canary
from server.engine.decoders import DecoderChoice, build_decoder
from server.engine.families import family_of
from server.engine.inputs import InputBuilder
from server.engine.pacing import Pacer
from server.engine.runner import Runner, ShiftFailedError, SteeringFaultError
from server.engine.sampling import logprobs, sample
from server.engine.scheduler import PrefillChunk, Scheduler
from server.engine.selfcheck import SelfCheck
from server.engine.sequences import ActiveRequest, Sequence
from server.engine.types import (
    EngineError,
    EngineInputs,
    EngineRequest,
    EngineStatus,
    Failed,
    FailureKind,
    Finished,
    InputError,
    NotAcceptingError,
    PromptTooLongError,
    QueueFullError,
    RequestTimings,
    SteeringApplied,
)
from steering.corruption import Corruption
from steering.errors import SteeringError
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


@dataclass(frozen=True)
class _Submit:
    active: ActiveRequest


@dataclass(frozen=True)
class _Cancel:
    request_id: str


@dataclass(frozen=True)
class _Drain:
    pass


_Message = _Submit | _Cancel | _Drain
State = Literal["starting", "ready", "draining", "failed", "stopped"]


class EmbeddedEngine:
    """Implements `server.engine.api.Engine` on a Hugging Face model, which it takes over."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig) -> None:
        self._model: Any = loaded.model
        self._identity = loaded.identity
        self._tokenizer = loaded.processor.tokenizer
        self._config = config
        self._family = family_of(self._model)
        self._eos = _eos_token_ids(self._model, self._tokenizer)
        self._inputs = InputBuilder(self._family, self._model, loaded.processor)
        self._processor = loaded.processor
        self._pacer = Pacer(config.prefill_chunk)
        self._scheduler = Scheduler(
            config.max_rows,
            config.kv_budget,
            config.footprint,
            on_admit=self._admit,
            keep_pictures_whole=self._family.has_bidirectional_images,
        )
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._places = threading.BoundedSemaphore(config.max_rows + config.max_queue)
        self._accepted: dict[str, ActiveRequest] = {}  # all that owe a terminal event
        self._accepting = threading.Lock()  # no submit may slip in behind the drain message
        self._stop_at: float | None = None  # set once draining: give up on what runs then
        self._state: State = "starting"
        self._detail = "not started"
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
            self._inbox.put(_Submit(active))

    def cancel(self, request_id: str) -> None:
        self._inbox.put(_Cancel(request_id))

    def status(self) -> EngineStatus:
        return EngineStatus(
            state=self._state,
            detail=self._detail,
            num_waiting=len(self._scheduler.waiting) + self._inbox.qsize(),
            num_running=len(self._scheduler.rows),
            kv_tokens_reserved=self._scheduler.reserved,
            kv_tokens_budget=self._config.kv_budget,
        )

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
        self._inbox.put(_Drain())
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
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode())
                check = SelfCheck(self._family, self._model, self._processor, self._inputs)
                decoder = build_decoder(self._config.decoder, self._model, stack)
                check.compare(decoder)
                run_canary(self._family, self._model, decoder)
                self._runner = Runner(
                    self._family,
                    self._model,
                    decoder,
                    self._config.max_model_len,
                    self._config.max_rows,
                    self._config.kv_budget,
                    self._config.prefix_cache_bytes,
                    self._config.vision_cache_bytes,
                )
                with self._accepting:
                    if self._stop_at is None:
                        self._state, self._detail = "ready", "ready"
                self._started.set()
                while self._receive():
                    self._step()
                with self._accepting:
                    self._state, self._detail = "stopped", "drained"
        except Exception as error:  # boundary: nothing may leave the thread unseen
            logger.exception("the engine has failed")
            with self._accepting:
                self._state, self._detail = "failed", _worded(error)
        finally:
            self._started.set()
            self._fail_all()

    def _step(self) -> None:
        """Schedule a batch, run it, apply the tokens."""
        started = time.monotonic()
        rows = self._runner.arrange(self._scheduler.rows)
        budget = self._pacer.budget(len(rows), self._scheduler.num_waiting)
        chunks = self._embedded(self._scheduler.schedule(budget))
        ended, logits = self._run(chunks, rows)
        self._apply(logits[len(ended) :], rows)
        for active, row_logits in zip(ended, logits, strict=False):
            self._begin_decoding(active, row_logits)
        num_prefilled = sum(chunk.end - chunk.start for chunk in chunks)
        self._pacer.observe(time.monotonic() - started, num_prefilled, len(rows))

    def _admit(self, active: ActiveRequest) -> None:
        active.started_at = time.monotonic()
        try:
            self._runner.admit(active)
        except Exception as error:  # boundary: out of memory, say; the others go on
            logger.exception("admitting request %s failed", active.request.request_id)
            self._fail(active, "engine", _worded(error))

    def _embedded(self, chunks: list[PrefillChunk]) -> list[PrefillChunk]:
        """Those whose prompts are embedded; a request whose prompt cannot be ends here."""
        for chunk in chunks:
            active = chunk.active
            if active not in self._scheduler.prefilling:
                continue  # it failed with its other prompt
            try:
                self._runner.embed(chunk)
            except ShiftFailedError as error:
                logger.exception("request %s", active.request.request_id)
                self._shift_failed(active, _worded(error))
            except Exception as error:  # boundary: this request fails, the others go on
                logger.exception("embedding request %s failed", active.request.request_id)
                self._fail(active, "engine", _worded(error))
        return [chunk for chunk in chunks if chunk.state.embeds is not None]

    def _run(
        self, chunks: list[PrefillChunk], rows: list[Sequence]
    ) -> tuple[list[ActiveRequest], Tensor]:
        """Run the step: requests whose prefill ends with it, and logits of these, then the rows.

        Where all together fail, each request's prompts and the rows run by themselves, so that one
        request cannot end the others.
        """
        if not chunks and not rows:
            return [], torch.empty(0, 0)
        try:
            return _ended(chunks), self._runner.run(chunks, rows)
        except SteeringFaultError:
            raise
        except Exception:  # boundary: as said above
            if not chunks:
                raise
            logger.exception("a step failed; its requests run apart")
            return self._run_apart(chunks, rows)

    def _run_apart(
        self, chunks: list[PrefillChunk], rows: list[Sequence]
    ) -> tuple[list[ActiveRequest], Tensor]:
        ended: list[ActiveRequest] = []
        logits: list[Tensor] = []
        for active in {id(chunk.active): chunk.active for chunk in chunks}.values():
            own = [chunk for chunk in chunks if chunk.active is active]
            try:
                logits.append(self._runner.run(own, []))
                ended.extend(_ended(own))
            except SteeringFaultError:
                raise
            except Exception as error:  # boundary: this request fails, the others go on
                logger.exception("prefill of request %s failed", active.request.request_id)
                if active.measures_shift:  # its pair may be at fault
                    self._shift_failed(active, _worded(error))
                else:
                    self._fail(active, "engine", _worded(error))
        if rows:
            logits.append(self._runner.run([], rows))
        logits = [part for part in logits if len(part)]  # none of a prompt that has not ended
        return ended, torch.cat(logits) if logits else torch.empty(0, 0)

    def _begin_decoding(self, active: ActiveRequest, logits: Tensor) -> None:
        """Fork a prefilled prompt into its choices and take their first tokens: logits (V,)."""
        if active.request.request_id not in self._accepted:
            return
        if active.measures_shift:
            if active.doses is None:
                raise SteeringFaultError("a pass did not measure the shift that it was to measure")
            dose = float(active.doses.max())
            if not math.isfinite(dose):
                self._shift_failed(active, "the request's shift came out as NaN or infinite")
                return
            active.request.emit(SteeringApplied(dose))
        active.sequences = [
            Sequence(active, index, self._tokenizer) for index in range(active.num_rows)
        ]
        self._scheduler.join(active)
        try:
            self._runner.join(active)
        except Exception as error:  # boundary: out of memory, say; the others go on
            logger.exception("request %s got no rows", active.request.request_id)
            self._fail(active, "engine", _worded(error))
            return
        active.first_token_at = time.monotonic()
        self._apply(logits.expand(active.num_rows, -1), active.sequences)

    def _shift_failed(self, active: ActiveRequest, message: str) -> None:
        """The sample level cannot be had for this request: refuse it, or go on without."""
        if active.request.on_error == "reject":
            self._fail(active, "engine", f"steering failed: {message}")
            return
        active.request.emit(SteeringApplied(0.0, failure=message))
        active.give_up_shift()

    def _apply(self, logits: Tensor, rows: Seq[Sequence]) -> None:
        """Give each row its next token; rows that end leave the batch."""
        if not rows:
            return
        sane = torch.isfinite(logits.amax(dim=-1)).tolist()
        chosen = sample(logits, rows)
        details = logprobs(logits, rows, chosen, self._tokenizer)
        for row, is_sane, token_id, detail in zip(rows, sane, chosen, details, strict=True):
            if row.active.request.request_id not in self._accepted:
                continue  # it failed with a sibling
            if is_sane:
                row.append(token_id, detail, self._eos)
                continue
            message = "the model computed NaN or infinite logits"
            self._fail(row.active, "engine", message, is_clean=False)
        for row in rows:
            if row.finish_reason is not None:
                self._leave(row)
        for active in {id(row.active): row.active for row in rows}.values():
            if active.is_finished:
                self._finish(active)

    def _leave(self, row: Sequence, is_clean: bool = True) -> None:
        """Take a sequence out of the batch."""
        if row in self._scheduler.rows:
            self._scheduler.leave(row)
            self._runner.leave(row, is_clean)

    def _finish(self, active: ActiveRequest) -> None:
        now = time.monotonic()
        assert active.started_at is not None and active.first_token_at is not None
        timings = RequestTimings(
            queue_s=active.started_at - active.accepted_at,
            prefill_s=active.first_token_at - active.started_at,
            time_to_first_token_s=active.first_token_at - active.accepted_at,
            e2e_s=now - active.accepted_at,
            inject_s=active.inject_s,
            shift_s=active.shift_s,
        )
        completion = sum(len(row.token_ids) for row in active.sequences)
        cached = active.own.num_cached
        self._end(active, Finished(active.prompt_len, completion, timings, cached))

    def _fail(
        self, active: ActiveRequest, kind: FailureKind, message: str, is_clean: bool = True
    ) -> None:
        """End a request wherever it is, and free its rows."""
        self._scheduler.drop(active)
        for row in active.sequences:
            self._leave(row, is_clean)
        self._end(active, Failed(kind, message))

    def _end(self, active: ActiveRequest, event: Finished | Failed) -> None:
        """Emit the terminal event, once; what the request held is free."""
        if self._accepted.pop(active.request.request_id, None) is None:
            return
        active.release()
        self._places.release()
        active.request.emit(event)

    def _fail_all(self) -> None:
        """The last act: whatever was accepted and has not ended ends here."""
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, _Submit):
                self._accepted[message.active.request.request_id] = message.active
        kind: FailureKind = "engine" if self._state == "failed" else "draining"
        for active in self._accepted.values():
            active.request.emit(Failed(kind, f"the server stopped: {self._detail}"))
        self._accepted.clear()

    def _receive(self) -> bool:
        """Take in all messages, waiting for one when idle; False when the thread shall end."""
        while True:
            wait = self._scheduler.is_idle and self._stop_at is None
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                break
            if isinstance(message, _Submit):
                self._accepted[message.active.request.request_id] = message.active
                self._scheduler.add(message.active)
            elif isinstance(message, _Cancel):
                active = self._accepted.get(message.request_id)
                if active is not None:
                    self._fail(active, "cancelled", "the client has gone")
        now = time.monotonic()
        for active in list(self._accepted.values()):
            if active.deadline < now:
                self._fail(active, "timeout", "the request timed out")
        drained = self._stop_at is not None and (self._scheduler.is_idle or now > self._stop_at)
        return not drained


def _ended(chunks: Seq[PrefillChunk]) -> list[ActiveRequest]:
    """Requests whose own prompt ends with one of these chunks, in their order."""
    return [chunk.active for chunk in chunks if chunk.is_last and chunk.state.role == "own"]


def _worded(error: Exception) -> str:
    """For clients: our own words, never another library's internals (the log has those)."""
    is_ours = isinstance(error, EngineError | SteeringError)
    return str(error) if is_ours else "an internal error; see the log"


def _eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer, by the generation configuration, else the tokenizer's."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        raise EngineError("neither generation configuration nor tokenizer has an end token")
    return frozenset([eos] if isinstance(eos, int) else eos)
