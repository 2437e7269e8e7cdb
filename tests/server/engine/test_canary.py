"""The canary's check of measured shifts: decoders that measure or apply them wrongly do not serve.

What it says of given shifts is tested with the decoders (test_ready.py, test_fused.py).
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.batch import Batch, Decoder, Output, Shift
from server.engine.canary import run_canary
from server.engine.decoders import DecoderChoice, build_decoder
from server.engine.families import family_of
from server.engine.types import EngineError
from steering.ops import within
from tests.server.engine.conftest import Serve
from tests.tiny_models import TinyModel

Run = Callable[[Batch], Output]
Break = Callable[[Run, Batch], Output]


class Broken:
    """A decoder whose passes `act` takes over."""

    def __init__(self, decoder: Decoder, act: Break) -> None:
        self._decoder = decoder
        self._act = act
        self.num_layers = decoder.num_layers
        self.steering_dtype = decoder.steering_dtype

    def run(self, batch: Batch) -> Output:
        return self._act(self._decoder.run, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._decoder.logits(hidden)

    def trace(self, batch: Batch) -> tuple[Tensor, Output]:
        return self._decoder.trace(batch)


def with_shifts(batch: Batch, change: Callable[[Shift], Shift | None]) -> Batch:
    chunks = [
        replace(chunk, shift=change(chunk.shift)) if chunk.shift else chunk
        for chunk in batch.chunks
    ]
    return replace(batch, chunks=tuple(chunks))


def measures(batch: Batch) -> bool:
    return any(chunk.shift for chunk in batch.chunks)


def forgets_shifts(run: Run, batch: Batch) -> Output:
    return run(with_shifts(batch, lambda _shift: None))


def swaps_the_probes(run: Run, batch: Batch) -> Output:
    return run(
        with_shifts(batch, lambda s: replace(s, corrupted=s.text_only, text_only=s.corrupted))
    )


def forgets_alpha(run: Run, batch: Batch) -> Output:
    return run(with_shifts(batch, lambda s: replace(s, plan=replace(s.plan, alpha=1.0))))


def measures_one_layer_late(run: Run, batch: Batch) -> Output:
    output = run(batch)
    shifts = {i: (delta.roll(1, dims=0), doses) for i, (delta, doses) in output.shifts.items()}
    return replace(output, shifts=shifts)


def measures_what_is_no_number(run: Run, batch: Batch) -> Output:
    output = run(batch)
    shifts = {i: (delta * float("nan"), doses) for i, (delta, doses) in output.shifts.items()}
    return replace(output, shifts=shifts)


def measures_and_does_not_apply(run: Run, batch: Batch) -> Output:
    return replace(forgets_shifts(run, batch), shifts=run(batch).shifts)


def steers_a_probe_too(run: Run, batch: Batch) -> Output:
    output = run(batch)
    if measures(batch):
        output.hidden[0] += 0.1 * output.hidden[2]
    return output


def has_no_turn_where_it_measures(run: Run, batch: Batch) -> Output:
    output = run(batch)
    return replace(output, fired=0) if measures(batch) else output


BREAKS: dict[Break, str] = {
    forgets_shifts: "canary: a pass that was to measure a shift has measured none",
    swaps_the_probes: "canary: at layer 0 a measured shift .*: it is not what its two prompts show",
    forgets_alpha: "canary: at layer 0 a measured shift .*: it is not what its two prompts show",
    measures_one_layer_late: "canary: at layer 0 a measured shift .*: it is not what its two",
    measures_what_is_no_number: "canary: at layer 0 a measured shift has length nan",
    measures_and_does_not_apply: "canary: a measured shift is not what its pass subtracted",
    steers_a_probe_too: "canary: a shift moved the prompts that it was measured with",
    has_no_turn_where_it_measures: "canary: steering had its turn 0 times",
}


@pytest.mark.parametrize("decoder", ["eager", "fused"])
@pytest.mark.parametrize("act", BREAKS)
def test_a_decoder_that_measures_or_applies_shifts_wrongly_does_not_start(
    tiny_llava: TinyModel,
    start_engine: Serve,
    monkeypatch: pytest.MonkeyPatch,
    act: Break,
    decoder: str,
) -> None:
    """The sample level needs no vectors, so nothing else at start would show it."""

    def build(choice: DecoderChoice, model: Any, life: ExitStack) -> Decoder:
        return Broken(build_decoder(choice, model, life), act)

    monkeypatch.setattr("server.engine.engine.build_decoder", build)
    with pytest.raises(EngineError, match=BREAKS[act]):
        start_engine(tiny_llava, decoder=decoder)


def takes_nothing(hidden: Tensor, _basis: Tensor) -> Tensor:
    return torch.zeros_like(hidden)


def takes_half(hidden: Tensor, basis: Tensor) -> Tensor:
    return 0.5 * within(hidden, basis)


def takes_of_a_neighbour(hidden: Tensor, basis: Tensor) -> Tensor:
    return within(hidden, basis) + 0.1 * hidden.roll(1, dims=0)


@pytest.mark.parametrize(
    ("decoder", "module"), [("eager", "steering.hooks"), ("fused", "server.engine.steering_pass")]
)
@pytest.mark.parametrize(
    ("act", "message"),
    [
        (takes_nothing, "canary: at layer 0 the hidden state moved by 0,"),
        (takes_half, "canary: at layer 0 .* the error is 50"),
        (takes_of_a_neighbour, "canary: at layer 0 .* the error is"),
    ],
)
def test_a_decoder_that_projects_wrongly_does_not_start(
    tiny_llava: TinyModel,
    start_engine: Serve,
    monkeypatch: pytest.MonkeyPatch,
    decoder: str,
    module: str,
    act: Callable[[Tensor, Tensor], Tensor],
    message: str,
) -> None:
    monkeypatch.setattr(f"{module}.within", act)
    with pytest.raises(EngineError, match=message):
        start_engine(tiny_llava, decoder=decoder)


@pytest.mark.parametrize("choice", ["eager", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_family_passes_in_every_number_format(
    tiny_model: TinyModel, choice: DecoderChoice, dtype: torch.dtype
) -> None:
    """What rounding alone does is no reason to refuse a model."""
    model = copy.deepcopy(tiny_model.model).to(dtype)
    with ExitStack() as life, torch.inference_mode():
        run_canary(family_of(model), model, build_decoder(choice, model, life))
