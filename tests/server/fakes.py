"""An engine without a model: it plays scripted events from a thread of its own, as a real one does.

Beside it what tests of the HTTP layer build again and again: identities, vectors, bodies.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

import torch
from PIL import Image

from server.control import Author, activate
from server.engine.stats import CacheUse, Counters, EngineStats
from server.engine.types import (
    ChoiceFinished,
    EngineError,
    EngineEvent,
    EngineInputs,
    EngineRequest,
    EngineStatus,
    Failed,
    Finished,
    NotAcceptingError,
    PairError,
    Prompt,
    RequestTimings,
    ShiftPair,
    SteeringApplied,
    TextEvent,
)
from steering.corruption import Corruption
from steering.models import ModelIdentity
from steering.stores.base import Store
from steering.vectors import Manifest, ShiftVectors

NUM_LAYERS, HIDDEN_SIZE = 3, 4
TIMINGS = RequestTimings(
    queue_s=0.001, prefill_s=0.002, time_to_first_token_s=0.003, e2e_s=0.01, inject_s=0.0005
)
SHIFT_S = 0.002  # what measuring a request's own shift takes
PAIR_S = 0.002  # what making its two prompts takes
SAMPLE_DOSE = 0.125  # and the dose that it comes to
CACHED_TOKENS = 1  # of every prompt
AUTHOR = Author("ann", "to be tested", "command")
Step = EngineEvent | threading.Event
Script = Callable[[EngineRequest], Iterable[Step]]


def says(*pieces: str, reason: str = "stop", shift_failure: str | None = None) -> Script:
    """Every choice says `pieces`; an Event among them holds the script until it is set.

    Before them comes what the sample level came to, where it is asked for; with `shift_failure`
    the request goes on unsteered or fails, as its `on_error` says.
    """

    def script(request: EngineRequest) -> Iterator[Step]:
        is_sample = request.inputs.pair is not None
        if is_sample and shift_failure is not None and request.on_error == "reject":
            yield Failed("engine", shift_failure)
            return
        if is_sample:
            dose = SAMPLE_DOSE if shift_failure is None else 0.0
            yield SteeringApplied(dose, failure=shift_failure)
        for piece in pieces:
            for index in range(request.params.n):
                yield TextEvent(index, piece)
        for index in range(request.params.n):
            yield ChoiceFinished(index, "length" if reason == "length" else "stop")
        yield Finished(
            prompt_tokens=len(request.inputs.prompt),
            completion_tokens=len(pieces) * request.params.n,
            timings=replace(TIMINGS, shift_s=SHIFT_S if is_sample else 0.0),
            cached_tokens=CACHED_TOKENS,
        )

    return script


def plays(*steps: Step) -> Script:
    return lambda _: steps


class FakeEngine:
    """Implements server.engine.api.Engine. `requests` and `cancelled` say what reached it."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or says("Hello", " there", "!")
        self.requests: list[EngineRequest] = []
        self.prompts: list[tuple[Sequence[dict[str, Any]], Sequence[Image.Image]]] = []
        self.corruptions: list[Corruption | None] = []  # what prepare was asked for, in order
        self.cancelled: list[str] = []
        self.refusal: EngineError | None = None  # what submit or prepare raises
        self.prepare_error: Exception | None = None
        self.pair_error: PairError | None = None  # what prepare raises where a pair is asked for
        self.prepare_gate: threading.Event | None = None  # what prepare waits for
        self.start_error: EngineError | None = None
        self.max_model_len = 100
        self.identity = make_identity()
        self.state: str = "starting"
        self.counters = Counters()  # what stats tells; nothing is counted
        self._running: dict[str, threading.Event] = {}  # cancel flags
        self._threads: list[threading.Thread] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    def prepare(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[Image.Image],
        corruption: Corruption | None = None,
    ) -> EngineInputs:
        """A token a character, and ten an image."""
        self.corruptions.append(corruption)
        if self.prepare_error is not None:
            raise self.prepare_error
        if self.pair_error is not None and corruption is not None:
            raise self.pair_error
        self.prompts.append((messages, images))
        if self.prepare_gate is not None:
            assert self.prepare_gate.wait(10)
        texts = [part.get("text", "") for message in messages for part in message["content"]]
        text_len = sum(map(len, texts))
        prompt = make_prompt(text_len + 10 * len(images))
        if corruption is None:
            return EngineInputs(prompt)
        time.sleep(PAIR_S)
        return EngineInputs(prompt, ShiftPair(prompt, make_prompt(text_len)), PAIR_S)

    def submit(self, request: EngineRequest) -> None:
        if self.refusal is not None:
            raise self.refusal
        if self.state != "ready":
            raise NotAcceptingError(f"the engine is {self.state}")
        self.requests.append(request)
        flag = self._running[request.request_id] = threading.Event()
        thread = threading.Thread(target=self._play, args=(request, flag), daemon=True)
        self._threads.append(thread)
        thread.start()

    def cancel(self, request_id: str) -> None:
        if request_id in self._running:
            self.cancelled.append(request_id)
            self._running[request_id].set()

    def status(self) -> EngineStatus:
        return EngineStatus(self.state, self.state, 0, len(self._running), 0, 1000)  # type: ignore[arg-type]

    def stats(self) -> EngineStats:
        return self.counters.snapshot({"own": CacheUse(), "shift": CacheUse()}, CacheUse())

    def start(self) -> None:
        if self.start_error is not None:
            self.state = "failed"
            raise self.start_error
        self.state = "ready"

    def drain(self, timeout_s: float) -> None:
        self.state = "draining" if self.state == "ready" else self.state
        for thread in self._threads:
            thread.join(timeout_s)
        for flag in list(self._running.values()):
            flag.set()
        for thread in self._threads:
            thread.join(5)
        self.state = "stopped"

    def _play(self, request: EngineRequest, cancelled: threading.Event) -> None:
        try:
            self._play_script(request, cancelled)
        except Exception as error:  # a mistake in a script must not leave its test waiting
            self._end(request, Failed("engine", f"the test's script: {error!r}"))

    def _play_script(self, request: EngineRequest, cancelled: threading.Event) -> None:
        for step in self.script(request):
            while isinstance(step, threading.Event) and not step.wait(0.002):
                if cancelled.is_set():
                    break
            if cancelled.is_set():
                kind = "draining" if self.state == "draining" else "cancelled"
                self._end(request, Failed(kind, kind))
                return
            if isinstance(step, Finished | Failed):
                self._end(request, step)
            elif not isinstance(step, threading.Event):
                request.emit(step)

    def _end(self, request: EngineRequest, event: EngineEvent) -> None:
        del self._running[request.request_id]
        request.emit(event)


def make_prompt(length: int) -> Prompt:
    return Prompt(tuple(range(length)), (), torch.arange(length)[None], next_position=length)


def make_identity(**changes: Any) -> ModelIdentity:
    values: dict[str, Any] = {
        "model_id": "tiny",
        "revision": None,
        "weights_digest": "a" * 64,
        "dtype": "float32",
        "quantisation": None,
        "processor_digest": "b" * 64,
        "chat_template_digest": "c" * 64,
        "num_layers": NUM_LAYERS,
        "hidden_size": HIDDEN_SIZE,
    }
    return ModelIdentity(**{**values, **changes})


def make_vectors(length: float = 0.5, identity: ModelIdentity | None = None) -> ShiftVectors:
    """Every layer's Delta has norm `length` times (layer + 1); every hidden norm is 10."""
    identity = identity or make_identity()
    mean = torch.zeros(identity.num_layers, identity.hidden_size)
    mean[:, 0] = length * torch.arange(1, identity.num_layers + 1)
    manifest = Manifest(
        model=identity,
        corruption="blank",
        image_size="96x96",
        anchor_set="test",
        anchor_set_digest="d" * 64,
        num_anchors=2,
        versions=(("torch", "0"),),
        created_at="2026-01-01T00:00:00Z",
    )
    return ShiftVectors(
        manifest=manifest,
        mean=mean,
        hidden_norm=torch.full((identity.num_layers,), 10.0),
        consistency=torch.ones(identity.num_layers),
    )


async def publish(
    store: Store, length: float = 0.5, alias: str = "default", **identity: Any
) -> str:
    """Keep a set of `make_vectors` and put it in force under an alias; returns its id."""
    vectors = make_vectors(length, make_identity(**identity))
    await store.put_vectors(vectors.to_bytes())
    await activate(store, alias, vectors.id, by="the tests", reason="to be tested")
    return vectors.id


def image_bytes(
    size: tuple[int, int] = (8, 6), *, format: str = "PNG", mode: str = "RGB", colour: Any = "red"
) -> bytes:
    buffer = BytesIO()
    Image.new(mode, size, colour).save(buffer, format)
    return buffer.getvalue()


def data_url(data: bytes | None = None, label: str = "image/png") -> str:
    from base64 import b64encode

    encoded = b64encode(image_bytes() if data is None else data).decode()
    return f"data:{label};base64,{encoded}"


def chat_body(text: str = "Hi", *, images: int = 0, **fields: Any) -> dict[str, Any]:
    """A request body; with images the content is a list of parts."""
    content: Any = text
    if images:
        part = {"type": "image_url", "image_url": {"url": data_url()}}
        content = [{"type": "text", "text": text}, *[part] * images]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}
