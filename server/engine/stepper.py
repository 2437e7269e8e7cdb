"""The engine's steps: schedule a batch, run it, apply the tokens; and how each request ends.

Does not receive messages nor own the thread (engine.py), decide what runs (scheduler.py), compute
(runner.py) or choose tokens (sampling.py).
"""

import logging
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from server.engine.pacing import Pacer
from server.engine.runner import Runner, ShiftFailedError, SteeringFaultError
from server.engine.sampling import logprobs, sample
from server.engine.scheduler import PrefillChunk, Scheduler
from server.engine.sequences import ActiveRequest, Sequence
from server.engine.stats import Counters, StepKind
from server.engine.types import Failed, FailureKind, Finished, SteeringApplied, worded

logger = logging.getLogger(__name__)


class Stepper:
    """All that was accepted and has not ended, and the steps that bring it to its end.

    `on_end` is called once for each request, before its terminal event. Engine thread only.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        pacer: Pacer,
        counters: Counters,
        tokenizer: Any,
        eos: frozenset[int],
        on_end: Callable[[], None],
    ) -> None:
        self.runner = runner
        self._scheduler = scheduler
        self._pacer = pacer
        self._counters = counters
        self._tokenizer = tokenizer
        self._eos = eos
        self._on_end = on_end
        self._accepted: dict[str, ActiveRequest] = {}  # all that owe a terminal event
        self._probes: list[ActiveRequest] = []  # whose last tokens the next step runs once more

    @property
    def is_idle(self) -> bool:
        return self._scheduler.is_idle

    def accept(self, active: ActiveRequest) -> None:
        self._accepted[active.request.request_id] = active
        self._scheduler.add(active)

    def cancel(self, request_id: str) -> None:
        active = self._accepted.get(request_id)
        if active is not None:
            self._fail(active, "cancelled", "the client has gone")

    def expire(self) -> None:
        """End what has passed its deadline."""
        now = time.monotonic()
        for active in list(self._accepted.values()):
            if active.deadline < now:
                self._fail(active, "timeout", "the request timed out")

    def fail_all(self, kind: FailureKind, message: str) -> None:
        """The last act: whatever has not ended ends here; nothing is freed any more."""
        for active in self._accepted.values():
            active.request.emit(Failed(kind, message))
        self._accepted.clear()

    def step(self) -> None:
        """Schedule a batch, run it, apply the tokens."""
        started = time.monotonic()
        rows = self.runner.arrange(self._scheduler.rows)
        chunks = self._embedded(self._scheduler.schedule(self._budget(len(rows))))
        probes, self._probes = self._probes, []
        ended, logits = self._run(chunks, rows, probes)
        for active in probes:
            active.release()
        for chunk in chunks:
            if chunk.reads_gate:
                self._go_on_through_gate(chunk.active)
        self._apply(logits[len(ended) :], rows)
        for active, row_logits in zip(ended, logits, strict=False):
            self._begin_decoding(active, row_logits)
        num_prefilled = sum(chunk.end - chunk.start for chunk in chunks)
        step_s = time.monotonic() - started
        if chunks or not probes:  # else it would take a probe's cost for the rows'
            self._pacer.observe(step_s, num_prefilled, len(rows))
        if chunks or rows:
            kind: StepKind = "decode" if not chunks else "mixed" if rows else "prefill"
            self._counters.step_s[kind].observe(step_s)

    def _budget(self, num_rows: int) -> int:
        """Tokens of prefill for the next step."""
        num_ready = self._scheduler.num_within(self._pacer.max_chunk)
        return self._pacer.budget(num_rows, self._scheduler.num_waiting, num_ready)

    def admit(self, active: ActiveRequest) -> None:
        """The scheduler has taken it up: its prompts get their caches."""
        active.started_at = time.monotonic()
        try:
            self.runner.admit(active)
        except Exception as error:  # boundary: out of memory, say; the others go on
            self._count_failure()
            logger.exception("admitting request %s failed", active.request.request_id)
            self._fail(active, "engine", worded(error))

    def _embedded(self, chunks: list[PrefillChunk]) -> list[PrefillChunk]:
        """Those whose prompts are embedded; a request whose prompt cannot be ends here, or begins
        anew without its pair."""
        for chunk in chunks:
            active = chunk.active
            if active not in self._scheduler.prefilling:
                continue  # it failed with its other prompt
            try:
                self.runner.embed(chunk)
            except ShiftFailedError as error:
                self._count_failure()
                logger.exception("request %s", active.request.request_id)
                self._shift_failed(active, worded(error))
            except Exception as error:  # boundary: this request fails, the others go on
                self._count_failure()
                logger.exception("embedding request %s failed", active.request.request_id)
                self._fail(active, "engine", worded(error))
        return [
            chunk for chunk in chunks if chunk.state.embeds is not None and not chunk.was_taken_back
        ]

    def _run(
        self, chunks: list[PrefillChunk], rows: list[Sequence], probes: list[ActiveRequest]
    ) -> tuple[list[ActiveRequest], Tensor]:
        """Run the step: requests whose prefill ends with it, and logits of these, then the rows.

        Where all together fail, they run without the probes; where that fails, each request's
        prompts and the rows run by themselves, so that one request cannot end the others.
        """
        if not chunks and not rows:
            return [], torch.empty(0, 0)
        try:
            return _ended(chunks), self.runner.run(chunks, rows, probes)
        except SteeringFaultError:
            raise
        except Exception:  # boundary: as said above
            self._count_failure()
            if probes:
                logger.exception("a step with probes failed; it runs without them")
                return self._run(chunks, rows, [])
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
                logits.append(self.runner.run(own, []))
                ended.extend(_ended(own))
            except SteeringFaultError:
                raise
            except Exception as error:  # boundary: this request fails, the others go on
                logger.exception("prefill of request %s failed", active.request.request_id)
                if active.measures_shift or active.gate is not None:  # they may be at fault
                    self._shift_failed(active, worded(error))
                else:
                    self._fail(active, "engine", worded(error))
        if rows:
            logits.append(self.runner.run([], rows))
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
            self.runner.join(active)
        except Exception as error:  # boundary: out of memory, say; the others go on
            self._count_failure()
            logger.exception("request %s got no rows", active.request.request_id)
            self._fail(active, "engine", worded(error))
            return
        active.first_token_at = time.monotonic()
        self._apply(logits.expand(active.num_rows, -1), active.sequences)
        if active.is_probed and active.request.request_id in self._accepted:
            self._probes.append(active)

    def _go_on_through_gate(self, active: ActiveRequest) -> None:
        """A pass has read a request's gate: its last token is due, steered as far as that opens."""
        if active.gate is None or active.request.request_id not in self._accepted:
            return  # it goes on unsteered, or has ended
        if active.opening is None:
            raise SteeringFaultError("a pass did not read the gate that it was to read")
        opening, dose = float(active.opening), active.request.steering.max_dose
        if active.doses is not None:
            dose = float(active.doses.max())
        if not math.isfinite(opening * dose):
            self._shift_failed(active, "the request's gate or shift came out as NaN or infinite")
            return
        active.go_on_through_gate(opening)
        active.request.emit(SteeringApplied(opening * dose, opening=opening))

    def _shift_failed(self, active: ActiveRequest, message: str) -> None:
        """What is measured cannot be had for this request: refuse it, or go on without."""
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
        now = time.monotonic()
        for row, is_sane, token_id, detail in zip(rows, sane, chosen, details, strict=True):
            if row.active.request.request_id not in self._accepted:
                continue  # it failed with a sibling
            if is_sane:
                self._counters.token_made(row.last_token_at, now)
                row.last_token_at = now
                row.append(token_id, detail, self._eos)
                continue
            self._count_failure()
            message = "the model computed NaN or infinite logits"
            self._fail(row.active, "engine", message, is_clean=False)
        for row in rows:
            if row.finish_reason is not None:
                self._leave(row)
        for active in {id(row.active): row.active for row in rows}.values():
            if active.is_finished:
                self._finish(active)

    def _count_failure(self) -> None:
        self._counters.failures["steps"] += 1

    def _leave(self, row: Sequence, is_clean: bool = True) -> None:
        """Take a sequence out of the batch."""
        if row in self._scheduler.rows:
            self._scheduler.leave(row)
            self.runner.leave(row, is_clean)

    def _finish(self, active: ActiveRequest) -> None:
        self.runner.costs.settle()
        self._end(active, active.finished())

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
        if active in self._probes:
            self._probes.remove(active)
        self._on_end()
        active.request.emit(event)


def _ended(chunks: Seq[PrefillChunk]) -> list[ActiveRequest]:
    """Requests whose prefill ends with one of these chunks, in their order."""
    return [chunk.active for chunk in chunks if chunk.ends_prefill]
