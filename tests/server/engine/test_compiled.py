"""What the compiled decoder refuses, and rows that it decodes beside each other.

That it computes what the eager one does, and that its steering is watched: test_fused.py.
"""

import copy
import shutil
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from server.engine import kernels
from server.engine.compiled import CompiledDecoder
from server.engine.decoders import build_decoder
from server.engine.fused import FusedDecoder
from server.engine.types import EngineError
from tests.server.engine.conftest import (
    Serve,
    assert_equals_reference,
    picture,
    random_delta,
    sample_plan,
    wait_until,
)
from tests.server.engine.under_test import Answer, EngineUnderTest
from tests.tiny_models import TinyModel


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_rows_that_come_and_go_are_as_alone(
    start_engine: Serve, request: pytest.FixtureRequest, name: str
) -> None:
    """Steered and not, of several length classes, some joining while others run or leave."""
    tiny: TinyModel = request.getfixturevalue(f"tiny_{name}")
    served = start_engine(tiny, decoder="compiled", max_rows=6)
    assert type(served.stepper.runner._decoder) is CompiledDecoder
    delta = random_delta(tiny, scale=0.5)
    asked: list[tuple[Any, Any, list[Any], Any]] = []
    for number, max_tokens in enumerate([60, 3, 25, 90, 8, 40, 15, 70, 1]):
        prompt, images = "word " * (number * 4 % 21), [picture(number)] if number % 3 else []
        own = delta if number % 2 else None
        answer = served.ask(prompt, images, delta=own, max_tokens=max_tokens)
        asked.append((answer, prompt, images, own))
        if number % 2:
            wait_until(lambda answer=answer: len(answer.events) > 0)
    for answer, prompt, images, own in asked:
        assert_equals_reference(tiny, answer.wait(), prompt, images, own)


def test_an_answer_is_the_same_to_the_bit_whatever_runs_beside_it(
    tiny_llava: TinyModel, start_engine: Serve
) -> None:
    """Alone, in a crowd that comes and goes, its prompt in pieces, and with its prefix cached."""
    whole = start_engine(tiny_llava, decoder="compiled")
    caches = {"prefix_cache_bytes": 2**20, "vision_cache_bytes": 2**20}
    pieces = start_engine(tiny_llava, decoder="compiled", prefill_chunk=8, **caches)
    delta = random_delta(tiny_llava, scale=0.5)

    def ask(served: EngineUnderTest, number: int) -> Answer:
        images = [picture(number)] if number % 3 else []
        steering = ({}, {"delta": delta}, {"sample": sample_plan()})[number % 3]
        prompt = "word " * (number * 7 % 31)
        return served.ask(prompt, images, max_tokens=12 + number, **steering)

    alone = [ask(whole, number).wait().logprobs() for number in range(8)]
    for served in (whole, pieces, pieces):
        asked = []
        for number in range(8):
            asked.append(ask(served, number))
            if number % 3 == 2:
                wait_until(lambda answer=asked[-1]: len(answer.events) > 2)
        for answer, expected in zip(asked, alone, strict=True):
            assert answer.wait().logprobs() == expected
    assert any(answer.cached_tokens for answer in asked)


def weights_of(model: Any) -> list[int]:
    return [parameter.numel() for parameter in model.parameters()]


def refused(model: Any, message: str) -> None:
    """By this message, and with the model as it was."""
    before = weights_of(model)
    with ExitStack() as life, pytest.raises(EngineError, match=message):
        build_decoder("compiled", model, life)
    assert weights_of(model) == before


def test_a_model_on_another_device_is_refused(tiny_llava: TinyModel) -> None:
    refused(copy.deepcopy(tiny_llava.model).to("meta"), "CPU only; choose decoder auto")


def test_another_activation_is_refused(tiny_llava: TinyModel) -> None:
    model = copy.deepcopy(tiny_llava.model)
    model.get_decoder().layers[2].mlp.act_fn = torch.nn.GELU()
    refused(model, "knows SiLU, not GELU; choose decoder auto")


def test_another_dtype_is_refused(tiny_llava: TinyModel) -> None:
    refused(copy.deepcopy(tiny_llava.model).half(), "not torch.float16")


def test_an_engine_without_a_compiler_does_not_start(
    tiny_llava: TinyModel, start_engine: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_libraries", kernels._libraries.__wrapped__)  # builds anew
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(EngineError, match=r"DESHIFT_DECODER.*install g\+\+"):
        start_engine(tiny_llava, decoder="compiled")


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_auto_is_compiled_where_that_can_be_and_else_fused(
    tiny_llava: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def automatic(model: Any) -> type:
        with ExitStack() as life:
            return type(build_decoder("auto", model, life))

    assert automatic(copy.deepcopy(tiny_llava.model)) is CompiledDecoder
    assert automatic(copy.deepcopy(tiny_llava.model).half()) is FusedDecoder
    monkeypatch.setattr(kernels, "_libraries", kernels._libraries.__wrapped__)  # builds anew
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert automatic(copy.deepcopy(tiny_llava.model)) is FusedDecoder
