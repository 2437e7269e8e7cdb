"""Every method at every level, with and without a gate, against the bare model.

What each comes to is written out in beyond.py; answers are compared with one pass of the model
under hooks of the tests' own.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.batch import Batch
from server.engine.types import Failed, Finished, SteeringApplied, TextEvent
from steering.methods import RowSteering, row_steering
from steering.plan import Gate
from steering.projection import Reference, shift_projection
from tests.server.engine.beyond import (
    CASES,
    GATE,
    Expected,
    expected_of,
    opening_of,
    plan_of,
    prompt_states,
    vectors_of,
)
from tests.server.engine.conftest import (
    TOLERANCE,
    Answer,
    EngineUnderTest,
    Serve,
    assert_equals_reference,
    picture,
    random_delta,
    wait_until,
)
from tests.tiny_models import TinyModel

CACHES = {"prefix_cache_bytes": 1 << 24, "vision_cache_bytes": 1 << 24}
PROMPT, IMAGES = "What is in the picture?", [picture(1)]
GATED = ["dataset", "dataset-project", "sample"]
both_decoders = pytest.mark.parametrize("decoder", ["eager", "fused"])
both_errors = pytest.mark.parametrize("on_error", ["reject", "serve-unsteered"])


def check(
    under_test: EngineUnderTest,
    answer: Answer,
    expected: Expected,
    prompt: str = PROMPT,
    n: int = 1,
) -> None:
    for index in range(n):
        assert_equals_reference(
            under_test.tiny, answer, prompt, IMAGES, expected.delta, expected.basis, index
        )
    if expected.opening is not None:
        assert 0.02 < expected.opening < 0.98, "so open or shut that the test would show nothing"
        assert answer.applied.opening == pytest.approx(expected.opening, rel=1e-4)
        assert answer.applied.relative_dose == pytest.approx(expected.dose, rel=1e-3)
    assert (expected.delta if expected.delta is not None else expected.basis).norm() > 0.1  # type: ignore[union-attr]


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
