"""What a gate lets through, what it costs, and what happens where it breaks.

What the gated methods come to: test_beyond.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engine.batch import Batch
from server.engine.types import Failed, Finished, SteeringApplied
from steering.methods import RowSteering, row_steering
from steering.plan import Gate
from steering.projection import Reference, shift_projection
from tests.server.engine.beyond import (
    CACHES,
    CASES,
    GATE,
    IMAGES,
    PROMPT,
    both_decoders,
    check,
    expected_of,
    opening_of,
    plan_of,
    prompt_states,
    vectors_of,
)
from tests.server.engine.conftest import (
    TOLERANCE,
    Serve,
    assert_equals_reference,
    random_delta,
    wait_until,
)
from tests.server.engine.under_test import Answer, EngineUnderTest
from tests.tiny_models import TinyModel

GATED = ["dataset", "dataset-project", "sample"]
both_errors = pytest.mark.parametrize("on_error", ["reject", "serve-unsteered"])


@both_decoders
@pytest.mark.parametrize("case", CASES)
def test_a_gate_that_is_open_or_shut_leaves_all_or_nothing(
    tiny_llava: TinyModel, shared_engine: Serve, decoder: str, case: str
) -> None:
    vectors = vectors_of(tiny_llava)
    under_test = shared_engine(tiny_llava, decoder=decoder)

    def ask(threshold: float | None) -> Answer:
        gate = None if threshold is None else Gate(1, threshold)
        plan = plan_of(case, vectors, gate=gate)
        return under_test.ask(
            PROMPT, IMAGES, plan=plan, steering=row_steering(plan, vectors)
        ).wait()

    plain, steered = under_test.ask(PROMPT, IMAGES).wait(), ask(None)
    opened, shut = ask(-1e4), ask(1e4)
    assert (opened.applied.opening, shut.applied.opening) == (1.0, 0.0)
    assert shut.applied.relative_dose == 0.0 < opened.applied.relative_dose
    torch.testing.assert_close(opened.top(), steered.top(), **TOLERANCE)
    torch.testing.assert_close(shut.top(), plain.top(), **TOLERANCE)
    assert (steered.top()[0] - plain.top()[0]).abs().max() > 1e-3


def test_what_a_gate_costs(tiny_llava: TinyModel, start_engine: Serve) -> None:
    """One token that runs twice in mode dataset; one step, no token, in mode sample."""
    vectors, under_test = vectors_of(tiny_llava), start_engine(tiny_llava)
    num_prompt = len(under_test.inputs(PROMPT, IMAGES).prompt)
    for case, num_more in (("dataset", 1), ("sample", 0)):
        steps: list[int] = []
        counted: list[int] = []
        for gate in (None, GATE):
            plan = plan_of(case, vectors, gate=gate)
            steering = row_steering(plan, vectors)
            before = under_test.engine.stats().prefill_tokens["own"]
            steps.append(0)

            def count(batch: Batch, steps: list[int] = steps) -> None:
                steps[-1] += bool(batch.chunks)

            with under_test.before_each_pass(count):
                answer = under_test.ask(PROMPT, IMAGES, plan=plan, steering=steering).wait()
            counted.append(under_test.engine.stats().prefill_tokens["own"] - before)
            assert isinstance(answer.terminal, Finished)
            has_cost = case == "sample" or gate is not None
            assert (answer.terminal.timings.shift_s > 0) == has_cost
        assert counted == [num_prompt, num_prompt + num_more]
        assert steps == [1, 2]


# What is asked of the gate's states beside


@both_decoders
def test_a_gates_states_serve_the_projection_too(
    tiny_llava: TinyModel, start_engine: Serve, decoder: str
) -> None:
    vectors = vectors_of(tiny_llava)
    under_test = start_engine(tiny_llava, decoder=decoder)
    reference = Reference(random_delta(tiny_llava, 3), random_delta(tiny_llava, 4))
    for case in CASES:
        plan = plan_of(case, vectors, gate=GATE)
        own, text_only, corrupted = prompt_states(tiny_llava, plan, PROMPT, IMAGES)
        expected = reference if "dataset" in case else Reference(text_only, corrupted - text_only)
        before = under_test.engine.stats().prefill_tokens["probe"]
        answer = under_test.ask(
            PROMPT,
            IMAGES,
            plan=plan,
            steering=row_steering(plan, vectors),
            probe=True,
            reference=reference,
        ).wait()
        assert isinstance(answer.terminal, Finished)
        value = float(shift_projection(own, expected))
        assert answer.terminal.projection == pytest.approx(value, rel=1e-3, abs=1e-4)
        check(under_test, answer, expected_of(tiny_llava, plan, vectors, PROMPT, IMAGES))
        probed = under_test.engine.stats().prefill_tokens["probe"] - before
        assert probed == ("sample" in case), "in mode dataset no token runs for it"


# What goes wrong


def broken(steering: RowSteering, value: float) -> RowSteering:
    assert steering.gate is not None
    direction = steering.gate.direction * value
    return replace(steering, gate=replace(steering.gate, direction=direction))


@both_decoders
@both_errors
@pytest.mark.parametrize("case", GATED)
def test_a_gate_that_is_no_number_falls_under_on_error(
    tiny_llava: TinyModel, start_engine: Serve, decoder: str, case: str, on_error: Any
) -> None:
    vectors = vectors_of(tiny_llava)
    under_test = start_engine(tiny_llava, decoder=decoder, **CACHES)
    plan = plan_of(case, vectors, gate=GATE)
    steering = broken(row_steering(plan, vectors), float("nan"))
    answer = under_test.ask(
        PROMPT, IMAGES, plan=plan, steering=steering, on_error=on_error, n=2
    ).wait()
    told = "the request's gate or shift came out as NaN or infinite"
    if on_error == "reject":
        assert isinstance(answer.terminal, Failed)
        assert answer.terminal.message == f"steering failed: {told}"
    else:
        assert (answer.applied.failure, answer.applied.opening) == (told, None)
        for index in range(2):
            assert_equals_reference(tiny_llava, answer, PROMPT, IMAGES, None, index=index)
    under_test.engine.drain(10)
    assert under_test.engine.stats().failures == {"steps": 0, "hooks": 0}


@both_decoders
@both_errors
@pytest.mark.parametrize("case", GATED)
def test_a_pass_that_breaks_for_a_gate_hurts_nobody_else(
    tiny_llava: TinyModel, start_engine: Serve, decoder: str, case: str, on_error: Any
) -> None:
    """What reads it raises: a direction of another size."""
    vectors = vectors_of(tiny_llava)
    under_test = start_engine(tiny_llava, decoder=decoder)
    under_test.stepper._pacer.budget = lambda *_: 512  # type: ignore[method-assign]
    plan = plan_of(case, vectors, gate=GATE)
    steering = row_steering(plan, vectors)
    assert steering.gate is not None
    wrong = replace(steering, gate=replace(steering.gate, direction=torch.ones(7)))
    with under_test.held():
        first = under_test.ask("first", IMAGES, plan=plan, steering=steering)
        answer = under_test.ask(PROMPT, IMAGES, plan=plan, steering=wrong, on_error=on_error)
        last = under_test.ask("last", IMAGES, delta=random_delta(tiny_llava))
    for each in (first, answer, last):
        each.wait()
    check(under_test, first, expected_of(tiny_llava, plan, vectors, "first", IMAGES), "first")
    assert_equals_reference(tiny_llava, last, "last", IMAGES, random_delta(tiny_llava))
    if on_error == "reject":
        assert isinstance(answer.terminal, Failed)
        told = "steering failed: an internal error; see the log"
        assert answer.terminal.message == told
    else:
        assert answer.applied.failure == "an internal error; see the log"
        assert_equals_reference(tiny_llava, answer, PROMPT, IMAGES, None)
    assert under_test.engine.status().state == "ready"


@both_decoders
@pytest.mark.parametrize("case", GATED)
def test_a_step_that_breaks_after_the_gate_fails_the_request(
    tiny_llava: TinyModel, start_engine: Serve, decoder: str, case: str
) -> None:
    """Not unsteered, whatever on_error says: what it subtracts was known, and told."""
    vectors = vectors_of(tiny_llava)
    under_test = start_engine(tiny_llava, decoder=decoder)
    plan = plan_of(case, vectors, gate=GATE)

    def break_down(batch: Batch) -> None:
        for chunk in batch.chunks:
            if chunk.delta is not None or chunk.basis is not None:
                raise RuntimeError

    with under_test.before_each_pass(break_down):
        answer = under_test.ask(
            PROMPT,
            IMAGES,
            plan=plan,
            steering=row_steering(plan, vectors),
            on_error="serve-unsteered",
        ).wait()
    assert isinstance(answer.terminal, Failed) and answer.applied.failure is None
    assert under_test.engine.status().state == "ready"
    assert under_test.stepper.is_idle


def ends(under_test: EngineUnderTest) -> Iterator[tuple[str, Callable[[str], None]]]:
    def expire(request_id: str) -> None:
        active = under_test.stepper._accepted[request_id]
        active.accepted_at -= 1000.0

    yield "cancelled", under_test.engine.cancel
    yield "timeout", expire


@pytest.mark.parametrize("case", GATED)
def test_a_request_that_ends_between_its_gate_and_its_last_token_leaves_nothing(
    tiny_llava: TinyModel, start_engine: Serve, case: str
) -> None:
    vectors, under_test = vectors_of(tiny_llava), start_engine(tiny_llava)
    plan = plan_of(case, vectors, gate=GATE)
    for kind, end in ends(under_test):
        num_steered: list[int] = []

        def count(batch: Batch, num_steered: list[int] = num_steered) -> None:
            num_steered.append(
                sum(c.delta is not None or c.basis is not None for c in batch.chunks)
            )

        asked: list[Answer] = []

        def act(
            event: object, end: Callable[[str], None] = end, asked: list[Answer] = asked
        ) -> None:
            if isinstance(event, SteeringApplied):
                end(asked[0].request_id)

        with under_test.before_each_pass(count), under_test.held():
            asked.append(
                under_test.ask(
                    PROMPT,
                    IMAGES,
                    plan=plan,
                    steering=row_steering(plan, vectors),
                    on_event=act,
                    timeout_s=500.0,
                )
            )
        terminal = asked[0].wait().terminal
        assert isinstance(terminal, Failed) and terminal.kind == kind
        assert not any(num_steered)
    wait_until(lambda: under_test.stepper.is_idle)
    after = under_test.ask(PROMPT, IMAGES, plan=plan, steering=row_steering(plan, vectors)).wait()
    check(under_test, after, expected_of(tiny_llava, plan, vectors, PROMPT, IMAGES))


def test_the_gates_of_two_levels_differ_in_what_they_read(tiny_llava: TinyModel) -> None:
    """Else the tests above could not tell which prompt's state was read."""
    vectors = vectors_of(tiny_llava)
    plan = plan_of("sample", vectors, gate=GATE)
    own, text_only, corrupted = prompt_states(tiny_llava, plan, PROMPT, IMAGES)
    openings = [opening_of(GATE, vectors, states, True) for states in (own, text_only, corrupted)]
    assert min(abs(openings[1] - openings[0]), abs(openings[1] - openings[2])) > 1e-3
