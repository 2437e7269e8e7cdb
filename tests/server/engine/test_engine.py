"""The engine's life: every accepted request ends in exactly one terminal event."""

import gc
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from server.engine.engine import EngineConfig
from server.engine.sequences import ActiveRequest
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
    picture,
    random_delta,
    sample_plan,
    wait_until,
)
from tests.server.engine.under_test import Answer, EngineUnderTest
from tests.tiny_models import TinyModel

Start = Callable[..., EngineUnderTest]


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
