"""Engines on tiny models, what they are asked, and an independent reference for the answers."""

import copy
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from server.engine.engine import EmbeddedEngine, EngineConfig
from server.engine.fused import can_fuse
from steering.corruption import Corruption
from steering.models import LoadedModel, identity_of
from steering.plan import Schedule, SteeringPlan
from tests.server.engine.under_test import Answer, EngineUnderTest, conversation
from tests.tiny_models import BUILDERS, TinyModel

INCREMENTAL = Schedule("incremental")
TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


def loaded(tiny: TinyModel) -> LoadedModel:
    identity = identity_of(tiny.model, tiny.processor, model_id=tiny.name)
    return LoadedModel(tiny.model, tiny.processor, identity)


@pytest.fixture
def start_engine() -> Iterator[Callable[..., EngineUnderTest]]:
    """Start an engine on a tiny model with any EngineConfig fields; all are drained at the end.

    With decoder="eager" it runs the very model it is given, else a copy, whose weights it takes.
    """
    engines: list[EmbeddedEngine] = []

    def start(tiny: TinyModel, **config: Any) -> EngineUnderTest:
        sizes = {"max_model_len": 256, "max_rows": 8} | config
        own = loaded(tiny)
        if config.get("decoder") != "eager":
            own = replace(own, model=copy.deepcopy(tiny.model))
        engine = EmbeddedEngine(own, EngineConfig(**sizes))
        engines.append(engine)
        engine.start()
        return EngineUnderTest(tiny, engine)

    yield start
    for engine in engines:
        engine.drain(0)


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[Callable[..., EngineUnderTest]]:
    """As `start_engine`, but one engine for each model and configuration of a whole file.

    For tests that change nothing about it, which takes as long to start as to ask. Its model is
    always a copy, and its caches are empty each time.
    """
    engines: dict[Hashable, EngineUnderTest] = {}

    def share(tiny: TinyModel, **config: Any) -> EngineUnderTest:
        key = (id(tiny.model), *sorted(config.items()))
        if key not in engines:
            sizes = {"max_model_len": 256, "max_rows": 8} | config
            own = replace(loaded(tiny), model=copy.deepcopy(tiny.model))
            engines[key] = EngineUnderTest(tiny, EmbeddedEngine(own, EngineConfig(**sizes)))
            engines[key].engine.start()
        under_test = engines[key]
        assert under_test.engine.status().state == "ready", "a test before this one has broken it"
        wait_until(lambda: under_test.stepper.is_idle)
        under_test.stepper.runner.prefix.clear()
        under_test.stepper.runner.vision.clear()
        return under_test

    yield share
    for under_test in engines.values():
        under_test.engine.drain(0)


Serve = Callable[..., EngineUnderTest]
FUSED = [name for name in BUILDERS if can_fuse(BUILDERS[name]().model)]
# Every family as it is served (compiled where a compiler is), and one of those by the others too:
# eager's further cases are Gemma 3's (masks of two kinds) and test_fused.py's (three axes of
# positions), fused's are test_fused.py's.
SERVED = [(name, "auto") for name in BUILDERS] + [("llava", "eager"), ("llava", "fused")]


@pytest.fixture(params=SERVED, ids=[f"{name}-{decoder}" for name, decoder in SERVED])
def served(request: pytest.FixtureRequest) -> tuple[TinyModel, str]:
    """A supported family and one of the decoders that it is served by: the conformance suite's."""
    name, decoder = request.param
    return built(name), decoder


@pytest.fixture
def serve(served: tuple[TinyModel, str], shared_engine: Serve) -> Serve:
    """A running engine for `served`, which other tests use as well."""
    tiny, decoder = served
    return lambda **config: shared_engine(tiny, decoder=decoder, **config)


@cache
def built(name: str) -> TinyModel:
    return BUILDERS[name]()


def wait_until(holds: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.005)


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


def sample_plan(
    alpha: float = 0.7,
    schedule: Schedule = INCREMENTAL,
    corruption: Corruption = "blank",
    max_relative_dose: float = 10.0,
) -> SteeringPlan:
    return SteeringPlan(
        mode="sample",
        alpha=alpha,
        schedule=schedule,
        corruption=corruption,
        max_relative_dose=max_relative_dose,
        reason=None,
    )


def reference_log_probs(
    tiny: TinyModel,
    messages: list[dict[str, Any]],
    images: Sequence[Image.Image],
    answer_ids: Sequence[int],
    delta: Tensor | None = None,
    basis: Tensor | None = None,
) -> Tensor:
    """(tokens, V) log-probabilities of an answer, by one pass of the bare model without a cache.

    Its own hooks subtract delta (L, D), or the state's part in basis (L, k, D), from the last
    prompt token and from every answer token.
    """
    batch = _processed(tiny, messages, images)
    prompt_len = batch["input_ids"].shape[1]
    answer = torch.tensor([list(answer_ids)[:-1]], dtype=torch.long)
    batch["input_ids"] = torch.cat([batch["input_ids"], answer], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for types in ("mm_token_type_ids", "token_type_ids"):
        if types in batch:
            batch[types] = torch.cat([batch[types], torch.zeros_like(answer)], dim=1)

    def steer(layer: int, hidden: Tensor) -> Tensor:
        mask = torch.arange(hidden.shape[1])[None, :, None] >= prompt_len - 1
        steered = hidden
        if delta is not None:
            steered = steered - delta[layer].to(hidden.dtype)
        if basis is not None:
            steered = steered - sum(
                (steered @ vector)[..., None] * vector for vector in basis[layer]
            )
        return torch.where(mask, steered, hidden)

    steers = delta is not None or basis is not None
    with _hooked(tiny, steer if steers else None), torch.no_grad():
        logits = tiny.model(**batch, use_cache=False).logits[0, prompt_len - 1 :]
    return torch.log_softmax(logits.float(), dim=-1)


def assert_equals_reference(
    tiny: TinyModel,
    answer: Answer,
    prompt: Any,
    images: list[Any],
    delta: Tensor | None,
    basis: Tensor | None = None,
    index: int = 0,
) -> None:
    """The greedy answer's tokens and log-probabilities are those of one cache-free pass."""
    messages, token_ids = conversation(prompt, len(images)), answer.token_ids(index)
    expected = reference_log_probs(tiny, messages, images, token_ids, delta, basis)
    assert token_ids == expected.argmax(dim=-1).tolist()
    chosen = torch.tensor([token.logprob for token in answer.logprobs(index)])
    torch.testing.assert_close(chosen, expected.amax(dim=-1), **TOLERANCE)
    torch.testing.assert_close(answer.top(index), expected.topk(5).values.flip(-1), **TOLERANCE)


def reference_last_hidden(
    tiny: TinyModel, messages: list[dict[str, Any]], images: Sequence[Image.Image]
) -> Tensor:
    """(L, D): the bare model's states after each layer at the last prompt token."""
    states: list[Tensor] = []

    def keep(_layer: int, hidden: Tensor) -> None:
        states.append(hidden[0, -1].clone())

    with _hooked(tiny, keep), torch.no_grad():
        tiny.model(**_processed(tiny, messages, images), use_cache=False)
    return torch.stack(states)


def _processed(
    tiny: TinyModel, messages: list[dict[str, Any]], images: Sequence[Image.Image]
) -> dict[str, Tensor]:
    processor = tiny.processor
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    pictures = [list(images)] if images else None
    return dict(processor(text=[prompt], images=pictures, return_tensors="pt"))


@contextmanager
def _hooked(tiny: TinyModel, act: Callable[[int, Tensor], Tensor | None] | None) -> Iterator[None]:
    """Call `act` after each decoder layer of the bare model, by hooks of the tests' own."""
    handles = []
    if act is not None:
        for number, module in enumerate(tiny.model.get_decoder().layers):
            hook = lambda _m, _a, hidden, layer=number: act(layer, hidden)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
