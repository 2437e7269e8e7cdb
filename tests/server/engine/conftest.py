"""An engine on a tiny model, a collector of its events, and an independent reference."""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from server.engine.engine import EmbeddedEngine, EngineConfig
from server.engine.types import (
    ChoiceFinished,
    EngineEvent,
    EngineInputs,
    EngineRequest,
    Failed,
    Finished,
    SamplingParams,
    TextEvent,
    TokenLogprob,
)
from steering.models import LoadedModel, identity_of
from steering.plan import SteeringPlan
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

    def finish_reason(self, index: int = 0) -> str:
        ends = [e for e in self.events if isinstance(e, ChoiceFinished) and e.index == index]
        assert len(ends) == 1
        return ends[0].reason


@dataclass
class EngineUnderTest:
    """A started engine, with shorthands."""

    tiny: TinyModel
    engine: EmbeddedEngine

    def inputs(self, prompt: Any, images: Sequence[Image.Image] = ()) -> EngineInputs:
        return self.engine.prepare(conversation(prompt, len(images)), images)

    def ask(
        self,
        prompt: Any,
        images: Sequence[Image.Image] = (),
        *,
        delta: Tensor | None = None,
        alpha: float = 1.0,
        inputs: EngineInputs | None = None,
        timeout_s: float = float("inf"),
        on_event: Callable[[EngineEvent], None] = lambda _event: None,
        **params: Any,
    ) -> Answer:
        """Submit a request; greedy with the top 5 log-probabilities unless told otherwise."""
        answer = Answer(f"request-{next(_ids)}", on_event=on_event)
        defaults = {"max_tokens": 6, "temperature": 0.0, "top_logprobs": 5, "ignore_eos": True}
        plan = SteeringPlan()
        if delta is not None and alpha:
            plan = SteeringPlan(mode="dataset", alpha=alpha, vector_id="0" * 64, reason=None)
        self.engine.submit(
            EngineRequest(
                request_id=answer.request_id,
                inputs=inputs or self.inputs(prompt, images),
                params=SamplingParams(**(defaults | params)),
                plan=plan,
                delta=None if delta is None else alpha * delta,
                emit=answer.emit,
                timeout_s=timeout_s,
            )
        )
        return answer


def conversation(prompt: Any, num_images: int = 0) -> list[dict[str, Any]]:
    """A one-turn conversation from a string; anything else is taken as messages."""
    if not isinstance(prompt, str):
        return list(prompt)
    pictures = [{"type": "image"}] * num_images
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]


def loaded(tiny: TinyModel) -> LoadedModel:
    identity = identity_of(tiny.model, tiny.processor, model_id=tiny.name)
    return LoadedModel(tiny.model, tiny.processor, identity)


@pytest.fixture
def start_engine() -> Iterator[Callable[..., EngineUnderTest]]:
    """Start an engine on a tiny model with any EngineConfig fields; all are drained at the end."""
    engines: list[EmbeddedEngine] = []

    def start(tiny: TinyModel, **config: Any) -> EngineUnderTest:
        sizes = {"max_model_len": 256, "max_rows": 8} | config
        engine = EmbeddedEngine(loaded(tiny), EngineConfig(**sizes))
        engines.append(engine)
        engine.start()
        return EngineUnderTest(tiny, engine)

    yield start
    for engine in engines:
        engine.drain(0)


def picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Noise, a different one for each seed."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def random_delta(tiny: TinyModel, seed: int = 0, scale: float = 1.0) -> Tensor:
    """(L, D), of a size that changes the answer."""
    config = tiny.model.config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(config.num_hidden_layers, config.hidden_size, generator=generator)


def reference_log_probs(
    tiny: TinyModel,
    messages: list[dict[str, Any]],
    images: Sequence[Image.Image],
    answer_ids: Sequence[int],
    delta: Tensor | None = None,
) -> Tensor:
    """(tokens, V) log-probabilities of an answer, by one pass of the bare model without a cache.

    Its own hooks subtract delta from the last prompt token and from every answer token.
    """
    processor, model = tiny.processor, tiny.model
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    batch = dict(processor(text=[prompt], images=list(images) or None, return_tensors="pt"))
    prompt_len = batch["input_ids"].shape[1]
    answer = torch.tensor([list(answer_ids)[:-1]], dtype=torch.long)
    batch["input_ids"] = torch.cat([batch["input_ids"], answer], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if "mm_token_type_ids" in batch:
        types = batch["mm_token_type_ids"]
        batch["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(answer)], dim=1)

    def hook_of(layer: int) -> Any:
        def hook(_module: Any, _args: Any, hidden: Tensor) -> Tensor:
            assert delta is not None
            mask = torch.arange(hidden.shape[1])[None, :, None] >= prompt_len - 1
            return torch.where(mask, hidden - delta[layer].to(hidden.dtype), hidden)

        return hook

    handles = []
    if delta is not None:
        layers = model.get_decoder().layers
        handles = [m.register_forward_hook(hook_of(i)) for i, m in enumerate(layers)]
    try:
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[0, prompt_len - 1 :]
    finally:
        for handle in handles:
            handle.remove()
    return torch.log_softmax(logits.float(), dim=-1)
