"""What every served family must satisfy: the engine computes what the bare model computes.

Compared on log-probabilities with a tolerance, never on text alone (texts of different batch
shapes may part on ties).
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.server.engine.conftest import (
    Answer,
    EngineUnderTest,
    conversation,
    picture,
    random_delta,
    reference_log_probs,
)
from tests.tiny_models import TinyModel

Start = Callable[..., EngineUnderTest]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}

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


def assert_equals_reference(
    tiny: TinyModel, answer: Answer, prompt: Any, images: list[Any], delta: Tensor | None
) -> None:
    """The greedy answer's tokens and log-probabilities are those of one cache-free pass."""
    messages = conversation(prompt, len(images))
    expected = reference_log_probs(tiny, messages, images, answer.token_ids(), delta)
    assert answer.token_ids() == expected.argmax(dim=-1).tolist()
    chosen = torch.tensor([token.logprob for token in answer.logprobs()])
    torch.testing.assert_close(chosen, expected.amax(dim=-1), **TOLERANCE)
    torch.testing.assert_close(answer.top(), expected.topk(5).values.flip(-1), **TOLERANCE)


@pytest.mark.parametrize("steered", [False, True], ids=["unsteered", "steered"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_an_answer_equals_the_bare_models(
    tiny_model: TinyModel, start_engine: Start, kind: str, steered: bool
) -> None:
    prompt, images = PROMPTS[kind]
    delta = random_delta(tiny_model) if steered else None
    answer = start_engine(tiny_model).ask(prompt, images, delta=delta, max_tokens=8).wait()
    assert_equals_reference(tiny_model, answer, prompt, images, delta)


@pytest.mark.parametrize("prefill_chunk", [1, 7, 512])
def test_prefill_in_chunks_changes_nothing(
    tiny_model: TinyModel, start_engine: Start, prefill_chunk: int
) -> None:
    """Pitfall 7: a one-token last chunk is still prefill, and its last token is steered."""
    prompt, images = PROMPTS["several turns"]
    delta = random_delta(tiny_model)
    under_test = start_engine(tiny_model, prefill_chunk=prefill_chunk)
    answer = under_test.ask(prompt, images, delta=delta).wait()
    assert_equals_reference(tiny_model, answer, prompt, images, delta)


@pytest.mark.parametrize("prefill_chunk", [1, 7, 512])
def test_the_steered_positions_are_the_last_of_the_prompt_and_every_generated_one(
    tiny_model: TinyModel, start_engine: Start, prefill_chunk: int
) -> None:
    """Pitfall 7, exactly: seen from outside, by hooks before and after the engine's own."""
    before: list[Tensor] = []
    after: list[Tensor] = []
    layer = tiny_model.model.get_decoder().layers[0]
    first = layer.register_forward_hook(lambda _m, _a, hidden: before.append(hidden.clone()))
    under_test = start_engine(tiny_model, prefill_chunk=prefill_chunk)
    last = layer.register_forward_hook(lambda _m, _a, hidden: after.append(hidden.clone()))
    try:
        before.clear()
        prompt, images = PROMPTS["one picture"]
        inputs = under_test.inputs(prompt, images)
        under_test.ask(prompt, images, delta=random_delta(tiny_model), max_tokens=4).wait()
    finally:
        first.remove()
        last.remove()
    unsteered, steered = torch.cat(before, dim=1)[0], torch.cat(after, dim=1)[0]
    moved = (unsteered != steered).any(dim=-1).nonzero()[:, 0].tolist()
    num_prompt = len(inputs.token_ids)
    assert moved == list(range(num_prompt - 1, num_prompt + 3))


def test_random_mixed_batches_leave_every_row_as_if_alone(
    tiny_model: TinyModel, start_engine: Start
) -> None:
    """Pitfall 3: random alpha, n, lengths and cancels, beside a neighbour with a 1e6 Delta."""
    chance = random.Random(7)
    under_test = start_engine(tiny_model, max_rows=6, prefill_chunk=40)
    huge = 1e6 * random_delta(tiny_model, 99)
    cases: list[tuple[Answer, str, list[Any], Tensor | None, dict[str, int]]] = []
    doomed: list[Answer] = []
    for number in range(24):
        images = [picture(number + k, (16 + 8 * k, 24)) for k in range(chance.randrange(3))]
        delta = chance.choice([None, random_delta(tiny_model, number, chance.uniform(0.05, 2))])
        prompt = "x" * chance.randrange(1, 40)
        params = {"max_tokens": chance.randrange(1, 12), "n": chance.choice([1, 1, 1, 2, 3])}
        if number % 4 == 3:
            doomed.append(under_test.ask(prompt, images, delta=huge, max_tokens=40))
            if chance.random() < 0.7:
                under_test.engine.cancel(doomed[-1].request_id)
        cases.append(
            (under_test.ask(prompt, images, delta=delta, **params), prompt, images, delta, params)
        )
    for answer in [*doomed, *(case[0] for case in cases)]:
        answer.wait()  # all of them: the reference must not run the model beside the engine
    for answer, prompt, images, delta, params in cases:
        messages = conversation(prompt, len(images))
        for index in range(params["n"]):
            ids = answer.token_ids(index)
            assert len(ids) == params["max_tokens"]
            expected = reference_log_probs(tiny_model, messages, images, ids, delta)
            torch.testing.assert_close(
                answer.top(index), expected.topk(5).values.flip(-1), **TOLERANCE
            )


@pytest.mark.parametrize("layer", range(3))
def test_the_sign_of_the_method(tiny_model: TinyModel, start_engine: Start, layer: int) -> None:
    """DESIGN 1: the image is the corrupted one, the shift its own, alpha 1, layer l alone: then
    the last token's state after layer l is the text-only prompt's."""
    from steering.hooks import record
    from steering.layers import decoder_layers
    from steering.ops import scheduled
    from steering.plan import Schedule

    under_test = start_engine(tiny_model)
    layers = decoder_layers(tiny_model.model)

    def last_states(images: list[Any], delta: Tensor | None) -> Tensor:
        with record(layers) as recorder:  # after the engine's hooks: sees what they leave
            under_test.ask("Hi there", images, delta=delta, max_tokens=1).wait()
            return recorder.last_hidden()[:, 0]

    text_only = last_states([], None)
    corrupted = last_states([picture(1)], None)
    shift = corrupted - text_only
    delta = scheduled(shift, Schedule(first=layer, last=layer))
    steered = last_states([picture(1)], delta)
    torch.testing.assert_close(steered[layer], text_only[layer], atol=1e-4, rtol=1e-4)
    assert torch.equal(steered[:layer], corrupted[:layer])


def test_a_delta_of_zero_is_exactly_no_delta(tiny_model: TinyModel, start_engine: Start) -> None:
    """Pitfall 4: alpha 0 beside a steered row gives the very logits of an unsteered run."""
    under_test = start_engine(tiny_model)
    prompt, images = PROMPTS["one picture"]
    plain = under_test.ask(prompt, images).wait()
    zero = under_test.ask(prompt, images, delta=random_delta(tiny_model), alpha=0.0).wait()
    assert [t.logprob for t in zero.logprobs()] == [t.logprob for t in plain.logprobs()]


def test_interleaving_alphas_on_one_prompt_leaves_no_trace(
    tiny_model: TinyModel, start_engine: Start
) -> None:
    """Pitfall 1: alpha 0, then 1, then 0 again on one prompt: the third equals the first."""
    under_test = start_engine(tiny_model)
    prompt, images = PROMPTS["several turns"]
    cold = under_test.ask(prompt, images).wait()
    steered = under_test.ask(prompt, images, delta=random_delta(tiny_model)).wait()
    again = under_test.ask(prompt, images).wait()
    assert torch.equal(cold.top(), again.top())
    assert not torch.allclose(cold.top(), steered.top(), atol=1e-2)


def test_usage_counts_image_tokens_as_the_processor_does(
    tiny_model: TinyModel, start_engine: Start
) -> None:
    prompt, images = PROMPTS["two pictures of different sizes"]
    under_test = start_engine(tiny_model)
    answer = under_test.ask(prompt, images, max_tokens=3, n=2).wait()
    text = tiny_model.processor.apply_chat_template(
        conversation(prompt, len(images)), add_generation_prompt=True, tokenize=False
    )
    processed = tiny_model.processor(text=[text], images=images)
    expected = processed["input_ids"][0]
    assert (answer.terminal.prompt_tokens, answer.terminal.completion_tokens) == (len(expected), 6)
    placeholder = tiny_model.model.config.image_token_id
    assert under_test.inputs(prompt, images).token_ids.count(placeholder) > 2
