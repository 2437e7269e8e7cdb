"""What comes out of the engine: tokens, log-probabilities, reasons to end, times."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.engine.types import (
    Finished,
    RequestTimings,
)
from tests.server.engine.conftest import (
    TOLERANCE,
    assert_equals_reference,
    picture,
    random_delta,
    sample_plan,
)
from tests.server.engine.under_test import Answer, EngineUnderTest
from tests.tiny_models import TinyModel, build_tiny_llava

Start = Callable[..., EngineUnderTest]


def test_a_seed_gives_the_same_answer_alone_and_in_a_crowd(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava)
    params: dict[str, Any] = {"temperature": 1.0, "seed": 11, "n": 2, "max_tokens": 10}
    alone = under_test.ask("Hi", [picture(1)], **params).wait()
    crowd = [under_test.ask("x" * k, temperature=1.0, max_tokens=20) for k in range(3)]
    among = under_test.ask("Hi", [picture(1)], **params).wait()
    for index in range(2):
        assert among.token_ids(index) == alone.token_ids(index)
    assert alone.token_ids(0) != alone.token_ids(1)
    for answer in crowd:
        answer.wait()


def test_a_stop_string_ends_the_answer_before_it(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava)
    bias = {ord_token(tiny_llava, c): 50.0 for c in "ab"}
    params: dict[str, Any] = {"logit_bias": bias, "temperature": 1.0, "seed": 3}
    whole = under_test.ask("Hi", max_tokens=60, **params).wait()
    stop = "bab"
    assert stop in whole.text()
    cut = under_test.ask("Hi", max_tokens=60, stop=(stop,), **params).wait()
    assert cut.text() == whole.text().split(stop)[0]
    assert cut.finish_reason() == "stop"


def ord_token(tiny: TinyModel, character: str) -> int:
    (token,) = tiny.processor.tokenizer.encode(character, add_special_tokens=False)
    return int(token)


def test_the_end_token_ends_the_answer_and_is_not_text(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    eos = tiny_llava.model.generation_config.eos_token_id
    under_test = start_engine(tiny_llava)
    answer = under_test.ask("Hi", logit_bias={eos: 100.0}, ignore_eos=False, max_tokens=9).wait()
    assert (answer.text(), answer.finish_reason()) == ("", "stop")
    assert isinstance(answer.terminal, Finished) and answer.terminal.completion_tokens == 1
    ignored = under_test.ask("Hi", logit_bias={eos: 100.0}, max_tokens=9).wait()
    assert ignored.finish_reason() == "length"


@pytest.mark.parametrize("decoder", ["eager", "auto"])
def test_bfloat16_keeps_its_dtype_and_steers_by_what_was_planned(
    start_engine: Start, decoder: str
) -> None:
    """Pitfall 8: a float32 step promotes nothing; the fused decoder's table keeps its precision."""
    tiny = build_tiny_llava()
    half = TinyModel(tiny.name, tiny.model.to(torch.bfloat16), tiny.processor)
    under_test = start_engine(half, decoder=decoder)
    delta = 1e-3 * random_delta(half)
    seen: set[torch.dtype] = set()
    tables: list[torch.Tensor | None] = []
    layer = half.model.get_decoder().layers[1]  # the eager decoder's own
    handle = layer.register_forward_hook(lambda _m, _a, out: seen.add(out.dtype))
    answer = under_test.ask(
        "Hi",
        [picture(1)],
        delta=delta,
        on_event=lambda _e: tables.append(under_test.stepper.runner._deltas),
    ).wait()
    handle.remove()
    assert isinstance(answer.terminal, Finished)
    assert tables[-1] is not None
    table = tables[-1][:, 0]
    if decoder == "eager":
        assert seen == {torch.bfloat16} and table.dtype == torch.bfloat16
    else:
        assert torch.equal(table, delta)


@pytest.mark.parametrize("decoder", ["eager", "auto"])
def test_alpha_is_data(tiny_llava: TinyModel, start_engine: Start, decoder: str) -> None:
    """Pitfall 9: an alpha that changes after the first passes changes the answer, and back."""
    under_test = start_engine(tiny_llava, decoder=decoder)
    delta = random_delta(tiny_llava)
    tops: dict[float, list[torch.Tensor]] = {0.5: [], 1.0: [], 0.0: []}
    for alpha in (0.5, 0.5, 1.0, 0.0, 1.0, 0.5, 0.0):
        answer = under_test.ask("Hi", [picture(1)], delta=delta, alpha=alpha, max_tokens=4).wait()
        assert_equals_reference(tiny_llava, answer, "Hi", [picture(1)], alpha * delta)
        tops[alpha].append(answer.top())
    for runs in tops.values():
        for run in runs[1:]:
            torch.testing.assert_close(run, runs[0], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(tops[0.5][0], tops[1.0][0], atol=1e-2)
    assert not torch.allclose(tops[0.0][0], tops[1.0][0], atol=1e-2)


def test_sixteen_prompts_in_one_pass_are_as_one_by_one(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava, max_rows=16, prefill_chunk=4096)
    cases: list[dict[str, Any]] = [
        {},
        {"delta": random_delta(tiny_llava)},
        {"sample": sample_plan()},
    ]

    def ask(number: int) -> Answer:
        images = [picture(number)] * (number % 3)
        steering = cases[number % len(cases)] if images else {}
        return under_test.ask("x" * (5 * number), images, max_tokens=3, **steering)

    alone = [ask(number).wait() for number in range(16)]
    passes: list[int] = []
    with under_test.before_each_pass(lambda batch: passes.append(len(batch.chunks))):
        with under_test.held():
            at_once = [ask(number) for number in range(16)]
        for answer, expected in zip(at_once, alone, strict=True):
            torch.testing.assert_close(answer.wait().top(), expected.top(), **TOLERANCE)
    num_measuring = sum(number % 3 == 2 for number in range(16))
    assert max(passes) == 16 + 2 * num_measuring


@pytest.mark.parametrize("decoder", ["eager", "auto"])
def test_answers_report_their_times(
    tiny_llava: TinyModel, start_engine: Start, decoder: str
) -> None:
    under_test = start_engine(tiny_llava, decoder=decoder)

    def times(**steering: Any) -> RequestTimings:
        terminal = under_test.ask("Hi", [picture(1)], **steering).wait().terminal
        assert isinstance(terminal, Finished)
        timings = terminal.timings
        assert 0 <= timings.queue_s <= timings.time_to_first_token_s <= timings.e2e_s
        return timings

    plain, dataset = times(), times(delta=random_delta(tiny_llava))
    sample = times(sample=sample_plan())
    assert (plain.inject_s, plain.shift_s, dataset.shift_s) == (0, 0, 0)
    assert 0 < dataset.inject_s < dataset.e2e_s
    assert 0 < sample.inject_s < sample.e2e_s
    assert 0 < sample.shift_s < sample.prefill_s
