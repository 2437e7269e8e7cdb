"""What every served family must satisfy, by each of its decoders: the engine computes what the
bare model computes, steered or not, with caches or without.

Compared on log-probabilities with a tolerance, never on text alone (texts of different batch
shapes may part on ties).
"""

import random
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from server.engine.types import EngineError, TextEvent
from steering.corruption import Corruption, corrupt
from steering.methods import sample_delta
from steering.plan import Schedule, SteeringPlan
from tests.server.engine.conftest import (
    TOLERANCE,
    Serve,
    assert_equals_reference,
    picture,
    random_delta,
    reference_last_hidden,
    reference_log_probs,
    sample_plan,
)
from tests.server.engine.under_test import Answer, conversation
from tests.tiny_models import TinyModel

CACHES = {"prefix_cache_bytes": 1 << 24, "vision_cache_bytes": 1 << 24}

TURNS = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {
        "role": "user",
        "content": [{"type": "text", "text": "And "}, {"type": "image"}, {"type": "image"}],
    },
]
PROMPTS: dict[str, tuple[Any, list[Any]]] = {
    "text": ("Hello, who are you?", []),
    "one picture": ("What is in the picture?", [picture(1)]),
    "two pictures of different sizes": ("Compare.", [picture(1), picture(2, (48, 20))]),
    "several turns": (TURNS, [picture(1), picture(2), picture(3, (16, 40))]),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_an_answer_equals_the_bare_models(serve: Serve, kind: str) -> None:
    prompt, images = PROMPTS[kind]
    under_test = serve()
    for delta in (None, random_delta(under_test.tiny)):
        answer = under_test.ask(prompt, images, delta=delta, max_tokens=8).wait()
        assert_equals_reference(under_test.tiny, answer, prompt, images, delta)


@pytest.mark.parametrize(("prefill_chunk", "kind"), [(1, "one picture"), (7, "several turns")])
def test_prefill_in_chunks_changes_nothing(serve: Serve, prefill_chunk: int, kind: str) -> None:
    """Pitfall 7: a one-token last chunk is still prefill, and its last token is steered."""
    prompt, images = PROMPTS[kind]
    under_test = serve(prefill_chunk=prefill_chunk)
    delta = random_delta(under_test.tiny)
    answer = under_test.ask(prompt, images, delta=delta).wait()
    assert_equals_reference(under_test.tiny, answer, prompt, images, delta)


@pytest.mark.parametrize(
    ("prefill_chunk", "caches"),
    [(1, {}), (7, {}), (512, {}), (7, CACHES)],
    ids=["1", "7", "all", "7-cached"],
)
def test_the_steered_positions_are_the_last_of_the_prompt_and_every_generated_one(
    serve: Serve, prefill_chunk: int, caches: dict[str, int]
) -> None:
    """Pitfall 7, exactly: what is steered after layer 0 shows in the keys of layer 1."""
    prompt, images = PROMPTS["one picture"]
    under_test = serve(prefill_chunk=prefill_chunk, **caches)
    inputs = under_test.inputs(prompt, images)
    num_prompt = len(inputs.prompt)
    runner = under_test.stepper.runner
    keys: list[Tensor] = []

    def look(event: object) -> None:
        if isinstance(event, TextEvent):
            keys.append(runner._rows._slabs[256].get(0, num_prompt + 3)[1, 0])

    for delta in (None, random_delta(under_test.tiny)):
        bias = {65: 1e4}  # the same answer, so that steering alone makes the difference
        params: dict[str, Any] = {"max_tokens": 4, "logit_bias": bias}
        under_test.ask(prompt, images, delta=delta, on_event=look, **params).wait()
    plain, steered = keys[3], keys[7]  # as the last of four tokens came
    moved = (plain - steered).abs().amax(dim=(0, 2)) > 1e-5
    assert moved.nonzero()[:, 0].tolist() == list(range(num_prompt - 1, num_prompt + 3))


def test_random_mixed_batches_leave_every_row_as_if_alone(serve: Serve) -> None:
    """Pitfalls 3 and 6: random modes, alpha, n, lengths and cancels, caches on, beside a neighbour
    with a 1e6 Delta."""
    chance = random.Random(7)
    under_test = serve(max_rows=6, prefill_chunk=40, **CACHES)
    tiny = under_test.tiny
    huge = 1e6 * random_delta(tiny, 99)
    cases: list[tuple[Answer, str, list[Any], Tensor | SteeringPlan | None, dict[str, int]]] = []
    doomed: list[Answer] = []
    for number in range(24):
        images = [picture(number % 5 + k, (16 + 8 * k, 24)) for k in range(chance.randrange(3))]
        steering: Tensor | SteeringPlan | None = chance.choice(
            [None, random_delta(tiny, number, chance.uniform(0.05, 2)), sample_plan()]
        )
        if not images and isinstance(steering, SteeringPlan):
            steering = None
        prompt = "x" * chance.randrange(1, 40)
        params = {"max_tokens": chance.randrange(1, 12), "n": chance.choice([1, 1, 1, 2, 3])}
        if number % 4 == 3:
            doomed.append(under_test.ask(prompt, images, delta=huge, max_tokens=40))
            if chance.random() < 0.7:
                under_test.engine.cancel(doomed[-1].request_id)
        how = {"sample": steering} if isinstance(steering, SteeringPlan) else {"delta": steering}
        answer = under_test.ask(prompt, images, **how, **params)
        cases.append((answer, prompt, images, steering, params))
    for answer in [*doomed, *(case[0] for case in cases)]:
        answer.wait()  # all of them: the reference must not run the model beside the engine
    for answer, prompt, images, steering, params in cases:
        messages = conversation(prompt, len(images))
        delta = steering
        if isinstance(steering, SteeringPlan):
            delta = reference_shift(tiny, messages, images, steering)
        assert not isinstance(delta, SteeringPlan)
        for index in range(params["n"]):
            ids = answer.token_ids(index)
            assert len(ids) == params["max_tokens"]
            expected = reference_log_probs(tiny, messages, images, ids, delta)
            torch.testing.assert_close(
                answer.top(index), expected.topk(5).values.flip(-1), **TOLERANCE
            )


def test_the_sign_of_the_method(serve: Serve) -> None:
    """DESIGN 1: the image is the corrupted one, alpha 1, layer l alone: then the state after
    layer l is the text-only prompt's. With no layer above l its logits are, too."""
    under_test = serve()
    tiny = under_test.tiny
    blank = Image.new("RGB", (24, 16), "white")
    shift = reference_last_hidden(tiny, conversation("Hi there", 1), [blank])
    shift -= reference_last_hidden(tiny, conversation("Hi there"), [])
    seen: list[Tensor] = []
    for layer in range(3):
        plan = sample_plan(alpha=1.0, schedule=Schedule(first=layer, last=layer))
        seen.clear()
        steered = under_test.ask(
            "Hi there",
            [blank],
            sample=plan,
            max_tokens=2,
            on_event=lambda _e: seen.append(under_test.stepper.runner._deltas),
        ).wait()
        table = seen[-1][:, 0]  # what the one row subtracts from its generated token
        torch.testing.assert_close(table[layer].float(), shift[layer], **TOLERANCE)
        assert not table[[k for k in range(3) if k != layer]].any()
    plain = under_test.ask("Hi there", max_tokens=2).wait()
    torch.testing.assert_close(steered.top()[0], plain.top()[0], **TOLERANCE)


# Sample level


def text_only(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**message, "content": [part for part in message["content"] if part["type"] == "text"]}
        for message in messages
    ]


def reference_shift(
    tiny: TinyModel, messages: list[dict[str, Any]], images: list[Any], plan: SteeringPlan
) -> Tensor:
    """What the plan subtracts, from two passes of the bare model without a cache."""
    meaningless = [corrupt(image, plan.corruption) for image in images]
    corrupted = reference_last_hidden(tiny, messages, meaningless)
    return sample_delta(plan, corrupted, reference_last_hidden(tiny, text_only(messages), []))


@pytest.mark.parametrize(
    ("kind", "corruption"),
    [
        ("one picture", "gray"),
        ("two pictures of different sizes", "noise"),
        ("two pictures of different sizes", "mean-colour"),
        ("several turns", "blank"),
    ],
)
def test_the_sample_level_subtracts_the_requests_own_shift(
    serve: Serve, kind: str, corruption: Corruption
) -> None:
    prompt, images = PROMPTS[kind]
    under_test = serve()
    plan = sample_plan(corruption=corruption)
    answer = under_test.ask(prompt, images, sample=plan).wait()
    delta = reference_shift(under_test.tiny, conversation(prompt, len(images)), images, plan)
    assert delta.norm() > 0.1, "the corrupted pictures shift nothing: the test would show nothing"
    assert_equals_reference(under_test.tiny, answer, prompt, images, delta)


@pytest.mark.parametrize(
    ("prefill_chunk", "schedule", "kind"),
    [
        (1, "all", "one picture"),
        (7, "incremental", "several turns"),
        (512, "range:1-2", "several turns"),
    ],
)
def test_the_sample_level_in_chunks_and_from_the_cache(
    serve: Serve, prefill_chunk: int, schedule: str, kind: str
) -> None:
    """Pitfall 6: the shift of a request from cold caches and from warm ones is the same."""
    prompt, images = PROMPTS[kind]
    under_test = serve(prefill_chunk=prefill_chunk, **CACHES)
    plan = sample_plan(schedule=Schedule.parse(schedule))
    messages = conversation(prompt, len(images))
    delta = reference_shift(under_test.tiny, messages, images, plan)
    cold = under_test.ask(prompt, images, sample=plan).wait()
    warm = under_test.ask(prompt, images, sample=plan).wait()
    assert cold.cached_tokens == 0 < warm.cached_tokens
    for answer in (cold, warm):
        assert_equals_reference(under_test.tiny, answer, prompt, images, delta)


def test_a_shift_does_not_depend_on_its_own_alpha_or_on_neighbours(serve: Serve) -> None:
    """Pitfall 6: it is measured in the unsteered model."""
    under_test = serve(**CACHES)
    tables: list[Tensor] = []

    def look(_event: object) -> None:
        tables.append(under_test.stepper.runner._deltas)

    for alpha in (0.01, 2.0):
        plan = sample_plan(alpha=alpha)
        under_test.ask("Hi", [picture(1)], sample=plan, max_tokens=2, on_event=look).wait()
        tables[-1] = tables[-1] / alpha
    weak, strong = tables[len(tables) // 2 - 1], tables[-1]
    torch.testing.assert_close(weak, strong, atol=1e-3, rtol=1e-3)


def test_a_dose_over_the_cap_is_scaled_down_layer_by_layer(serve: Serve) -> None:
    under_test = serve()
    prompt, images = PROMPTS["one picture"]
    plan = sample_plan(alpha=5.0, max_relative_dose=0.02)
    answer = under_test.ask(prompt, images, sample=plan).wait()
    assert answer.applied.relative_dose == pytest.approx(0.02, rel=1e-3)
    delta = reference_shift(under_test.tiny, conversation(prompt, 1), images, plan)
    assert_equals_reference(under_test.tiny, answer, prompt, images, delta)


# Caches


def test_the_prefix_cache_knows_no_alpha(serve: Serve) -> None:
    """Pitfall 1: A (alpha 0), B (alpha 1), A again; hits happen and A's logits are a cold A's."""
    under_test = serve(**CACHES)
    tiny = under_test.tiny
    prompt, images = PROMPTS["several turns"]
    delta = random_delta(tiny)
    plan = sample_plan()
    first = under_test.ask(prompt, images).wait()
    assert first.cached_tokens == 0
    for steering in ({"delta": delta}, {}, {"sample": plan}, {}, {"delta": delta}):
        answer = under_test.ask(prompt, images, **steering).wait()
        assert answer.cached_tokens > 0
        expected = steering.get("delta")
        if "sample" in steering:
            expected = reference_shift(tiny, prompt, images, plan)
        assert_equals_reference(tiny, answer, prompt, images, expected)


def test_a_second_turn_reuses_the_first(serve: Serve) -> None:
    under_test = serve(**CACHES)
    first = [TURNS[0], TURNS[1]]
    under_test.ask(first, [picture(1)]).wait()
    later = [*first, TURNS[2], {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    answer = under_test.ask(later, [picture(1)]).wait()
    end_of_picture = under_test.inputs(later, [picture(1)]).prompt.images[0].end
    assert answer.cached_tokens >= end_of_picture
    assert_equals_reference(under_test.tiny, answer, later, [picture(1)], None)


def test_caches_are_a_tenants_own_but_the_blank_picture_is_everybodys(serve: Serve) -> None:
    under_test = serve(**CACHES)
    prompt, images = PROMPTS["one picture"]
    plan = sample_plan()
    under_test.ask(prompt, images, sample=plan, namespace="a").wait()
    runner = under_test.stepper.runner
    before = runner.prefix.hit_tokens["shift"]
    other = under_test.ask(prompt, images, sample=plan, namespace="b").wait()
    assert other.cached_tokens == 0
    inputs = under_test.inputs(prompt, images, "blank")
    assert inputs.pair is not None
    assert runner.prefix.hit_tokens["shift"] - before == inputs.pair.corrupted.shared_len
    same = under_test.ask(prompt, images, sample=plan, namespace="b").wait()
    assert same.cached_tokens > 0
    torch.testing.assert_close(same.top(), other.top(), **TOLERANCE)


def test_another_picture_of_the_same_bytes_is_another_picture(serve: Serve) -> None:
    """Pitfall 11: 24 x 16 and 16 x 24 of the same bytes, where both make as many tokens."""
    under_test = serve(**CACHES)
    wide = picture(1, (24, 16))
    tall = Image.frombytes("RGB", (16, 24), wide.tobytes())
    for image in (wide, tall, wide):
        answer = under_test.ask("Hi", [image]).wait()
        assert_equals_reference(under_test.tiny, answer, "Hi", [image], None)


def test_a_decoder_that_computes_something_else_is_refused(
    served: tuple[TinyModel, str], start_engine: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-check: a forgotten picture, say, stops the start."""
    monkeypatch.setattr(
        "server.engine.selfcheck.encode_image",
        lambda model, image: torch.zeros(
            image.num_features, model.config.get_text_config().hidden_size
        ),
    )
    with pytest.raises(EngineError, match="is not served: the engine's logits differ"):
        start_engine(served[0], decoder=served[1])
