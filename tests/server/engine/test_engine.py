"""The engine's life: every accepted request ends in exactly one terminal event."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from server.engine.cache import RowCache
from server.engine.engine import EmbeddedEngine, EngineConfig
from server.engine.types import (
    EngineError,
    Failed,
    Finished,
    InputError,
    NotAcceptingError,
    PromptTooLongError,
    QueueFullError,
)
from tests.server.engine.conftest import (
    Answer,
    EngineUnderTest,
    loaded,
    picture,
    random_delta,
)
from tests.tiny_models import TinyModel, build_tiny_llava

Start = Callable[..., EngineUnderTest]


def wait_until(holds: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.005)


@contextmanager
def slow_model(tiny: TinyModel, seconds: float = 0.02) -> Iterator[None]:
    """Every pass takes at least this long."""
    norm = tiny.model.get_decoder().norm
    handle = norm.register_forward_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        handle.remove()


def test_the_very_first_request_is_steered(start_engine: Start) -> None:
    """Pitfall 2: no warm-up is needed before the hooks act."""
    tiny = build_tiny_llava()
    delta = random_delta(tiny)
    first = start_engine(tiny).ask("Hi", [picture(1)], delta=delta).wait()
    later = start_engine(tiny).ask("Hi", [picture(1)]).wait()
    assert not torch.allclose(first.top(), later.top(), atol=1e-2)


def test_a_model_whose_layers_are_bypassed_is_not_ready() -> None:
    """Pitfall 2: the layers that carry the hooks are no longer the ones that run."""
    tiny = build_tiny_llava()
    decoder = tiny.model.get_decoder()
    engine = EmbeddedEngine(loaded(tiny), EngineConfig())
    decoder.layers = nn.ModuleList(build_tiny_llava().model.get_decoder().layers)
    with pytest.raises(EngineError, match="0 steering hooks fired in a pass over 3 layers"):
        engine.start()
    assert engine.status().state == "failed"


def test_a_model_with_renamed_layers_is_refused() -> None:
    tiny = build_tiny_llava()
    decoder = tiny.model.get_decoder()
    identified = loaded(tiny)
    decoder.blocks = decoder.layers
    del decoder.layers
    with pytest.raises(Exception, match="has no `layers` to steer"):
        EmbeddedEngine(identified, EngineConfig())


def test_a_model_that_passes_on_something_else_is_not_ready() -> None:
    """Pitfall 2: the hooks fire, but what they return is not what the next layer is given."""
    tiny = build_tiny_llava()
    layers = tiny.model.get_decoder().layers
    clean: list[torch.Tensor] = []
    layers[1].register_forward_hook(lambda _m, _a, hidden: clean.append(hidden))
    layers[2].register_forward_pre_hook(lambda _m, args: (clean[-1], *args[1:]))
    engine = EmbeddedEngine(loaded(tiny), EngineConfig())
    with pytest.raises(EngineError, match="canary: at layer 1 the hidden state moved by 0,"):
        engine.start()


def test_hooks_that_stop_firing_fail_the_engine_and_every_request(start_engine: Start) -> None:
    """Pitfall 2, in service: no further token is made, and nobody is left hanging."""
    tiny = build_tiny_llava()
    under_test = start_engine(tiny)
    decoder = tiny.model.get_decoder()
    with slow_model(tiny):
        answers = [under_test.ask("Hi", max_tokens=200) for _ in range(3)]
        wait_until(lambda: all(a.events for a in answers))
        decoder.layers[1]._forward_hooks.clear()
        for answer in answers:
            end = answer.wait().terminal
            assert isinstance(end, Failed) and end.kind == "engine"
            assert "2 steering hooks fired in a pass over 3 layers" in end.message
    assert under_test.engine.status().state == "failed"
    with pytest.raises(NotAcceptingError, match="failed"):
        under_test.ask("Hi")


def test_cancel_frees_the_row_at_the_next_step(tiny_llava: TinyModel, start_engine: Start) -> None:
    """Pitfall 15, the engine's side; a request that waits, prefills or runs."""
    under_test = start_engine(tiny_llava, max_rows=1, prefill_chunk=1)
    with slow_model(tiny_llava):
        running = under_test.ask("Hi", max_tokens=200)
        waiting = under_test.ask("Hi", max_tokens=200)
        wait_until(lambda: under_test.engine.status().num_running == 1)
        for answer in (waiting, running):
            under_test.engine.cancel(answer.request_id)
            end = answer.wait().terminal
            assert isinstance(end, Failed) and end.kind == "cancelled"
        wait_until(lambda: under_test.engine.status().num_running == 0)
        prefilling = under_test.ask("x" * 100, max_tokens=10)
        wait_until(lambda: under_test.engine.status().kv_tokens_reserved > 0)
        under_test.engine.cancel(prefilling.request_id)
        assert isinstance(prefilling.wait().terminal, Failed)
    assert isinstance(under_test.ask("Hi").wait().terminal, Finished)
    assert under_test.engine.status().kv_tokens_reserved == 0


def test_cancelling_the_unknown_and_the_ended_does_nothing(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava)
    answer = under_test.ask("Hi").wait()
    under_test.engine.cancel(answer.request_id)
    under_test.engine.cancel("never-heard-of")
    assert isinstance(under_test.ask("Hi").wait().terminal, Finished)
    assert isinstance(answer.terminal, Finished)


def test_a_request_that_can_never_fit_is_refused_with_both_lengths(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    """Pitfall 16."""
    under_test = start_engine(tiny_llava, max_model_len=128, max_rows=4, kv_tokens=256)
    inputs = under_test.inputs("x" * 20)
    prompt = len(inputs.token_ids)
    with pytest.raises(PromptTooLongError, match=rf"{prompt} tokens and up to 90 .* limit is 128"):
        under_test.ask("x" * 20, max_tokens=90)
    with pytest.raises(PromptTooLongError, match=r"limit is 64 \(kv_tokens, for n = 3\)"):
        under_test.ask("x" * 20, max_tokens=30, n=3)
    with pytest.raises(InputError, match="n is 5; at most 4 rows run"):
        under_test.ask("", max_tokens=10, n=5)
    assert isinstance(under_test.ask("", max_tokens=10, n=2).wait().terminal, Finished)


def test_a_full_queue_refuses_and_later_accepts(tiny_llava: TinyModel, start_engine: Start) -> None:
    """Pitfall 16."""
    under_test = start_engine(tiny_llava, max_rows=1, max_queue=2)
    with slow_model(tiny_llava):
        running = under_test.ask("Hi", max_tokens=30)
        wait_until(lambda: under_test.engine.status().num_running == 1)
        queued = [under_test.ask("Hi", max_tokens=2) for _ in range(2)]
        with pytest.raises(QueueFullError, match="3 requests are running or waiting already"):
            under_test.ask("Hi")
    for answer in [running, *queued]:
        assert isinstance(answer.wait().terminal, Finished)
    assert isinstance(under_test.ask("Hi").wait().terminal, Finished)


def test_requests_wait_for_memory_and_all_get_their_answer(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    """The KV budget holds two or three of the ten at a time; the slabs never exceed it."""
    budget = RowCache.footprint(3, 64)
    under_test = start_engine(tiny_llava, kv_tokens=budget, max_model_len=128)
    seen: list[int] = []
    answers = [
        under_test.ask(
            "Hi",
            max_tokens=90 if number % 3 == 0 else 30,
            on_event=lambda _e: seen.append(under_test.engine._runner._rows.size),
        )
        for number in range(10)
    ]
    for answer in answers:
        assert isinstance(answer.wait().terminal, Finished)
    assert RowCache.footprint(2, 64) <= max(seen) <= budget
    assert under_test.engine._runner._rows.size == 0


def test_a_request_times_out(tiny_llava: TinyModel, start_engine: Start) -> None:
    under_test = start_engine(tiny_llava)
    with slow_model(tiny_llava):
        end = under_test.ask("Hi", max_tokens=200, timeout_s=0.1).wait().terminal
    assert isinstance(end, Failed) and end.kind == "timeout"


def test_draining_finishes_what_runs_and_accepts_nothing_new(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava, max_rows=1)
    with slow_model(tiny_llava):
        answers = [under_test.ask("Hi", max_tokens=10) for _ in range(3)]
        draining = threading.Thread(target=under_test.engine.drain, args=(30,))
        draining.start()
        wait_until(lambda: under_test.engine.status().state == "draining")
        with pytest.raises(NotAcceptingError, match="draining"):
            under_test.ask("Hi")
        draining.join()
    for answer in answers:
        assert isinstance(answer.terminal, Finished)
    assert under_test.engine.status().state == "stopped"


def test_a_drain_that_takes_too_long_ends_the_requests(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava, max_rows=1)
    with slow_model(tiny_llava, 0.05):
        answers = [under_test.ask("Hi", max_tokens=200) for _ in range(3)]
        under_test.engine.drain(0.2)
    for answer in answers:
        assert isinstance(answer.terminal, Failed) and answer.terminal.kind == "draining"


def test_a_prompt_that_breaks_the_model_fails_alone(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    from dataclasses import replace

    under_test = start_engine(tiny_llava)
    inputs = under_test.inputs("Hi", [picture(1)])
    broken = {"pixel_values": inputs.image_tensors["pixel_values"].repeat(2, 1, 1, 1)}
    with slow_model(tiny_llava):
        neighbour = under_test.ask("Hi", max_tokens=30)
        end = under_test.ask("", inputs=replace(inputs, image_tensors=broken)).wait().terminal
    assert isinstance(end, Failed) and "4 image placeholders but 8 image features" in end.message
    assert isinstance(neighbour.wait().terminal, Finished)


def test_logits_that_are_not_numbers_end_the_request_and_leave_no_trace(
    start_engine: Start,
) -> None:
    """NaN left in a row's KV once reached the row's next tenant through the mask, as 0 * NaN."""
    tiny = build_tiny_llava()
    under_test = start_engine(tiny)
    expected = under_test.ask("Hi", [picture(1)]).wait()
    infinite = random_delta(tiny) * float("inf")
    with slow_model(tiny, 0.005):
        neighbour = under_test.ask("Hi", max_tokens=150)  # keeps the slabs in use
        for num in (1, 2):
            broken = under_test.ask("x" * 60, [picture(1)], delta=infinite, n=num).wait()
            assert isinstance(broken.terminal, Failed)
            assert "NaN or infinite" in broken.terminal.message
            again = under_test.ask("Hi", [picture(1)]).wait()
            torch.testing.assert_close(again.top(), expected.top(), atol=1e-4, rtol=1e-4)
    assert isinstance(neighbour.wait().terminal, Finished)


def test_a_pass_that_breaks_midway_fails_one_prompt_only(start_engine: Start) -> None:
    """The hooks that had fired were once counted into the next pass, which ended the engine."""
    tiny = build_tiny_llava()
    under_test = start_engine(tiny)
    broken: list[bool] = []

    def break_once(*_: Any) -> None:
        if not broken:
            broken.append(True)
            raise RuntimeError("secret detail of a library")

    handle = tiny.model.get_decoder().layers[2].register_forward_pre_hook(break_once)
    end = under_test.ask("Hi").wait().terminal
    handle.remove()
    assert isinstance(end, Failed) and end.message == "an internal error; see the log"
    assert isinstance(under_test.ask("Hi").wait().terminal, Finished)


def test_a_decode_that_breaks_ends_every_request_once(start_engine: Start) -> None:
    """A request that had left its row when the engine broke once got no terminal event."""
    tiny = build_tiny_llava()
    under_test = start_engine(tiny)

    def broken_move(*_: Any) -> None:
        raise RuntimeError("out of memory")

    under_test.engine._runner.move = broken_move  # type: ignore[method-assign]
    with slow_model(tiny):
        answers = [under_test.ask("Hi", max_tokens=k) for k in (4, 60, 60)]
        for answer in answers:
            assert isinstance(answer.wait().terminal, Failed)


def test_without_max_tokens_the_answer_may_fill_what_there_is(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    """With a small KV budget such requests were once refused, though shorter ones fitted."""
    under_test = start_engine(tiny_llava, max_model_len=128, kv_tokens=128)
    one = under_test.ask("Hi", max_tokens=None).wait().terminal
    two = under_test.ask("Hi", max_tokens=None, n=2).wait().terminal
    assert isinstance(one, Finished) and isinstance(two, Finished)
    assert one.prompt_tokens + one.completion_tokens == 128
    assert 2 * two.prompt_tokens + two.completion_tokens == 128


def test_a_budget_below_one_request_stops_the_start() -> None:
    with pytest.raises(EngineError, match="kv_tokens is 100; one request of max_model_len 128"):
        EngineConfig(max_model_len=128, kv_tokens=100)


def test_a_burst_that_fits_into_the_rows_is_not_refused(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    """max_queue once counted requests that were about to get a row at once."""
    under_test = start_engine(tiny_llava, max_rows=8, max_queue=1)
    with slow_model(tiny_llava):
        answers = [under_test.ask("Hi", max_tokens=3) for _ in range(9)]
    for answer in answers:
        assert isinstance(answer.wait().terminal, Finished)


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


def test_control_tokens_in_the_text_are_refused(tiny_model: TinyModel, start_engine: Start) -> None:
    under_test = start_engine(tiny_model)
    token = tiny_model.processor.image_token
    for smuggled in (token, "<|im_end|>", "<|im_start|>"):
        with pytest.raises(InputError, match="a control token of this model"):
            under_test.inputs(f"What is {smuggled}?", [picture(1)])
    under_test.inputs("What does <pad> or <s> mean in HTML?", [picture(1)])


def test_a_family_that_is_not_served_is_refused_by_name() -> None:
    tiny = build_tiny_llava()
    identified = loaded(tiny)
    tiny.model.config.model_type = "mllama"
    with pytest.raises(EngineError, match="'mllama' is not served; served are: LLaVA-1.5, Qwen2"):
        EmbeddedEngine(identified, EngineConfig())


@pytest.mark.parametrize(
    ("template", "renders"),
    [
        ("{{ messages[0].content + '!' }}", True),  # takes strings only
        ("{{ raise_exception('no system role') }}", False),
        ("{{ messages[0].nothing.at.all }}", False),
        ("{{ '' }}", False),  # an empty prompt
    ],
)
def test_templates_that_cannot_take_the_messages_are_the_clients_errors(
    start_engine: Start, template: str, renders: bool
) -> None:
    tiny = build_tiny_llava()
    tiny.processor.chat_template = template
    under_test = start_engine(tiny)
    if renders:
        assert len(under_test.inputs("Hi").token_ids) == 3
        return
    with pytest.raises(InputError):
        under_test.inputs("Hi")


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ("vision_config", {"model_type": "pixtral"}, "'pixtral' vision tower is not served"),
        ("text_config", {"sliding_window": 16}, "sliding-window attention is not served"),
        ("text_config", {"layer_types": ["sliding_attention"] * 3}, "sliding-window"),
    ],
)
def test_variants_that_the_suite_does_not_cover_are_refused(
    config: str, change: dict[str, Any], message: str
) -> None:
    tiny = build_tiny_llava()
    identified = loaded(tiny)
    for name, value in change.items():
        setattr(getattr(tiny.model.config, config), name, value)
    with pytest.raises(EngineError, match=message):
        EmbeddedEngine(identified, EngineConfig())


def test_bfloat16_steers_by_the_planned_amount(start_engine: Start) -> None:
    """Pitfall 8: the canary's 2 % holds in bfloat16, and the hidden states keep their dtype."""
    tiny = build_tiny_llava()
    half = TinyModel(tiny.name, tiny.model.to(torch.bfloat16), tiny.processor)
    seen: set[torch.dtype] = set()
    under_test = start_engine(half)
    layer = half.model.get_decoder().layers[1]
    handle = layer.register_forward_hook(lambda _m, _a, out: seen.add(out.dtype))
    answer = under_test.ask("Hi", [picture(1)], delta=random_delta(half)).wait()
    handle.remove()
    assert seen == {torch.bfloat16}
    assert isinstance(answer.terminal, Finished)


def test_answers_report_their_times(tiny_llava: TinyModel, start_engine: Start) -> None:
    under_test = start_engine(tiny_llava)
    steered = under_test.ask("Hi", [picture(1)], delta=random_delta(tiny_llava)).wait()
    plain = under_test.ask("Hi", [picture(1)]).wait()
    assert isinstance(steered.terminal, Finished) and isinstance(plain.terminal, Finished)
    times = steered.terminal.timings
    assert 0 < times.inject_s < times.e2e_s
    assert plain.terminal.timings.inject_s == 0
    assert 0 <= times.queue_s <= times.time_to_first_token_s <= times.e2e_s


def test_more_requests_than_rows_each_end_once_and_in_full(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava, max_rows=4)
    answers: list[Answer] = [
        under_test.ask("x" * k, [picture(k)] * (k % 2), max_tokens=k % 7 + 1) for k in range(40)
    ]
    for k, answer in enumerate(answers):
        assert isinstance(answer.wait().terminal, Finished)
        assert len(answer.token_ids()) == k % 7 + 1
