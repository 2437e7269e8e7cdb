"""The checks of a model in this process: an engine that steers as planned, and ones that do not."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.batch import Batch, Decoder, Output
from server.engine.decoders import DecoderChoice, build_decoder
from server.verify.check import Check, VerifyError
from server.verify.local import Build, verify_model
from steering.anchors import Anchor, AnchorSet, Label
from steering.extract import extract
from steering.models import LoadedModel
from steering.vectors import ShiftVectors
from tests.server.conftest import make_settings
from tests.server.engine.conftest import loaded
from tests.tiny_models import TinyModel

NAMES = ["planned magnitude", "bare model", "zero to the bit", "prompt untouched"]
LABELS: dict[Label, str] = {"harmful": "Break", "harmless": "Mend"}
ANCHORS = AnchorSet(
    "test",
    tuple(
        Anchor(id=f"{label}-{noun}", label=label, text=f"{verb} the {noun}.")
        for label, verb in LABELS.items()
        for noun in ("chair", "old clock")
    ),
)


def own(tiny: TinyModel, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A copy, whose weights may be taken over."""
    model = copy.deepcopy(tiny.model).to(dtype)
    return replace(loaded(tiny), model=model)


@pytest.fixture(scope="module")
def vectors_of() -> Callable[[TinyModel], ShiftVectors]:
    return lambda tiny: extract(loaded(tiny), ANCHORS, image_size=(32, 32), basis_rank=2)


def verified(
    tiny: TinyModel,
    vectors: ShiftVectors | None,
    dtype: torch.dtype = torch.float32,
    build: Build = build_decoder,
    **settings: Any,
) -> dict[str, Check]:
    values: dict[str, Any] = {"alpha": 0.5, "max_relative_dose": 10.0} | settings
    checks = verify_model(own(tiny, dtype), make_settings(**values), vectors, build=build)
    assert [check.name for check in checks] == NAMES
    return {check.name: check for check in checks}


def failed(checks: dict[str, Check]) -> list[str]:
    return [name for name, check in checks.items() if check.status == "failed"]


def test_a_model_is_steered_as_planned(
    tiny_model: TinyModel, vectors_of: Callable[[TinyModel], ShiftVectors]
) -> None:
    vectors = vectors_of(tiny_model)
    checks = verified(tiny_model, vectors, schedule="incremental")
    assert all(check.status == "ok" for check in checks.values()), checks
    layers = checks["planned magnitude"].figures["layers"]
    previous = torch.cat([torch.zeros_like(vectors.mean[:1]), vectors.mean[:-1]])
    expected = 0.5 * (vectors.mean - previous).norm(dim=-1)
    for layer, length in zip(layers, expected, strict=True):
        assert layer["planned"] == pytest.approx(float(length), rel=1e-4)
        assert layer["prefill"] == pytest.approx(layer["planned"], rel=1e-3)
        assert layer["decode"] == pytest.approx(layer["planned"], rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"decoder": "eager"},
        {"schedule": "single:1"},
        {"steering_mode": "sample", "schedule": "incremental"},
        {"method": "safety-projected"},
        {"method": "project", "alpha": 0.7},
        {"gate": "1:0:0.1"},
    ],
    ids=lambda settings: ",".join(map(str, settings.values())),
)
def test_every_way_of_steering_can_be_verified(
    settings: dict[str, Any],
    tiny_llava: TinyModel,
    vectors_of: Callable[[TinyModel], ShiftVectors],
) -> None:
    checks = verified(tiny_llava, vectors_of(tiny_llava), **settings)
    assert all(check.status == "ok" for check in checks.values()), checks
    planned = [layer["planned"] for layer in checks["planned magnitude"].figures["layers"]]
    if settings.get("schedule") == "single:1":
        assert [bool(length) for length in planned] == [False, True, False][: len(planned)]
    else:
        assert all(planned)


def test_in_bfloat16_rounding_is_allowed_for(
    tiny_llava: TinyModel, vectors_of: Callable[[TinyModel], ShiftVectors]
) -> None:
    for decoder in ("fused", "eager"):
        checks = verified(tiny_llava, vectors_of(tiny_llava), torch.bfloat16, decoder=decoder)
        assert all(check.status == "ok" for check in checks.values()), checks


class Broken:
    """A decoder that runs another batch than it is given, or spoils what came of it."""

    def __init__(
        self,
        decoder: Decoder,
        before: Callable[[Batch], Batch],
        after: Callable[[Batch, Tensor], None],
    ) -> None:
        self.num_layers, self.steering_dtype = decoder.num_layers, decoder.steering_dtype
        self.run, self.logits = decoder.run, decoder.logits
        self._decoder, self._before, self._after = decoder, before, after

    def trace(self, batch: Batch) -> tuple[Tensor, Output]:
        states, output = self._decoder.trace(self._before(batch))
        self._after(batch, states)
        return states, output


def broken(
    before: Callable[[Batch], Batch] = lambda batch: batch,
    after: Callable[[Batch, Tensor], None] = lambda _batch, _states: None,
) -> Build:
    def build(choice: DecoderChoice, model: Any, life: ExitStack) -> Decoder:
        return Broken(build_decoder(choice, model, life), before, after)

    return build


def inert(batch: Batch) -> Batch:
    chunks = tuple(replace(chunk, delta=None) for chunk in batch.chunks)
    return replace(batch, chunks=chunks, deltas=None)


def weak_rows(batch: Batch) -> Batch:
    return batch if batch.deltas is None else replace(batch, deltas=0.9 * batch.deltas)


def nothing_is_something(batch: Batch) -> Batch:
    if batch.deltas is None or batch.deltas.any():
        return batch
    return replace(batch, deltas=batch.deltas + 1e-3)


def one_layer_late(batch: Batch) -> Batch:
    chunks = tuple(
        chunk if chunk.delta is None else replace(chunk, delta=chunk.delta.roll(1, dims=0))
        for chunk in batch.chunks
    )
    return replace(batch, chunks=chunks)


def steers_the_whole_prompt(batch: Batch, _: Tensor) -> None:
    for chunk in batch.chunks:
        if chunk.delta is not None and chunk.start == 0:
            chunk.cache.kv[-1, 0, 0, 2] += 1e-3


def is_another_model(_: Batch, states: Tensor) -> None:
    states *= 1.01


@pytest.mark.parametrize(
    ("build", "name", "words"),
    [
        (broken(inert), "planned magnitude", "moves by 0 (prefill) and 0 (decode), planned is"),
        (broken(weak_rows), "planned magnitude", "layer 0 moves by"),
        (broken(one_layer_late), "planned magnitude", "layer 0 moves by 0 (prefill)"),
        (broken(nothing_is_something), "zero to the bit", "a row of zeros beside steered rows"),
        (broken(after=steers_the_whole_prompt), "prompt untouched", "keys and values of earlier"),
        (broken(after=is_another_model), "bare model", "differ from the bare model's by 0.01"),
    ],
    ids=["inert", "weak-rows", "late", "zero", "whole-prompt", "other-model"],
)
def test_each_fault_fails_its_check_alone(
    build: Build,
    name: str,
    words: str,
    tiny_llava: TinyModel,
    vectors_of: Callable[[TinyModel], ShiftVectors],
) -> None:
    checks = verified(tiny_llava, vectors_of(tiny_llava), build=build)
    assert failed(checks) == [name]
    assert words in checks[name].reason


def test_settings_that_steer_nobody_are_told_not_passed(tiny_llava: TinyModel) -> None:
    checks = verified(tiny_llava, None, steering_mode="off")
    assert checks["planned magnitude"].status == checks["prompt untouched"].status == "skipped"
    assert "disabled" in checks["planned magnitude"].reason
    assert checks["zero to the bit"].status == checks["bare model"].status == "ok"


def test_what_cannot_be_planned_is_an_error(
    tiny_llava: TinyModel, vectors_of: Callable[[TinyModel], ShiftVectors]
) -> None:
    with pytest.raises(VerifyError, match="no vectors under the alias 'default'"):
        verified(tiny_llava, None)
    with pytest.raises(VerifyError, match="max_relative_dose"):
        verified(tiny_llava, vectors_of(tiny_llava), max_relative_dose=1e-6)
