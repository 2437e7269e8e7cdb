"""Every method at every level, with and without a gate, against the bare model.

What each comes to is written out in beyond.py; answers are compared with one pass of the model
under hooks of the tests' own.
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.types import SteeringApplied, TextEvent
from steering.methods import row_steering
from steering.plan import Gate
from tests.server.engine.beyond import (
    CACHES,
    CASES,
    GATE,
    IMAGES,
    PROMPT,
    both_decoders,
    check,
    expected_of,
    plan_of,
    vectors_of,
)
from tests.server.engine.conftest import Serve, assert_equals_reference, random_delta
from tests.server.engine.under_test import Answer
from tests.tiny_models import TinyModel


@both_decoders
@pytest.mark.parametrize("gate", [None, GATE], ids=["open", "gated"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prefill_chunk", [1, 7, 512])
def test_every_method_at_every_level(
    tiny_llava: TinyModel,
    shared_engine: Serve,
    decoder: str,
    case: str,
    gate: Gate | None,
    prefill_chunk: int,
) -> None:
    """Cold and from the prefix cache, by chunks of any size."""
    vectors = vectors_of(tiny_llava)
    plan = plan_of(case, vectors, gate=gate)
    expected = expected_of(tiny_llava, plan, vectors, PROMPT, IMAGES)
    under_test = shared_engine(tiny_llava, decoder=decoder, prefill_chunk=prefill_chunk, **CACHES)
    steering = row_steering(plan, vectors)
    cold, warm = (
        under_test.ask(PROMPT, IMAGES, plan=plan, steering=steering).wait() for _ in range(2)
    )
    assert cold.cached_tokens == 0 < warm.cached_tokens
    check(under_test, cold, expected)
    check(under_test, warm, expected)


@pytest.mark.parametrize("case", ["dataset-project", "sample-safety-projected"])
@pytest.mark.parametrize("gate", [None, GATE], ids=["open", "gated"])
def test_in_every_family(serve: Serve, case: str, gate: Gate | None) -> None:
    under_test = serve(prefill_chunk=16)
    vectors = vectors_of(under_test.tiny)
    plan = plan_of(case, vectors, gate=gate)
    answer = under_test.ask(PROMPT, IMAGES, plan=plan, steering=row_steering(plan, vectors)).wait()
    expected = expected_of(under_test.tiny, plan, vectors, PROMPT, IMAGES)
    if expected.opening is not None:  # the scores of some are beyond what check asks for
        assert answer.applied.opening == pytest.approx(expected.opening, rel=1e-3, abs=1e-6)
        expected = replace(expected, opening=None)
    tiny = under_test.tiny
    assert_equals_reference(tiny, answer, PROMPT, IMAGES, expected.delta, expected.basis)


@both_decoders
@pytest.mark.parametrize("budget", [512, 40])
def test_all_of_them_in_one_batch_are_each_as_by_themselves(
    tiny_llava: TinyModel, start_engine: Serve, decoder: str, budget: int
) -> None:
    """Pitfall 3: beside neighbours with a Delta of 1e6, and plain ones; subspaces of two ranks."""
    vectors = vectors_of(tiny_llava)
    assert vectors.basis is not None
    narrow = replace(vectors, basis=vectors.basis[:, :1], singular_values=torch.ones(3, 1))
    under_test = start_engine(tiny_llava, decoder=decoder, max_rows=32, **CACHES)
    under_test.stepper._pacer.budget = lambda *_: budget  # type: ignore[method-assign]
    huge = 1e6 * random_delta(tiny_llava, 99)
    asked: list[tuple[Answer, str, Any, Any, int]] = []
    doomed: list[Answer] = []
    with under_test.held():
        for number, (case, gate) in enumerate(itertools.product(CASES, [None, GATE])):
            of = narrow if number == 5 else vectors
            plan, n = plan_of(case, of, gate=gate), 1 + number % 3
            prompt = f"{PROMPT} {'x' * number}"
            doomed.append(under_test.ask("beside", IMAGES, delta=huge, max_tokens=40))
            params: dict[str, Any] = {"max_tokens": 3 + number, "n": n}
            steering = row_steering(plan, of)
            answer = under_test.ask(prompt, IMAGES, plan=plan, steering=steering, **params)
            asked.append((answer, prompt, plan, of, n))
        plain = under_test.ask("plain", IMAGES, max_tokens=20)
    for answer in [plain, *doomed, *(each[0] for each in asked)]:
        answer.wait()
    for answer, prompt, plan, of, n in asked:
        check(under_test, answer, expected_of(tiny_llava, plan, of, prompt, IMAGES), prompt, n)
    assert_equals_reference(tiny_llava, plain, "plain", IMAGES, None)


@both_decoders
@pytest.mark.parametrize("prefill_chunk", [1, 7, 512])
@pytest.mark.parametrize("case", CASES)
def test_before_a_prompts_last_token_nothing_is_steered(
    tiny_llava: TinyModel, shared_engine: Serve, decoder: str, prefill_chunk: int, case: str
) -> None:
    """Pitfalls 1 and 7: what is steered after layer 0 shows in the keys of layer 1."""
    vectors = vectors_of(tiny_llava)
    plan = plan_of(case, vectors, gate=GATE)
    if case == "dataset-project":
        plan = replace(plan, schedule=replace(plan.schedule, first=0, last=0))
    under_test = shared_engine(tiny_llava, decoder=decoder, prefill_chunk=prefill_chunk, **CACHES)
    num_prompt = len(under_test.inputs(PROMPT, IMAGES).prompt)
    runner = under_test.stepper.runner
    keys: list[Tensor] = []

    def look(event: object) -> None:
        if isinstance(event, TextEvent):
            keys.append(runner._rows._slabs[256].get(0, num_prompt + 3)[1, 0])

    how: dict[str, Any] = {"max_tokens": 4, "logit_bias": {65: 1e4}, "on_event": look}
    under_test.ask(PROMPT, IMAGES, **how).wait()
    under_test.ask(PROMPT, IMAGES, plan=plan, steering=row_steering(plan, vectors), **how).wait()
    plain, steered = keys[3], keys[7]
    moved = (plain - steered).abs().amax(dim=(0, 2)) > 1e-5
    assert moved.nonzero()[:, 0].tolist() == list(range(num_prompt - 1, num_prompt + 3))


@both_decoders
def test_alpha_zero_is_a_no_op_whatever_comes_along(
    tiny_llava: TinyModel, start_engine: Serve, decoder: str
) -> None:
    """Pitfall 4."""
    vectors = vectors_of(tiny_llava)
    under_test = start_engine(tiny_llava, decoder=decoder)
    plain = under_test.ask(PROMPT, IMAGES).wait()
    for case in CASES:
        plan = plan_of(case, vectors, gate=GATE)
        steering = row_steering(plan, vectors)
        for unsteered in (
            replace(plan, alpha=0.0, reason="alpha-zero"),
            plan.unsteered("disabled"),
        ):
            answer = under_test.ask(PROMPT, IMAGES, plan=unsteered, steering=steering).wait()
            assert answer.top().equal(plain.top())
            assert not any(isinstance(event, SteeringApplied) for event in answer.events)


def test_what_requests_share_stays_as_it_is(tiny_llava: TinyModel, start_engine: Serve) -> None:
    """A row's steering is kept for the next requests of its plan; a gate scales its own copy."""
    vectors, under_test = vectors_of(tiny_llava), start_engine(tiny_llava)
    for case in ("dataset", "dataset-project"):
        plan = plan_of(case, vectors, gate=GATE)
        steering = row_steering(plan, vectors)
        before = [part.clone() for part in (steering.delta, steering.basis) if part is not None]
        for prompt in ("one", PROMPT):
            answer = under_test.ask(prompt, IMAGES, plan=plan, steering=steering).wait()
            check(
                under_test, answer, expected_of(tiny_llava, plan, vectors, prompt, IMAGES), prompt
            )
        after = [part for part in (steering.delta, steering.basis) if part is not None]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)) and before
