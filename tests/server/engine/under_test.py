"""A started engine with shorthands, and a collector of one request's events.

Does not cover how engines are started (conftest.py).
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from server.engine.batch import Batch, Output
from server.engine.engine import EmbeddedEngine
from server.engine.stepper import Stepper
from server.engine.types import (
    ChoiceFinished,
    EngineEvent,
    EngineInputs,
    EngineRequest,
    Failed,
    Finished,
    OnError,
    SamplingParams,
    SteeringApplied,
    TextEvent,
    TokenLogprob,
)
from steering.methods import RowSteering
from steering.plan import SteeringPlan
from steering.projection import Reference
from tests.tiny_models import TinyModel

_ids = itertools.count()


@dataclass
class Answer:
    """Collects one request's events; `wait` returns when the terminal one has come."""

    request_id: str
    events: list[EngineEvent] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    on_event: Callable[[EngineEvent], None] = lambda _event: None

    def emit(self, event: EngineEvent) -> None:
        self.events.append(event)
        self.on_event(event)
        if isinstance(event, Finished | Failed):
            self._ended.set()

    def wait(self, timeout_s: float = 30) -> "Answer":
        assert self._ended.wait(timeout_s), "no terminal event came"
        return self

    @property
    def terminal(self) -> Finished | Failed:
        ends = [event for event in self.events if isinstance(event, Finished | Failed)]
        assert len(ends) == 1 and self.events[-1] is ends[0], "not exactly one terminal event"
        return ends[0]

    def text(self, index: int = 0) -> str:
        return "".join(e.text for e in self.events if isinstance(e, TextEvent) and e.index == index)

    def logprobs(self, index: int = 0) -> list[TokenLogprob]:
        events = [e for e in self.events if isinstance(e, TextEvent) and e.index == index]
        return [logprob for event in events for logprob in event.logprobs]

    def token_ids(self, index: int = 0) -> list[int]:
        return [logprob.token_id for logprob in self.logprobs(index)]

    def top(self, index: int = 0) -> Tensor:
        """(tokens, top) log-probabilities, to compare with a tolerance."""
        rows = [sorted(t.logprob for t in token.top) for token in self.logprobs(index)]
        return torch.tensor(rows)

    @property
    def cached_tokens(self) -> int:
        assert isinstance(self.terminal, Finished)
        return self.terminal.cached_tokens

    @property
    def applied(self) -> SteeringApplied:
        """What the sample level or a gate came to; it precedes all text."""
        assert isinstance(self.events[0], SteeringApplied)
        assert sum(isinstance(event, SteeringApplied) for event in self.events) == 1
        return self.events[0]

    def finish_reason(self, index: int = 0) -> str:
        ends = [e for e in self.events if isinstance(e, ChoiceFinished) and e.index == index]
        assert len(ends) == 1
        return ends[0].reason


@dataclass
class EngineUnderTest:
    """A started engine, with shorthands."""

    tiny: TinyModel
    engine: EmbeddedEngine

    @property
    def stepper(self) -> Stepper:
        assert self.engine._stepper is not None, "the engine has not started"
        return self.engine._stepper

    def inputs(
        self, prompt: Any, images: Sequence[Image.Image] = (), corruption: Any = None
    ) -> EngineInputs:
        return self.engine.prepare(conversation(prompt, len(images)), images, corruption)

    def ask(
        self,
        prompt: Any,
        images: Sequence[Image.Image] = (),
        *,
        delta: Tensor | None = None,
        alpha: float = 1.0,
        sample: SteeringPlan | None = None,
        plan: SteeringPlan | None = None,
        steering: RowSteering | None = None,
        inputs: EngineInputs | None = None,
        timeout_s: float = float("inf"),
        namespace: str = "",
        on_error: OnError = "reject",
        on_event: Callable[[EngineEvent], None] = lambda _event: None,
        probe: bool = False,
        reference: Reference | None = None,
        **params: Any,
    ) -> Answer:
        """Submit a request; greedy with the top 5 log-probabilities unless told otherwise.

        delta: steered at dataset level by alpha * delta; sample: at sample level by this plan;
        plan, steering: by whatever they say.
        """
        answer = Answer(f"request-{next(_ids)}", on_event=on_event)
        defaults = {"max_tokens": 6, "temperature": 0.0, "top_logprobs": 5, "ignore_eos": True}
        plan = plan or sample or SteeringPlan()
        if steering is None:
            steering = RowSteering(None if delta is None else alpha * delta)
        if delta is not None and alpha:
            plan = SteeringPlan(mode="dataset", alpha=alpha, vector_id="0" * 64, reason=None)
        self.engine.submit(
            EngineRequest(
                request_id=answer.request_id,
                inputs=inputs or self.inputs(prompt, images, plan.corruption_in_force),
                params=SamplingParams(**(defaults | params)),
                plan=plan,
                steering=steering,
                emit=answer.emit,
                timeout_s=timeout_s,
                namespace=namespace,
                on_error=on_error,
                probe=probe,
                reference=reference,
            )
        )
        return answer

    @contextmanager
    def before_each_pass(self, act: Callable[[Batch], None]) -> Iterator[None]:
        """Call `act` with what each pass is about to run."""
        decoder = self.stepper.runner._decoder
        run = decoder.run

        def act_and_run(batch: Batch) -> Output:
            act(batch)
            return run(batch)

        decoder.run = act_and_run  # type: ignore[method-assign]
        try:
            yield
        finally:
            decoder.run = run  # type: ignore[method-assign]

    @contextmanager
    def slow(self, seconds: float = 0.02) -> Iterator[None]:
        """Every pass takes at least this long."""
        with self.before_each_pass(lambda _batch: time.sleep(seconds)):
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """The engine takes no step: what is asked meanwhile begins in one."""
        holding, released = threading.Event(), threading.Event()

        def hold(event: EngineEvent) -> None:
            if isinstance(event, Finished):
                holding.set()
                released.wait(30)

        self.ask("", max_tokens=1, on_event=hold)
        assert holding.wait(30)
        try:
            yield
        finally:
            released.set()


def conversation(prompt: Any, num_images: int = 0) -> list[dict[str, Any]]:
    """A one-turn conversation from a string; anything else is taken as messages."""
    if not isinstance(prompt, str):
        return list(prompt)
    pictures = [{"type": "image"}] * num_images
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]
