"""Steering that would not act stops the start, or ends the engine: never unsteered in silence."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engine.batch import Decoder
from server.engine.decoders import DecoderChoice, build_decoder
from server.engine.engine import EmbeddedEngine, EngineConfig
from server.engine.types import (
    EngineError,
    Failed,
    NotAcceptingError,
)
from tests.server.engine.conftest import (
    loaded,
    picture,
    random_delta,
    sample_plan,
    wait_until,
)
from tests.server.engine.under_test import EngineUnderTest
from tests.tiny_models import TinyModel, build_tiny_llava

Start = Callable[..., EngineUnderTest]


def test_the_very_first_request_is_steered(start_engine: Start) -> None:
    """Pitfall 2: no warm-up is needed before the hooks act."""
    tiny = build_tiny_llava()
    delta = random_delta(tiny)
    first = start_engine(tiny).ask("Hi", [picture(1)], delta=delta).wait()
    later = start_engine(tiny).ask("Hi", [picture(1)]).wait()
    assert not torch.allclose(first.top(), later.top(), atol=1e-2)


def test_a_model_whose_layers_are_bypassed_is_not_ready(
    start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pitfall 2: the layers that carry the hooks are not the ones that run."""
    tiny = build_tiny_llava()

    def build(choice: DecoderChoice, model: Any, life: ExitStack) -> Decoder:
        decoder = build_decoder(choice, model, life)
        model.get_decoder().layers = build_tiny_llava().model.get_decoder().layers
        return decoder

    monkeypatch.setattr("server.engine.engine.build_decoder", build)
    with pytest.raises(
        EngineError, match="steering had its turn 0 times in 4 passes over 3 layers"
    ):
        start_engine(tiny, decoder="eager")


@pytest.mark.parametrize("decoder", ["eager", "auto"])
def test_a_model_with_renamed_layers_is_not_ready(decoder: DecoderChoice) -> None:
    """It runs as before, but what carries its layers is nothing that could be steered."""
    tiny = build_tiny_llava()
    engine = EmbeddedEngine(loaded(tiny), EngineConfig(decoder=decoder))
    layers = tuple(tiny.model.get_decoder().layers)
    del tiny.model.get_decoder().layers
    tiny.model.get_decoder().layers = layers
    with pytest.raises(EngineError, match="has no `layers` to steer"):
        engine.start()
    assert engine.status().state == "failed"


def test_a_model_that_passes_on_something_else_is_not_ready(start_engine: Start) -> None:
    """Pitfall 2: the hooks fire, but what they return is not what the next layer is given."""
    tiny = build_tiny_llava()
    layers = tiny.model.get_decoder().layers
    clean: list[torch.Tensor] = []
    layers[1].register_forward_hook(lambda _m, _a, hidden: clean.append(hidden))
    layers[2].register_forward_pre_hook(lambda _m, args: (clean[-1], *args[1:]))
    with pytest.raises(EngineError, match="canary: at layer 1 the hidden state moved by 0,"):
        start_engine(tiny, decoder="eager")


def test_hooks_that_stop_firing_fail_the_engine_and_every_request(start_engine: Start) -> None:
    """Pitfall 2, in service: no further token is made, and nobody is left hanging."""
    tiny = build_tiny_llava()
    under_test = start_engine(tiny, decoder="eager")
    decoder = tiny.model.get_decoder()
    with under_test.slow():
        answers = [under_test.ask("Hi", max_tokens=200) for _ in range(3)]
        wait_until(lambda: all(a.events for a in answers))
        decoder.layers[1]._forward_hooks.clear()
        for answer in answers:
            end = answer.wait().terminal
            assert isinstance(end, Failed) and end.kind == "engine"
            assert "steering had its turn 2 times in 1 passes over 3 layers" in end.message
    assert under_test.engine.status().state == "failed"
    with pytest.raises(NotAcceptingError, match="failed"):
        under_test.ask("Hi")


def test_a_pass_that_forgets_to_measure_ends_the_engine(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    """Never unsteered in silence."""
    under_test = start_engine(tiny_llava)
    decoder = under_test.stepper.runner._decoder
    run = decoder.run
    decoder.run = lambda batch: replace(run(batch), shifts={})  # type: ignore[method-assign]
    answer = under_test.ask("Hi", [picture(1)], sample=sample_plan()).wait()
    assert isinstance(answer.terminal, Failed)
    assert under_test.engine.status().state == "failed"
