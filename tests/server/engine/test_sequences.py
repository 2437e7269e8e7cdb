"""What a request must bring to be steered."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engine.sequences import ActiveRequest, MissingShiftError
from server.engine.types import (
    EngineInputs,
    EngineRequest,
    Finished,
    Prompt,
    SamplingParams,
    ShiftPair,
)
from steering.methods import GateReader, RowSteering
from steering.plan import Gate, SteeringPlan
from tests.server.engine.conftest import Serve, picture, sample_plan
from tests.server.engine.under_test import conversation
from tests.tiny_models import TinyModel

PROMPT = Prompt((1, 2, 3), (), torch.arange(3)[None], 3)
PAIR = ShiftPair(PROMPT, PROMPT)
TENSOR, GATE = torch.ones(2, 4), Gate(1)
DATASET = SteeringPlan(mode="dataset", alpha=0.5, vector_id="0" * 64, reason=None)


def request(
    plan: SteeringPlan, pair: ShiftPair | None, delta: torch.Tensor | None
) -> ActiveRequest:
    inputs = EngineInputs(PROMPT, pair)
    return ActiveRequest(
        EngineRequest("r7", inputs, SamplingParams(), plan, RowSteering(delta), print), 9
    )


def test_a_sample_plan_without_its_pair_is_refused() -> None:
    """An assertion said so, which `python -O` removes; the request went on unsteered."""
    with pytest.raises(MissingShiftError, match="r7: .* sample .* 0.7 .* without its pair of prom"):
        request(sample_plan(0.7), None, None)
    assert request(sample_plan(0.7), PAIR, None).measures_shift


@pytest.mark.parametrize("pair", [None, PAIR])
def test_a_dataset_plan_without_its_delta_is_refused(pair: ShiftPair | None) -> None:
    """It was served unsteered, and the answer said that it was not."""
    with pytest.raises(MissingShiftError, match="r7: .* mode dataset .* 0.5 .* without its delta"):
        request(DATASET, pair, None)
    delta = torch.ones(2, 4)
    assert request(DATASET, pair, delta).delta is delta


@pytest.mark.parametrize(
    ("changes", "brought", "missing"),
    [
        ({"method": "project"}, {"delta": TENSOR}, "basis"),
        ({"method": "safety-projected"}, {"basis": TENSOR}, "delta"),
        ({"gate": GATE}, {"delta": TENSOR}, "gate"),
        ({"method": "project", "gate": GATE}, {"basis": TENSOR}, "gate"),
        ({"mode": "sample", "method": "safety-projected"}, {"delta": TENSOR}, "directions"),
        ({"mode": "sample", "gate": GATE}, {"directions": TENSOR}, "gate"),
    ],
)
def test_a_plan_without_what_its_method_or_gate_needs_is_refused(
    changes: dict[str, Any], brought: dict[str, Any], missing: str
) -> None:
    plan = replace(DATASET, **changes)
    needed = EngineRequest(
        "r7", EngineInputs(PROMPT, PAIR), SamplingParams(), plan, RowSteering(**brought), print
    )
    with pytest.raises(MissingShiftError, match=f"r7: .* came without its {missing}"):
        ActiveRequest(needed, 9)
    whole = RowSteering(TENSOR, TENSOR, TENSOR, GateReader(GATE, torch.ones(4), 0.0))
    active = ActiveRequest(replace(needed, steering=whole), 9)
    assert (active.basis is not None) == (plan.method == "project")
    assert (active.delta is not None) == (plan.mode == "dataset" and plan.method != "project")
    assert (active.gate is not None) == (plan.gate is not None)


def test_a_plan_that_applies_nothing_needs_nothing() -> None:
    for plan in (
        SteeringPlan(),
        DATASET.unsteered("text-only"),
        sample_plan().unsteered("disabled"),
    ):
        unsteered = request(plan, None, None)
        assert unsteered.delta is None and not unsteered.measures_shift


def test_who_submits_such_a_request_is_told_and_the_engine_goes_on(
    tiny_llava: TinyModel, start_engine: Serve
) -> None:
    under_test = start_engine(tiny_llava)
    inputs = under_test.engine.prepare(conversation("Hi", 1), [picture(1)])
    wrong = EngineRequest("wrong", inputs, SamplingParams(), sample_plan(), RowSteering(), print)
    for plan in (sample_plan(), DATASET):
        with pytest.raises(MissingShiftError, match="wrong"):
            under_test.engine.submit(replace(wrong, plan=plan))
    assert under_test.engine.status().num_waiting == 0
    assert isinstance(under_test.ask("Hi", max_tokens=2).wait().terminal, Finished)
