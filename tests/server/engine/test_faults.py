"""What breaks a request, or a pass, ends those whom it concerns; the others go on."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engine.batch import Batch
from server.engine.prefix import BLOCK_LEN
from server.engine.sequences import ActiveRequest
from server.engine.types import (
    EngineInputs,
    Failed,
    Finished,
    OnError,
    TextEvent,
)
from tests.server.engine.conftest import (
    TOLERANCE,
    assert_equals_reference,
    picture,
    random_delta,
    sample_plan,
)
from tests.server.engine.under_test import EngineUnderTest
from tests.tiny_models import TinyModel, build_tiny_llava

Start = Callable[..., EngineUnderTest]


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


@pytest.mark.parametrize("decoder", ["fused", "auto"])
def test_a_shift_that_is_no_number_leaves_nothing_in_a_long_prompts_cache(
    tiny_llava: TinyModel, start_engine: Start, decoder: str
) -> None:
    """Served unsteered, the prompt ran again in chunks that saw, behind the mask, the NaN which the
    pass before had left at its end; the request failed with it."""
    under_test = start_engine(tiny_llava, max_model_len=1024, prefill_chunk=64, decoder=decoder)
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
