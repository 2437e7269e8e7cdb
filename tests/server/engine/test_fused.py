"""The fused decoder and its compiled kind against the eager one; and broken steering."""

import copy
import math
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from server.engine.batch import Batch, Chunk, Output, Rows, Shift, stacked_bases
from server.engine.cache import PromptCache
from server.engine.decoders import DecoderChoice, build_decoder
from server.engine.slab import KVShape, Slab
from server.engine.steering_pass import SteeringPass
from server.engine.types import EngineError, Failed
from steering.plan import Schedule
from tests.server.engine.conftest import FUSED, Serve, built, sample_plan, wait_until
from tests.tiny_models import TinyModel, build_tiny_llava

CPU = torch.device("cpu")
OWN: list[DecoderChoice] = ["fused", "compiled"]  # of this project, not the model's modules
SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Language models under LLaVA's tower, for what the tiny families do not have.
VARIANTS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "Qwen2: biases of Q, K and V": (Qwen2Config, {}),
    "Mistral: wide heads that share one key": (
        MistralConfig,
        {"head_dim": 16, "num_key_value_heads": 1, "sliding_window": None},
    ),
    "Llama: every bias, a key for each head": (
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ),
    "Llama 3: scaled positions, tied embeddings": (
        LlamaConfig,
        {"rope_parameters": SCALED_ROPE, "tie_word_embeddings": True},
    ),
}


@cache
def model_of(name: str) -> Any:
    """A tiny family's model or a variant, with norms and biases that are not all one or zero."""
    torch.manual_seed(0)
    if name in VARIANTS:
        config_class, changes = VARIANTS[name]
        config = copy.deepcopy(build_tiny_llava().model.config)
        config.text_config = config_class(**(SIZES | changes))
        config.tie_word_embeddings = bool(changes.get("tie_word_embeddings"))
        model = LlavaForConditionalGeneration(config).eval()
    else:
        model = copy.deepcopy(built(name).model)
    with torch.no_grad():
        for parameter in model.get_decoder().parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


class Batches:
    """Batches of random numbers, the same for a seed; made anew for each decoder, whose caches
    they fill."""

    def __init__(self, model: Any, seed: int) -> None:
        config = model.config.get_text_config()
        self._chance = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._shape = KVShape.of(model)
        self._num_axes = 3 if hasattr(model.base_model, "get_rope_index") else 1
        self._sizes = config.num_hidden_layers, config.hidden_size
        self._dtype = model.dtype

    def all(self, with_pair: bool) -> list[Batch]:
        """The beginnings of six prompts; their ends beside rows of two slabs, with a pair and its
        shift and subspaces of several ranks among them; rows alone, unsteered, then some of them
        projected; a prompt of one token."""
        lengths = [self._chance.randrange(2, 30) for _ in range(6)]
        cuts = [self._chance.randrange(1, length) for length in lengths]
        prompts = [self._prompt(length) for length in lengths]
        begins = [self._chunk(p, 0, cut) for p, cut in zip(prompts, cuts, strict=True)]
        plan = sample_plan(0.7, Schedule.parse(self._chance.choice(["incremental", "range:1-2"])))
        directions = torch.nn.functional.normalize(self._delta(), dim=-1)
        along = directions if self._chance.random() < 0.5 else None
        steering: list[dict[str, Any]] = [
            {"delta": self._delta()},
            {"wants_hidden": False},
            {"wants_hidden": False},
            {"shift": Shift(plan, 1, 2, along)} if with_pair else {},
            {"basis": self._basis(2)},
            {"basis": self._basis(3)},
        ]
        ends = [
            self._chunk(prompt, cut, length, **how)
            for prompt, cut, length, how in zip(prompts, cuts, lengths, steering, strict=True)
        ]
        short = self._slab(64, [self._chance.randrange(1, 60) for _ in range(3)])
        long = self._slab(128, [self._chance.randrange(1, 120) for _ in range(2)])
        deltas = torch.stack([self._delta() for _ in range(5)], dim=1)
        deltas[:, 2] = 0.0
        bases = stacked_bases([None, None, self._basis(3), None, self._basis(1)], CPU)
        assert bases is not None
        deltas[:, 4] = 0.0
        both = {"deltas": deltas.to(self._dtype), "bases": bases}
        return [
            Batch(chunks=tuple(begins)),
            Batch(tuple(ends), (self._rows(*short), self._rows(*long)), **both),
            Batch(slabs=(self._rows(*short, at=1), self._rows(*long, at=1))),
            Batch(slabs=(self._rows(*short, at=2), self._rows(*long, at=2)), bases=bases),
            Batch(chunks=(self._chunk(self._prompt(1), 0, 1, delta=self._delta()),)),
        ]

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator)

    def _delta(self) -> Tensor:
        return 0.5 * self._random(*self._sizes)

    def _basis(self, rank: int) -> Tensor:
        """Of 0.8 times the whole of a subspace."""
        num_layers, size = self._sizes
        return math.sqrt(0.8) * torch.linalg.qr(self._random(num_layers, size, rank)).Q.mT

    def _prompt(self, length: int) -> tuple[Tensor, Tensor, PromptCache]:
        embeds = self._random(length, self._sizes[1]).to(self._dtype)
        return embeds, self._positions(length), PromptCache(self._shape, length)

    def _positions(self, length: int) -> Tensor:
        steps = torch.randint(0, 3, (self._num_axes, length), generator=self._generator)
        return steps.cumsum(dim=-1)

    def _chunk(
        self, prompt: tuple[Tensor, Tensor, PromptCache], start: int, end: int, **how: Any
    ) -> Chunk:
        embeds, positions, cache = prompt
        return Chunk(embeds[start:end], positions[:, start:end], cache, start, end, **how)

    def _slab(self, room: int, lengths: list[int]) -> tuple[Slab, list[int]]:
        slab = Slab(self._shape, room, capacity=4)
        slab.keys.copy_(self._random(*slab.keys.shape))
        slab.values.copy_(self._random(*slab.values.shape))
        return slab, lengths

    def _rows(self, slab: Slab, lengths: list[int], at: int = 0) -> Rows:
        """Rows of `lengths` tokens, `at` steps later."""
        return Rows(
            embeds=self._random(len(lengths), self._sizes[1]).to(self._dtype),
            positions=self._positions(len(lengths)),
            slab=slab,
            lengths=torch.tensor(lengths) + at,
            longest=max(lengths) + at,
        )


def decoded(choice: DecoderChoice, model: Any, act: Callable[[Any], Any]) -> Any:
    """What `act` makes of a decoder of its own."""
    with ExitStack() as life, torch.inference_mode():
        return act(build_decoder(choice, copy.deepcopy(model), life))


@pytest.mark.parametrize("choice", OWN)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [*FUSED, *VARIANTS])
def test_fused_equals_eager(name: str, seed: int, choice: DecoderChoice) -> None:
    model = model_of(name)

    def run(decoder: Any) -> list[tuple[Batch, Output, Tensor]]:
        batches = Batches(model, seed).all(with_pair=True)
        outputs = [(batch, decoder.run(batch)) for batch in batches]
        return [(batch, output, decoder.logits(output.hidden)) for batch, output in outputs]

    pairs = zip(decoded(choice, model, run), decoded("eager", model, run), strict=True)
    for (batch, fused, logits), (eager_batch, eager, eager_logits) in pairs:
        close(fused.hidden, eager.hidden)
        close(logits, eager_logits)
        assert fused.shifts.keys() == eager.shifts.keys()
        for number in fused.shifts:
            for measured, expected in zip(fused.shifts[number], eager.shifts[number], strict=True):
                close(measured, expected)
        for chunk, eager_chunk in zip(batch.chunks, eager_batch.chunks, strict=True):
            close(chunk.cache.kv[..., : chunk.end, :], eager_chunk.cache.kv[..., : chunk.end, :])
        for rows, eager_rows in zip(batch.slabs, eager_batch.slabs, strict=True):
            close(rows.slab.keys, eager_rows.slab.keys)
            close(rows.slab.values, eager_rows.slab.values)


@pytest.mark.parametrize("choice", OWN)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_trace_shows_what_the_models_own_layers_are_given(
    name: str, choice: DecoderChoice
) -> None:
    model = model_of(name)

    def trace(decoder: Any) -> list[Tensor]:
        batches = Batches(model, 5).all(with_pair=False)
        return [decoder.trace(batch)[0] for batch in batches]

    fused, eager = decoded(choice, model, trace), decoded("eager", model, trace)
    assert [states.shape[1] for states in fused] == [6, 11, 5, 5, 1]
    for states, expected in zip(fused, eager, strict=True):
        close(states, expected)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# bfloat16


@pytest.mark.parametrize(
    ("choice", "dose"),
    [*((own, dose) for own in OWN for dose in (1e-4, 0.01, 0.5)), ("eager", 0.5)],
)
def test_in_bfloat16_a_step_of_any_size_keeps_its_length(
    choice: DecoderChoice, dose: float
) -> None:
    """Pitfall 8: the fused decoder's stream is float32; the model's own takes the canary's dose."""
    model = copy.deepcopy(model_of("llava")).to(torch.bfloat16)
    num_layers = 3

    def trace(decoder: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Plain and steered states and deltas, each (L, chunks + rows, D), of `num_layers` prompts
        and as many rows, of which number l is steered at layer l alone."""
        plain, _ = decoder.trace(batch(None))
        deltas = torch.zeros_like(plain)
        for number in range(2 * num_layers):
            layer = number % num_layers
            direction = torch.randn(32, generator=torch.Generator().manual_seed(number))
            length = dose * plain[layer, number].norm()
            deltas[layer, number] = length * torch.nn.functional.normalize(direction, dim=0)
        deltas = deltas.to(decoder.steering_dtype)
        return plain, decoder.trace(batch(deltas))[0], deltas.float()

    def batch(deltas: Tensor | None) -> Batch:
        _, mixed, *_ = Batches(model, 1).all(with_pair=False)
        chunks = [
            Chunk(
                chunk.embeds,
                chunk.positions,
                PromptCache(KVShape.of(model), len(chunk)),
                0,
                len(chunk),
                None if deltas is None else deltas[:, number],
            )
            for number, chunk in enumerate(mixed.chunks[:num_layers])
        ]
        of_rows = None if deltas is None else deltas[:, num_layers:]
        return Batch(tuple(chunks), mixed.slabs[:1], of_rows)

    plain, steered, deltas = decoded(choice, model, trace)
    for number in range(2 * num_layers):
        layer = number % num_layers
        moved, planned = (plain - steered)[layer, number], deltas[layer, number]
        assert float((moved - planned).norm()) < 0.02 * float(planned.norm())


@pytest.mark.parametrize("choice", OWN)
@pytest.mark.parametrize("alpha", [1e-4, 0.01, 1.0])
def test_in_bfloat16_any_share_of_a_subspace_is_taken_away_whole(
    alpha: float, choice: DecoderChoice
) -> None:
    """Pitfall 8 for the method project, of chunks and of rows."""
    model = copy.deepcopy(model_of("llava")).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    vectors = torch.linalg.qr(torch.randn(32, 2, generator=generator)).Q.T

    def trace(decoder: Any) -> list[Tensor]:
        return [decoder.trace(batch(scale))[0] for scale in (0.0, math.sqrt(alpha))]

    def batch(scale: float) -> Batch:
        _, mixed, *_ = Batches(model, 1).all(with_pair=False)
        basis = torch.zeros(3, 2, 32)
        basis[0] = scale * vectors
        chunk = replace(
            mixed.chunks[0], cache=PromptCache(KVShape.of(model), mixed.chunks[0].end), basis=basis
        )
        chunk = replace(chunk, start=0, end=len(chunk), delta=None)
        return Batch((chunk,), mixed.slabs[:1], bases=stacked_bases([basis] * 3, CPU))

    plain, steered = decoded(choice, model, trace)
    for before, after in zip(plain[0], steered[0], strict=True):
        planned = alpha * sum((before @ vector) * vector for vector in vectors)
        assert float((before - after - planned).norm()) < 0.02 * float(planned.norm())


@pytest.mark.parametrize("choice", OWN)
def test_in_bfloat16_the_fused_pass_is_no_further_from_float32_than_the_models_own(
    choice: DecoderChoice,
) -> None:
    exact = model_of("llava")
    rounded = copy.deepcopy(exact).to(torch.bfloat16)

    def logits(decoder: Any) -> Tensor:
        batches = Batches(rounded, 2).all(with_pair=False)
        return torch.cat([decoder.logits(decoder.run(batch).hidden) for batch in batches])

    def exact_logits(decoder: Any) -> Tensor:
        batches = Batches(exact, 2).all(with_pair=False)
        return torch.cat([decoder.logits(decoder.run(batch).hidden) for batch in batches])

    expected = decoded("eager", exact, exact_logits)
    fused, eager = decoded(choice, rounded, logits), decoded("eager", rounded, logits)
    assert fused.dtype == torch.float32
    assert float((fused - expected).norm()) < 1.2 * float((eager - expected).norm())


# Pitfall 2: steering that does not have its turn, or whose work is lost

Turn = Callable[[SteeringPass, int, Tensor], None]
_at = SteeringPass.at


def no_turn(*_: Any) -> None:
    pass


def counts_only(steering: SteeringPass, _layer: int, _hidden: Tensor) -> None:
    steering.fired += 1


def skips_a_layer(steering: SteeringPass, layer: int, hidden: Tensor) -> None:
    if layer != 1:
        _at(steering, layer, hidden)


def skips_a_layer_and_counts_it(steering: SteeringPass, layer: int, hidden: Tensor) -> None:
    (counts_only if layer == 1 else _at)(steering, layer, hidden)


def counts_short(steering: SteeringPass, layer: int, hidden: Tensor) -> None:
    _at(steering, layer, hidden)
    steering.fired -= layer == 2


def passes_on_something_else(steering: SteeringPass, layer: int, hidden: Tensor) -> None:
    _at(steering, layer, hidden.clone())


def passes_on_half(steering: SteeringPass, layer: int, hidden: Tensor) -> None:
    before = hidden.clone()
    _at(steering, layer, hidden)
    hidden.lerp_(before, 0.5)


def reaches_a_neighbour(steering: SteeringPass, layer: int, hidden: Tensor) -> None:
    before = hidden.clone()
    _at(steering, layer, hidden)
    hidden[-1] += (hidden - before).sum(dim=0)


@pytest.mark.parametrize("choice", OWN)
@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (no_turn, "steering had its turn 0 times in 1 passes over 3 layers"),
        (counts_only, "canary: at layer 0 the hidden state moved by 0,"),
        (skips_a_layer, "steering had its turn 2 times in 1 passes over 3 layers"),
        (skips_a_layer_and_counts_it, "canary: at layer 1 the hidden state moved by 0,"),
        (counts_short, "steering had its turn 2 times in 1 passes over 3 layers"),
        (passes_on_something_else, "canary: at layer 0 the hidden state moved by 0,"),
        (passes_on_half, "canary: at layer 0 .* the error is 50.0% of it"),
        (reaches_a_neighbour, "canary: steering layer 0 moved something else too"),
    ],
)
def test_a_fused_pass_that_steers_wrongly_is_not_ready(
    tiny_llava: TinyModel,
    start_engine: Serve,
    monkeypatch: pytest.MonkeyPatch,
    turn: Turn,
    message: str,
    choice: DecoderChoice,
) -> None:
    monkeypatch.setattr(SteeringPass, "at", turn)
    with pytest.raises(EngineError, match=message):
        start_engine(tiny_llava, decoder=choice)


@pytest.mark.parametrize("choice", OWN)
@pytest.mark.parametrize("turn", [no_turn, skips_a_layer, counts_short])
def test_steering_that_loses_its_turn_in_service_ends_the_engine_and_every_request(
    tiny_llava: TinyModel,
    start_engine: Serve,
    monkeypatch: pytest.MonkeyPatch,
    turn: Turn,
    choice: DecoderChoice,
) -> None:
    """No further token is made, steered or not, and nobody is left hanging."""
    under_test = start_engine(tiny_llava, decoder=choice, max_rows=2)
    with under_test.slow(0.005):
        running = [under_test.ask("Hi", max_tokens=200) for _ in range(2)]
        waiting = under_test.ask("Hi")
        wait_until(lambda: all(answer.events for answer in running))
        monkeypatch.setattr(SteeringPass, "at", turn)
        for answer in (*running, waiting):
            end = answer.wait().terminal
            assert isinstance(end, Failed) and end.kind == "engine"
            assert "steering had its turn" in end.message
    assert under_test.engine.status().state == "failed"
