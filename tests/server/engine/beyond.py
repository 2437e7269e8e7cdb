"""What the methods come to for one prompt, written out by hand beside the code under test."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from steering.corruption import corrupt
from steering.models import identity_of
from steering.plan import Gate, Method, Mode, Schedule, SteeringPlan
from steering.vectors import ShiftVectors
from tests.server.engine.conftest import (
    assert_equals_reference,
    picture,
    random_delta,
    reference_last_hidden,
)
from tests.server.engine.under_test import Answer, EngineUnderTest, conversation
from tests.steering.samples import manifest, shift_vectors
from tests.tiny_models import TinyModel

CACHES = {"prefix_cache_bytes": 1 << 24, "vision_cache_bytes": 1 << 24}
PROMPT, IMAGES = "What is in the picture?", [picture(1)]
both_decoders = pytest.mark.parametrize("decoder", ["eager", "fused"])
RANK = 2
GATE = Gate(layer=1, threshold=0.1, temperature=2.0)
# Every method at every level that it has; the schedules are those that it takes.
CASES: dict[str, tuple[Mode, Method, str]] = {
    "dataset": ("dataset", "subtract", "incremental"),
    "dataset-safety-projected": ("dataset", "safety-projected", "all"),
    "dataset-project": ("dataset", "project", "range:1-2"),
    "sample": ("sample", "subtract", "all"),
    "sample-safety-projected": ("sample", "safety-projected", "incremental"),
}


@dataclass(frozen=True)
class Expected:
    """What every steered token subtracts, and the numbers that the answer tells."""

    delta: Tensor | None = None  # (L, D)
    basis: Tensor | None = None  # (L, k, D)
    opening: float | None = None
    dose: float = 0.0


def vectors_of(tiny: TinyModel, seed: int = 0) -> ShiftVectors:
    """Random tensors of the model's sizes, with lengths that change its answers."""
    mean = random_delta(tiny, seed)
    num_layers, size = mean.shape
    generator = torch.Generator().manual_seed(seed + 1)
    columns = torch.randn(num_layers, size, RANK, generator=generator)
    return shift_vectors(
        manifest=manifest(model=identity_of(tiny.model, tiny.processor, model_id=tiny.name)),
        mean=mean,
        hidden_norm=torch.full((num_layers,), 4.0),
        consistency=torch.ones(num_layers),
        basis=torch.linalg.qr(columns).Q.mT.contiguous(),
        singular_values=torch.ones(num_layers, RANK),
        refusal_direction=random_delta(tiny, seed + 2),
        text_mean=random_delta(tiny, seed + 3),
    )


def plan_of(case: str, vectors: ShiftVectors, **changes: Any) -> SteeringPlan:
    mode, method, schedule = CASES[case]
    fields = {"alpha": 0.7, "schedule": Schedule.parse(schedule), "gate": None} | changes
    needs = mode == "dataset" or method != "subtract" or fields["gate"] is not None
    vector_id = vectors.id if needs else None
    return SteeringPlan(mode=mode, method=method, vector_id=vector_id, reason=None, **fields)


def expected_of(
    tiny: TinyModel, plan: SteeringPlan, vectors: ShiftVectors, prompt: Any, images: list[Any]
) -> Expected:
    """In float64, layer by layer, from states of the bare model."""
    own, text_only, corrupted = prompt_states(tiny, plan, prompt, images)
    opening = None
    if plan.gate is not None:
        is_sample = plan.mode == "sample"
        opening = opening_of(plan.gate, vectors, text_only if is_sample else own, is_sample)
    alpha = plan.alpha * (1.0 if opening is None else opening)
    num_layers = len(own)
    layers = plan.schedule.layers(num_layers)
    if plan.method == "project":
        assert vectors.basis is not None and vectors.text_mean is not None
        basis = torch.zeros_like(vectors.basis)
        doses = [0.0]
        for layer in layers:
            basis[layer] = math.sqrt(alpha) * vectors.basis[layer]
            part = vectors.basis[layer] @ (vectors.text_mean + vectors.mean)[layer]
            doses.append(alpha * float(part.norm() / vectors.hidden_norm[layer]))
        return Expected(basis=basis, opening=opening, dose=max(doses))
    is_sample = plan.mode == "sample"
    shift = corrupted - text_only if is_sample else vectors.mean.double()
    if plan.method == "safety-projected":
        assert vectors.refusal_direction is not None
        refusals = vectors.refusal_direction.double()
        shift = torch.stack([(d @ s) / (s @ s) * s for d, s in zip(shift, refusals, strict=True)])
    delta = torch.zeros_like(shift)
    for layer in layers:
        below = shift[layer - 1] if plan.schedule.kind == "incremental" and layer else 0.0
        delta[layer] = alpha * (shift[layer] - below)
    norms = corrupted.norm(dim=-1) if is_sample else vectors.hidden_norm.double()
    return Expected(delta.float(), None, opening, float((delta.norm(dim=-1) / norms).max()))


def prompt_states(
    tiny: TinyModel, plan: SteeringPlan, prompt: Any, images: list[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the prompt itself, without its pictures and with corrupted ones, (L, D) float64 each."""
    messages = conversation(prompt, len(images))
    without = [
        {**message, "content": [part for part in message["content"] if part["type"] == "text"]}
        for message in messages
    ]
    meaningless: list[Image.Image] = [corrupt(image, plan.corruption) for image in images]
    return (
        reference_last_hidden(tiny, messages, images).double(),
        reference_last_hidden(tiny, without, []).double(),
        reference_last_hidden(tiny, messages, meaningless).double(),
    )


def opening_of(gate: Gate, vectors: ShiftVectors, states: Tensor, is_sample: bool) -> float:
    assert vectors.refusal_direction is not None and vectors.text_mean is not None
    refusal = vectors.refusal_direction[gate.layer].double()
    zero = vectors.text_mean[gate.layer].double()
    if not is_sample:
        zero = zero + vectors.mean[gate.layer].double()
    score = float((states[gate.layer] - zero) @ refusal / (refusal @ refusal))
    return 1 / (1 + math.exp(-(score - gate.threshold) / gate.temperature))


def check(
    under_test: EngineUnderTest,
    answer: Answer,
    expected: Expected,
    prompt: str = PROMPT,
    n: int = 1,
) -> None:
    """That `n` greedy answers about IMAGES, and what the first one tells, are as expected."""
    for index in range(n):
        assert_equals_reference(
            under_test.tiny, answer, prompt, IMAGES, expected.delta, expected.basis, index
        )
    if expected.opening is not None:
        assert 0.02 < expected.opening < 0.98, "so open or shut that the test would show nothing"
        assert answer.applied.opening == pytest.approx(expected.opening, rel=1e-4)
        assert answer.applied.relative_dose == pytest.approx(expected.dose, rel=1e-3)
    assert (expected.delta if expected.delta is not None else expected.basis).norm() > 0.1  # type: ignore[union-attr]
