"""The engine's life: every accepted request ends in exactly one terminal event."""

import gc
import random
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engine.batch import Batch, Decoder
from server.engine.decoders import DecoderChoice, build_decoder
from server.engine.engine import EmbeddedEngine, EngineConfig
from server.engine.prefix import BLOCK_LEN
from server.engine.sequences import ActiveRequest
from server.engine.types import (
    EngineError,
    EngineInputs,
    Failed,
    Finished,
    InputError,
    NotAcceptingError,
    OnError,
    PromptTooLongError,
    QueueFullError,
    RequestTimings,
    TextEvent,
)
from tests.server.engine.conftest import (
    TOLERANCE,
    Answer,
    EngineUnderTest,
    assert_equals_reference,
    loaded,
    picture,
    random_delta,
    sample_plan,
    wait_until,
)
from tests.tiny_models import TinyModel, build_tiny_llava

Start = Callable[..., EngineUnderTest]


def test_the_very_first_request_is_steered(start_engine: Start) -> None:
    """Pitfall 2: no warm-up is needed before the hooks act."""
    tiny = build_tiny_llava()
    delta = random_delta(tiny)
    first = start_engine(tiny).ask("Hi", [picture(1)], delta=delta).wait()
    later = start_engine(tiny).ask("Hi", [picture(1)]).wait()
    assert not torch.allclose(first.top(), later.top(), atol=1e-2)


def test_a_model_whose_layers_are_bypassed_is_not_ready(
    start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pitfall 2: the layers that carry the hooks are not the ones that run."""
    tiny = build_tiny_llava()

    def build(choice: DecoderChoice, model: Any, life: ExitStack) -> Decoder:
        decoder = build_decoder(choice, model, life)
        model.get_decoder().layers = build_tiny_llava().model.get_decoder().layers
        return decoder

    monkeypatch.setattr("server.engine.engine.build_decoder", build)
    with pytest.raises(
        EngineError, match="steering had its turn 0 times in 4 passes over 3 layers"
    ):
        start_engine(tiny, decoder="eager")


@pytest.mark.parametrize("decoder", ["eager", "auto"])
def test_a_model_with_renamed_layers_is_not_ready(decoder: DecoderChoice) -> None:
    """It runs as before, but what carries its layers is nothing that could be steered."""
    tiny = build_tiny_llava()
    engine = EmbeddedEngine(loaded(tiny), EngineConfig(decoder=decoder))
    layers = tuple(tiny.model.get_decoder().layers)
    del tiny.model.get_decoder().layers
    tiny.model.get_decoder().layers = layers
    with pytest.raises(EngineError, match="has no `layers` to steer"):
        engine.start()
    assert engine.status().state == "failed"


def test_a_model_that_passes_on_something_else_is_not_ready(start_engine: Start) -> None:
    """Pitfall 2: the hooks fire, but what they return is not what the next layer is given."""
    tiny = build_tiny_llava()
    layers = tiny.model.get_decoder().layers
    clean: list[torch.Tensor] = []
    layers[1].register_forward_hook(lambda _m, _a, hidden: clean.append(hidden))
    layers[2].register_forward_pre_hook(lambda _m, args: (clean[-1], *args[1:]))
    with pytest.raises(EngineError, match="canary: at layer 1 the hidden state moved by 0,"):
        start_engine(tiny, decoder="eager")


def test_hooks_that_stop_firing_fail_the_engine_and_every_request(start_engine: Start) -> None:
    """Pitfall 2, in service: no further token is made, and nobody is left hanging."""
    tiny = build_tiny_llava()
    under_test = start_engine(tiny, decoder="eager")
    decoder = tiny.model.get_decoder()
    with under_test.slow():
        answers = [under_test.ask("Hi", max_tokens=200) for _ in range(3)]
        wait_until(lambda: all(a.events for a in answers))
        decoder.layers[1]._forward_hooks.clear()
        for answer in answers:
            end = answer.wait().terminal
            assert isinstance(end, Failed) and end.kind == "engine"
            assert "steering had its turn 2 times in 1 passes over 3 layers" in end.message
    assert under_test.engine.status().state == "failed"
    with pytest.raises(NotAcceptingError, match="failed"):
        under_test.ask("Hi")


def test_cancel_frees_the_row_at_the_next_step(tiny_llava: TinyModel, start_engine: Start) -> None:
    """Pitfall 15, the engine's side; a request that waits, prefills or runs."""
    under_test = start_engine(tiny_llava, max_rows=1, prefill_chunk=1)
    with under_test.slow():
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
        assert under_test.engine.status().num_running == 1, "neither waiting nor running, once"
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
    under_test = start_engine(tiny_llava, max_model_len=512, max_rows=4, kv_tokens=1024)
    prompt = len(under_test.inputs("x" * 20).prompt)
    with pytest.raises(PromptTooLongError, match=rf"{prompt} tokens and up to 500 .* limit is 512"):
        under_test.ask("x" * 20, max_tokens=500)
    with pytest.raises(PromptTooLongError, match=r"limit is 256 \(kv_tokens, for n = 3\)"):
        under_test.ask("x" * 20, max_tokens=250, n=3)
    with pytest.raises(InputError, match="n is 5; at most 4 rows run"):
        under_test.ask("", max_tokens=10, n=5)
    assert isinstance(under_test.ask("", max_tokens=10, n=3).wait().terminal, Finished)


def test_a_full_queue_refuses_and_later_accepts(tiny_llava: TinyModel, start_engine: Start) -> None:
    """Pitfall 16."""
    under_test = start_engine(tiny_llava, max_rows=1, max_queue=2)
    with under_test.slow():
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
    """The KV budget holds two or three of the ten at a time; the rows never exceed it."""
    under_test = start_engine(tiny_llava, kv_tokens=3 * 256, max_model_len=512)
    seen: list[int] = []
    answers = [
        under_test.ask(
            "Hi",
            max_tokens=240 if number % 3 == 0 else 30,
            on_event=lambda _e: seen.append(under_test.stepper.runner._rows.size),
        )
        for number in range(10)
    ]
    for answer in answers:
        assert isinstance(answer.wait().terminal, Finished)
    assert 2 * 256 <= max(seen) <= 3 * 256
    assert under_test.stepper.runner._rows.size == 0


def test_a_request_times_out(tiny_llava: TinyModel, start_engine: Start) -> None:
    under_test = start_engine(tiny_llava)
    with under_test.slow():
        end = under_test.ask("Hi", max_tokens=200, timeout_s=0.1).wait().terminal
    assert isinstance(end, Failed) and end.kind == "timeout"


def test_draining_finishes_what_runs_and_accepts_nothing_new(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava, max_rows=1)
    with under_test.slow():
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
    with under_test.slow(0.05):
        answers = [under_test.ask("Hi", max_tokens=200) for _ in range(3)]
        under_test.engine.drain(0.2)
    for answer in answers:
        assert isinstance(answer.terminal, Failed) and answer.terminal.kind == "draining"


def test_a_prompt_that_cannot_be_embedded_fails_alone(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava)
    prompt = under_test.inputs("Hi", [picture(1)]).prompt
    (image,) = prompt.images
    tensors = {"pixel_values": image.tensors["pixel_values"].repeat(2, 1, 1, 1)}
    broken = replace(prompt, images=(replace(image, tensors=tensors),))
    with under_test.slow():
        neighbour = under_test.ask("Hi", max_tokens=30)
        end = under_test.ask("", inputs=EngineInputs(broken)).wait().terminal
    assert isinstance(end, Failed) and "4 image placeholders but 8 image features" in end.message
    assert isinstance(neighbour.wait().terminal, Finished)


@pytest.mark.parametrize("decoder", ["eager", "auto"])
@pytest.mark.parametrize("on_error", ["reject", "serve-unsteered"])
@pytest.mark.parametrize("how", ["picture", "numbers"])
def test_a_shift_that_cannot_be_measured_falls_under_on_error(
    tiny_llava: TinyModel, start_engine: Start, decoder: str, on_error: OnError, how: str
) -> None:
    """Never served unsteered in silence; the neighbours go on."""
    caches = {"prefix_cache_bytes": 1 << 20, "vision_cache_bytes": 1 << 20}
    under_test = start_engine(tiny_llava, decoder=decoder, **caches)
    prompt, images = "What is in the picture?", [picture(1)]
    inputs = under_test.inputs(prompt, images, "blank")
    assert inputs.pair is not None
    (blank,) = inputs.pair.corrupted.images
    tensors = dict(blank.tensors)
    if how == "picture":
        tensors = {name: torch.cat([tensor] * 2) for name, tensor in tensors.items()}
    else:
        tensors["pixel_values"] = torch.full_like(tensors["pixel_values"], float("nan"))
    broken = replace(blank, tensors=tensors, digest="broken")
    pair = replace(inputs.pair, corrupted=replace(inputs.pair.corrupted, images=(broken,)))
    plan = sample_plan()
    neighbour = under_test.ask("Hi", [picture(2)], sample=plan, max_tokens=30)
    answer = under_test.ask(
        prompt, inputs=replace(inputs, pair=pair), sample=plan, on_error=on_error
    ).wait()
    assert isinstance(neighbour.wait().terminal, Finished)
    if on_error == "reject":
        assert isinstance(answer.terminal, Failed)
        assert "steering failed" in answer.terminal.message
        assert not any(isinstance(event, TextEvent) for event in answer.events)
        return
    assert answer.applied.failure
    assert_equals_reference(tiny_llava, answer, prompt, images, None)


def test_a_shift_that_is_no_number_leaves_nothing_in_a_long_prompts_cache(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    """Served unsteered, the prompt ran again in chunks that saw, behind the mask, the NaN which the
    pass before had left at its end; the request failed with it."""
    under_test = start_engine(tiny_llava, max_model_len=1024, prefill_chunk=64)
    prompt, images = "y" * 450, [picture(1)]  # many keys: they are taken with the room behind them
    inputs = under_test.inputs(prompt, images, "blank")
    assert inputs.pair is not None
    (blank,) = inputs.pair.corrupted.images
    pixels = torch.full_like(blank.tensors["pixel_values"], float("nan"))
    broken = replace(blank, tensors={**blank.tensors, "pixel_values": pixels}, digest="broken")
    pair = replace(inputs.pair, corrupted=replace(inputs.pair.corrupted, images=(broken,)))
    answer = under_test.ask(
        prompt,
        inputs=replace(inputs, pair=pair),
        sample=sample_plan(),
        on_error="serve-unsteered",
    ).wait()
    assert "NaN" in (answer.applied.failure or "")
    assert_equals_reference(tiny_llava, answer, prompt, images, None)


def test_a_pair_that_fails_late_takes_back_what_its_own_prompt_is_about_to_run(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    """The own prompt's last chunk ran all the same, on the cache that had just been emptied: the
    answer was another one, and what the chunk computed went into the prefix cache."""
    under_test = start_engine(
        tiny_llava, max_model_len=1024, prefill_chunk=64, prefix_cache_bytes=1 << 22
    )
    images = [picture(1)]
    # All but the text-only prompt's last token is a whole number of the prefix cache's blocks, so
    # that this one token waits, without its embedding, while the own prompt goes ahead.
    lengths = (len(under_test.inputs("y" * num).prompt) for num in range(200, 216))
    prompt = "y" * next(num for num, length in enumerate(lengths, 200) if length % BLOCK_LEN == 1)
    under_test.ask(prompt, max_tokens=1).wait()
    inputs = under_test.inputs(prompt, images, "blank")
    assert inputs.pair is not None
    text_only = inputs.pair.text_only
    broken = replace(text_only, token_ids=(*text_only.token_ids[:-1], 10**9))
    answer = under_test.ask(
        prompt,
        inputs=replace(inputs, pair=replace(inputs.pair, text_only=broken)),
        sample=sample_plan(),
        on_error="serve-unsteered",
    ).wait()
    assert "cannot be embedded" in (answer.applied.failure or "")
    assert_equals_reference(tiny_llava, answer, prompt, images, None)
    again = under_test.ask(prompt, images).wait()
    assert_equals_reference(tiny_llava, again, prompt, images, None)


def test_logits_that_are_not_numbers_end_the_request_and_leave_no_trace(
    start_engine: Start,
) -> None:
    """NaN left in a row's KV once reached the row's next tenant through the mask, as 0 * NaN."""
    tiny = build_tiny_llava()
    under_test = start_engine(tiny)
    expected = under_test.ask("Hi", [picture(1)]).wait()
    infinite = random_delta(tiny) * float("inf")
    with under_test.slow(0.005):
        neighbour = under_test.ask("Hi", max_tokens=150)  # keeps the slabs in use
        for num in (1, 2):
            broken = under_test.ask("x" * 60, [picture(1)], delta=infinite, n=num).wait()
            assert isinstance(broken.terminal, Failed)
            assert "NaN or infinite" in broken.terminal.message
            again = under_test.ask("Hi", [picture(1)]).wait()
            torch.testing.assert_close(again.top(), expected.top(), atol=1e-4, rtol=1e-4)
    assert isinstance(neighbour.wait().terminal, Finished)


@pytest.mark.parametrize("decoder", ["eager", "auto"])
@pytest.mark.parametrize("level", ["dataset", "sample"])
def test_a_prompt_that_breaks_a_pass_fails_alone(
    tiny_llava: TinyModel, start_engine: Start, decoder: str, level: str
) -> None:
    """Those that were in its pass, prompts and rows, run again without it."""
    under_test = start_engine(tiny_llava, decoder=decoder)
    delta = random_delta(tiny_llava)
    steering: dict[str, Any] = {"delta": delta} if level == "dataset" else {"sample": sample_plan()}
    under_test.stepper._pacer.budget = lambda *_: 512  # type: ignore[method-assign]
    bad = len(under_test.inputs("what breaks it").prompt)
    together: list[int] = []

    def break_down(batch: Batch) -> None:
        if any(chunk.cache.length == bad for chunk in batch.chunks):
            together.append(len(batch.chunks) + len(batch.slabs))
            raise RuntimeError("secret detail of a library")

    alone = under_test.ask("Hi", [picture(1)], **steering).wait()
    row_alone = under_test.ask("x" * 30, max_tokens=40).wait()
    with under_test.before_each_pass(break_down):
        row = under_test.ask("x" * 30, max_tokens=40)
        with under_test.held():
            first = under_test.ask("Hi", [picture(1)], **steering)
            broken = under_test.ask("what breaks it")
            last = under_test.ask("Hi", [picture(1)], **steering)
        end = broken.wait().terminal
        for answer, expected in ((first, alone), (last, alone), (row, row_alone)):
            assert isinstance(answer.wait().terminal, Finished)
            torch.testing.assert_close(answer.top(), expected.top(), **TOLERANCE)
    assert isinstance(end, Failed) and end.message == "an internal error; see the log"
    assert together == [4 if level == "dataset" else 8, 1], "all together, then it alone"


def test_a_pass_that_breaks_beside_a_prompt_that_has_not_ended(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    """Run apart, that prompt has no logits yet; put beside the rows' they once ended the engine."""
    under_test = start_engine(tiny_llava)
    under_test.stepper._pacer.budget = lambda *_: 90  # type: ignore[method-assign]
    bad = len(under_test.inputs("what breaks it").prompt)
    num_chunks: list[int] = []

    def break_down(batch: Batch) -> None:
        if any(chunk.cache.length == bad for chunk in batch.chunks):
            num_chunks.append(len(batch.chunks))
            raise RuntimeError

    with under_test.before_each_pass(break_down):
        row = under_test.ask("Hi", max_tokens=60)
        with under_test.held():
            broken = under_test.ask("what breaks it")
            long = under_test.ask("x" * 150)
        assert isinstance(broken.wait().terminal, Failed)
        assert isinstance(long.wait().terminal, Finished)
        assert isinstance(row.wait().terminal, Finished)
    assert num_chunks == [2, 1]


@pytest.mark.parametrize("what", ["admit", "join"])
def test_a_request_for_which_there_is_no_memory_fails_alone(
    tiny_llava: TinyModel, start_engine: Start, what: str
) -> None:
    under_test = start_engine(tiny_llava)
    runner = under_test.stepper.runner
    work = getattr(runner, what)
    unlucky = len(under_test.inputs("x" * 4).prompt)

    def work_for_some(active: ActiveRequest) -> None:
        if active.prompt_len == unlucky:
            raise MemoryError
        work(active)

    setattr(runner, what, work_for_some)
    with under_test.held():
        answers = [under_test.ask("x" * k, n=2) for k in (3, 4, 5)]
    ends = [answer.wait().terminal for answer in answers]
    assert [type(end) for end in ends] == [Finished, Failed, Finished]
    assert under_test.engine.status().kv_tokens_reserved == 0


def test_a_pass_that_breaks_over_the_pair_falls_under_on_error(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava)

    def break_down(batch: Batch) -> None:
        if any(chunk.shift for chunk in batch.chunks):
            raise RuntimeError

    plain = under_test.ask("Hi", [picture(1)]).wait()
    with under_test.before_each_pass(break_down):
        refused = under_test.ask("Hi", [picture(1)], sample=sample_plan()).wait()
        served = under_test.ask(
            "Hi", [picture(1)], sample=sample_plan(), on_error="serve-unsteered"
        ).wait()
    assert isinstance(refused.terminal, Failed) and "steering failed" in refused.terminal.message
    assert served.applied.failure
    torch.testing.assert_close(served.top(), plain.top(), **TOLERANCE)


def test_a_pass_that_forgets_to_measure_ends_the_engine(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    """Never unsteered in silence."""
    under_test = start_engine(tiny_llava)
    decoder = under_test.stepper.runner._decoder
    run = decoder.run
    decoder.run = lambda batch: replace(run(batch), shifts={})  # type: ignore[method-assign]
    answer = under_test.ask("Hi", [picture(1)], sample=sample_plan()).wait()
    assert isinstance(answer.terminal, Failed)
    assert under_test.engine.status().state == "failed"


def test_a_pass_that_breaks_midway_leaves_nothing_behind(start_engine: Start) -> None:
    """The hooks that had fired were once counted into the next pass, which ended the engine."""
    tiny = build_tiny_llava()
    under_test = start_engine(tiny, decoder="eager")
    expected = under_test.ask("Hi").wait()
    broken: list[bool] = []

    def break_once(*_: Any) -> None:
        if not broken:
            broken.append(True)
            raise RuntimeError

    handle = tiny.model.get_decoder().layers[2].register_forward_pre_hook(break_once)
    answer = under_test.ask("Hi").wait()
    handle.remove()
    assert broken
    torch.testing.assert_close(answer.top(), expected.top(), **TOLERANCE)


def test_a_decode_that_breaks_ends_every_request_once(start_engine: Start) -> None:
    """A request that had left its row when the engine broke once got no terminal event."""
    tiny = build_tiny_llava()
    under_test = start_engine(tiny)

    def broken_leave(*_: Any) -> None:
        raise RuntimeError("out of memory")

    under_test.stepper.runner.leave = broken_leave  # type: ignore[assignment,method-assign]
    with under_test.slow():
        answers = [under_test.ask("Hi", max_tokens=k) for k in (4, 60, 60)]
        for answer in answers:
            assert isinstance(answer.wait().terminal, Failed)


def test_without_max_tokens_the_answer_may_fill_what_there_is(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    """With a small KV budget such requests were once refused, though shorter ones fitted."""
    under_test = start_engine(tiny_llava, max_model_len=300, kv_tokens=600)
    one = under_test.ask("Hi", max_tokens=None).wait().terminal
    two = under_test.ask("Hi", max_tokens=None, n=2).wait().terminal
    assert isinstance(one, Finished) and isinstance(two, Finished)
    assert one.prompt_tokens + one.completion_tokens == 300
    assert 2 * two.prompt_tokens + two.completion_tokens == 600
    with pytest.raises(PromptTooLongError, match="for n = 3"):
        under_test.ask("Hi", max_tokens=None, n=3)


def test_a_budget_below_one_request_stops_the_start() -> None:
    with pytest.raises(EngineError, match="kv_tokens is 100; one request of max_model_len 128"):
        EngineConfig(max_model_len=128, kv_tokens=100)
    assert EngineConfig(max_model_len=128, kv_tokens=128).kv_budget == 128


def test_a_burst_that_fits_into_the_rows_is_not_refused(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    """max_queue once counted requests that were about to get a row at once."""
    under_test = start_engine(tiny_llava, max_rows=8, max_queue=1)
    with under_test.slow():
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


def test_a_prompts_cache_is_given_back_when_it_has_its_row(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava)
    runner = under_test.stepper.runner
    caches: list[weakref.ref[Any]] = []
    alive: list[int] = []
    admit = runner.admit

    def watch(active: ActiveRequest) -> None:
        admit(active)
        caches.extend(weakref.ref(state.cache) for state in active.prompts)

    runner.admit = watch  # type: ignore[method-assign]
    under_test.ask(
        "Hi",
        [picture(1)],
        sample=sample_plan(),
        on_event=lambda _e: alive.append(sum(ref() is not None for ref in caches)),
    ).wait()
    assert len(caches) == 3
    assert alive[0] == 3 and not any(alive[2:]), "from the second token on"


def test_nothing_is_kept_of_requests_that_have_ended(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    """Random traffic with cancels and failures: the caches stay within their budgets, and when all
    have ended no prompt's keys and no slab but the shortest is left, which stays in place."""
    budgets = {"prefix_cache_bytes": 1 << 17, "vision_cache_bytes": 1 << 12}
    sizes = {"max_model_len": 512, "max_rows": 4, "prefill_chunk": 64}
    under_test = start_engine(tiny_llava, **sizes, **budgets)
    engine, runner = under_test.engine, under_test.stepper.runner
    chance = random.Random(5)
    held: list[weakref.ref[Any]] = []
    used: list[tuple[int, int]] = []
    admit = runner.admit

    def watch(active: ActiveRequest) -> None:
        admit(active)
        held.extend(weakref.ref(state.cache) for state in active.prompts)

    def look(_event: object) -> None:
        used.append((runner.prefix.num_bytes, runner.vision.num_bytes))

    runner.admit = watch  # type: ignore[method-assign]
    answers = []
    for number in range(60):
        images = [picture(chance.randrange(12)) for _ in range(chance.randrange(3))]
        steering: dict[str, Any] = chance.choice(
            [{}, {"delta": random_delta(tiny_llava)}, {"sample": sample_plan()}]
        )
        if not images or number % 10 == 9:
            steering = (
                {"delta": random_delta(tiny_llava) * float("inf")} if number % 10 == 9 else {}
            )
        params: dict[str, Any] = {
            "max_tokens": chance.randrange(1, 30),
            "n": chance.choice([1, 1, 2]),
        }
        prompt = "x" * chance.choice([300, chance.randrange(80), chance.randrange(80)])
        answers.append(under_test.ask(prompt, images, on_event=look, **steering, **params))
        if chance.random() < 0.3:
            engine.cancel(chance.choice(answers).request_id)
    ends = [answer.wait().terminal for answer in answers]
    assert sum(isinstance(end, Finished) for end in ends) >= 36
    assert sum(isinstance(end, Failed) for end in ends) >= 6
    assert max(prefix for prefix, _ in used) > 0.8 * budgets["prefix_cache_bytes"]
    assert max(prefix for prefix, _ in used) <= budgets["prefix_cache_bytes"]
    assert 0 < max(vision for _, vision in used) <= budgets["vision_cache_bytes"]
    under_test.ask("x" * 300, max_tokens=3, on_event=look).wait()  # the last is a long one
    kept = [*runner.prefix._blocks._tensors.values(), *runner.vision._features._tensors.values()]
    own_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept)
    assert own_bytes == runner.prefix.num_bytes + runner.vision.num_bytes
    gc.collect()
    assert [ref for ref in held if ref() is not None] == []
    status = engine.status()
    assert (status.num_running, status.num_waiting, status.kv_tokens_reserved) == (0, 0, 0)
    assert not under_test.stepper._accepted
    assert runner._rows.size == 0 and runner._rows.num_used <= status.kv_tokens_budget
