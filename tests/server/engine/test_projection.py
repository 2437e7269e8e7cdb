"""How far prompts lie from text, probed while they are served, against the bare model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from server.engine.batch import Batch
from server.engine.types import Failed, Finished
from steering.corruption import corrupt
from steering.hooks import record
from steering.layers import decoder_layers
from steering.projection import Reference
from tests.server.engine.conftest import (
    TOLERANCE,
    picture,
    random_delta,
    sample_plan,
    wait_until,
)
from tests.server.engine.under_test import Answer, EngineUnderTest, conversation
from tests.tiny_models import TinyModel

Start = Callable[..., EngineUnderTest]
Serve = Callable[..., EngineUnderTest]
PROMPT = "What is it?"


def states(tiny: TinyModel, images: list[Image.Image]) -> Tensor:
    """(L, D): the bare model's own states at the last token of PROMPT."""
    prompt = tiny.processor.apply_chat_template(
        conversation(PROMPT, len(images)), add_generation_prompt=True, tokenize=False
    )
    pictures = [images] if images else None
    batch = tiny.processor(text=[prompt], images=pictures, return_tensors="pt")
    with record(decoder_layers(tiny.model)) as recorder, torch.no_grad():
        tiny.model(**batch, use_cache=False)
    return recorder.last_hidden()[:, 0]


def expected_projection(hidden: Tensor, text: Tensor, delta: Tensor) -> float:
    """Layer by layer, in float64."""
    shares = []
    for h, t, d in zip(hidden.double(), text.double(), delta.double(), strict=True):
        if float(d @ d):
            shares.append(float((h - t) @ d / (d @ d)))
    return sum(shares) / len(shares)


def own_pair(tiny: TinyModel, image: Image.Image) -> tuple[Tensor, Tensor]:
    """The text-only prompt's states, and the shift that blanking the picture shows."""
    text = states(tiny, [])
    return text, states(tiny, [corrupt(image, "blank")]) - text


def reference_of(tiny: TinyModel) -> Reference:
    """Of a set of vectors: whatever it is, the projection is measured against it."""
    return Reference(random_delta(tiny, seed=3), random_delta(tiny, seed=4))


def projection(answer: Answer) -> float | None:
    end = answer.wait().terminal
    assert isinstance(end, Finished)
    return end.projection


def test_in_mode_sample_it_is_measured_against_the_requests_own_pair(serve: Serve) -> None:
    under_test, image = serve(prefix_cache_bytes=1 << 22), picture(1)
    text, delta = own_pair(under_test.tiny, image)
    expected = expected_projection(states(under_test.tiny, [image]), text, delta)
    for alpha in (0.7, 0.05):  # cold, then from the cache
        answer = under_test.ask(PROMPT, [image], sample=sample_plan(alpha), probe=True)
        assert projection(answer) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_elsewhere_it_is_measured_against_the_reference_whatever_alpha_is(serve: Serve) -> None:
    under_test, image = serve(prefill_chunk=16), picture(1)
    reference = reference_of(under_test.tiny)
    hidden = states(under_test.tiny, [image])
    expected = expected_projection(hidden, reference.text, reference.delta)
    delta = random_delta(under_test.tiny)
    for alpha in (0.0, 0.3, 2.0):
        answer = under_test.ask(
            PROMPT, [image], delta=delta, alpha=alpha, probe=True, reference=reference
        )
        assert projection(answer) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("decoder", ["eager", "auto"])
def test_a_picture_without_content_lies_at_one(
    tiny_llava: TinyModel, start_engine: Start, decoder: str
) -> None:
    blank = Image.new("RGB", (24, 16), "white")
    under_test = start_engine(tiny_llava, decoder=decoder)
    answer = under_test.ask(PROMPT, [blank], sample=sample_plan(), probe=True)
    assert projection(answer) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("decoder", ["eager", "auto"])
@pytest.mark.parametrize("level", ["off", "dataset", "sample"])
def test_a_probe_changes_no_answer(
    tiny_llava: TinyModel, start_engine: Start, decoder: str, level: str
) -> None:
    """Neither its own request's, of several choices, nor those of neighbours."""
    under_test = start_engine(tiny_llava, decoder=decoder)
    steering: dict[str, Any] = {
        "off": {},
        "dataset": {"delta": random_delta(tiny_llava)},
        "sample": {"sample": sample_plan()},
    }[level]
    requests = [
        (f"{PROMPT} {number}", [picture(number)], {"n": number % 2 + 1}) for number in range(4)
    ]
    probed: list[list[Answer]] = []
    num_probes: list[int] = []
    for probe in (False, True):
        with under_test.before_each_pass(
            lambda batch: num_probes.append(sum(c.start == c.end - 1 for c in batch.chunks))
        ):
            with under_test.held():
                answers = [
                    under_test.ask(
                        prompt,
                        images,
                        **steering,
                        **params,
                        probe=probe,
                        reference=reference_of(tiny_llava),
                    )
                    for prompt, images, params in requests
                ]
            probed.append([answer.wait() for answer in answers])
        assert [projection(answer) is not None for answer in answers] == [probe] * 4
        assert sum(num_probes) == 4 * probe
    for plain, other, (_, _, params) in zip(*probed, requests, strict=True):
        for index in range(params["n"]):
            torch.testing.assert_close(other.top(index), plain.top(index), **TOLERANCE)
            assert other.token_ids(index) == plain.token_ids(index)


def test_probed_together_each_is_as_alone(tiny_llava: TinyModel, start_engine: Start) -> None:
    under_test = start_engine(tiny_llava)
    asked: list[dict[str, Any]] = [
        {"sample": sample_plan(), "probe": True},
        {"delta": random_delta(tiny_llava) * 1e4, "alpha": 1.0},
        {"delta": random_delta(tiny_llava), "probe": True, "reference": reference_of(tiny_llava)},
        {"probe": True, "reference": reference_of(tiny_llava)},
    ]

    def ask(number: int) -> Answer:
        return under_test.ask("x" * number, [picture(number)], **asked[number])

    alone = [projection(ask(number)) for number in range(4)]
    with under_test.held():
        together = [ask(number) for number in range(4)]
    assert [projection(answer) for answer in together] == [
        None if value is None else pytest.approx(value, rel=1e-4, abs=1e-5) for value in alone
    ]
    assert [value is None for value in alone] == [False, True, False, False]
    under_test.engine.drain(10)
    assert under_test.engine.stats().prefill_tokens["probe"] == 6


def test_what_is_asked_for_and_cannot_be_had_is_not_told(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test, image = start_engine(tiny_llava), picture(1)
    reference = reference_of(tiny_llava)
    assert projection(under_test.ask(PROMPT, [image], probe=True)) is None
    assert projection(under_test.ask(PROMPT, [image], reference=reference)) is None
    short = under_test.ask(PROMPT, [image], probe=True, reference=reference, max_tokens=1)
    assert projection(short) is None
    two = under_test.ask(PROMPT, [image], probe=True, reference=reference, max_tokens=2)
    assert projection(two) is not None
    nowhere = Reference(reference.text, 0.0 * reference.delta)
    assert projection(under_test.ask(PROMPT, [image], probe=True, reference=nowhere)) is None


def test_a_shift_that_could_not_be_measured_leaves_no_probe(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava)
    inputs = under_test.inputs(PROMPT, [picture(1)], "blank")
    assert inputs.pair is not None
    (blank,) = inputs.pair.corrupted.images
    broken = replace(blank, tensors={k: v * float("nan") for k, v in blank.tensors.items()})
    pair = replace(inputs.pair, corrupted=replace(inputs.pair.corrupted, images=(broken,)))
    answer = under_test.ask(
        "",
        inputs=replace(inputs, pair=pair),
        sample=sample_plan(),
        on_error="serve-unsteered",
        probe=True,
    ).wait()
    assert answer.applied.failure and projection(answer) is None


@pytest.mark.parametrize("decoder", ["eager", "auto"])
def test_a_probe_that_fails_hurts_nobody(
    tiny_llava: TinyModel, start_engine: Start, decoder: str
) -> None:
    """Its step runs again without it: here beside another row and a prompt."""
    under_test = start_engine(tiny_llava, decoder=decoder)
    under_test.stepper._pacer.budget = lambda *_: 512  # type: ignore[method-assign]
    expected = under_test.ask(PROMPT, [picture(1)]).wait()
    beside = under_test.ask("beside", [picture(2)], sample=sample_plan()).wait()
    late: list[Answer] = []

    def ask_beside(_event: object) -> None:
        if not late:
            late.append(under_test.ask("beside", [picture(2)], sample=sample_plan()))

    def break_down(batch: Batch) -> None:
        if any(chunk.end - chunk.start == 1 and chunk.wants_states for chunk in batch.chunks):
            raise RuntimeError

    with under_test.before_each_pass(break_down):
        answer = under_test.ask(
            PROMPT,
            [picture(1)],
            probe=True,
            reference=reference_of(tiny_llava),
            on_event=ask_beside,
        ).wait()
        assert projection(answer) is None
        late[0].wait()
    torch.testing.assert_close(answer.top(), expected.top(), **TOLERANCE)
    torch.testing.assert_close(late[0].top(), beside.top(), **TOLERANCE)
    assert under_test.engine.stats().failures == {"steps": 1, "hooks": 0}
    assert under_test.engine.status().state == "ready"


def test_a_reference_of_another_size_hurts_nobody(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava)
    wrong = Reference(torch.zeros(2, 7), torch.ones(2, 7))
    assert projection(under_test.ask(PROMPT, [picture(1)], probe=True, reference=wrong)) is None


def test_a_request_that_is_cancelled_before_its_probe_leaves_nothing(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava)

    def cancel(_event: object) -> None:
        under_test.engine.cancel(answer.request_id)

    with under_test.held():
        answer = under_test.ask(
            PROMPT,
            [picture(1)],
            probe=True,
            reference=reference_of(tiny_llava),
            on_event=cancel,
            max_tokens=200,
        )
    assert isinstance(answer.wait().terminal, Failed)
    assert under_test.stepper._probes == []
    assert isinstance(under_test.ask(PROMPT).wait().terminal, Finished)
    assert under_test.engine.stats().prefill_tokens["probe"] == 0


def test_a_prompts_cache_is_kept_for_one_step(tiny_llava: TinyModel, start_engine: Start) -> None:
    under_test = start_engine(tiny_llava)
    held: list[bool] = []
    actives: list[Any] = []
    admit = under_test.stepper.runner.admit

    def watch(active: Any) -> None:
        admit(active)
        actives.append(active)

    def look(_event: object) -> None:
        held.append(any(s.cache is not None or s.embeds is not None for s in actives[0].prompts))

    under_test.stepper.runner.admit = watch  # type: ignore[method-assign]
    under_test.ask(PROMPT, [picture(1)], sample=sample_plan(), probe=True, on_event=look).wait()
    wait_until(lambda: under_test.stepper.is_idle)
    assert held[:2] == [True, True] and not any(held[2:]), "dose, first token, then the others"
