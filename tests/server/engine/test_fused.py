"""The fused decoder and its compiled kind against the eager one; and broken steering."""

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.batch import Batch, Chunk, Output, stacked_bases
from server.engine.cache import PromptCache
from server.engine.decoders import DecoderChoice, build_decoder
from server.engine.slab import KVShape
from server.engine.steering_pass import SteeringPass
from server.engine.types import EngineError, Failed
from tests.server.engine.batches import CPU, VARIANTS, Batches, model_of
from tests.server.engine.conftest import FUSED, Serve, wait_until
from tests.tiny_models import TinyModel

OWN: list[DecoderChoice] = ["fused", "compiled"]  # of this project, not the model's modules


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
