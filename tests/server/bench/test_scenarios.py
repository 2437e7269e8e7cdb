"""Stalls, second turns and memory against a scripted server whose costs are known."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx
import pytest
from PIL import Image

from server.bench import exposition, second_turn, soak, stalls
from server.bench.effort import Effort
from server.bench.footprint import Budget, Footprint
from server.bench.load import Served
from server.bench.prompts import Prompts
from server.bench.target import BenchError, Target
from tests.server.bench.fake_server import IMAGE_TOKENS, Script, fake_server

PROMPTS = Prompts(Image.new("RGB", (48, 32), "teal"))
Result = TypeVar("Result")


def with_column(
    script: Script,
    scenario: Callable[[list[Served]], Awaitable[Result]],
    pid: int = 0,
    max_choices: int = 1,
) -> Result:
    async def go() -> Result:
        async with httpx.AsyncClient(timeout=10) as client:
            target = Target(
                "a", url, "the-model", dialect="ignore_eos", pid=pid, max_choices=max_choices
            )
            return await scenario([Served(client, target)])

    with fake_server(script) as url:
        return asyncio.run(go())


def run_stalls(script: Script, arrivals_at_once: int = 1) -> stalls.Stalls:
    steps: list[str] = []
    effort = Effort(streams=[2], max_tokens=30, arrivals=arrivals_at_once)

    async def scenario(columns: list[Served]) -> list[stalls.Stalls]:
        assert stalls.num_steps(columns, effort) == 4
        return await stalls.measure(columns, PROMPTS, effort, steps.append)

    [result] = with_column(script, scenario)
    assert len(steps) == 4  # a round of warm-up and one that counts, each without and with
    return result


def test_the_stall_of_an_arriving_prompt_is_seen_and_only_beside_it() -> None:
    """2,000 tokens at 50 us: 0.1 s in which no answer gets on."""
    result = run_stalls(Script(gap_s=0.01, prefill_s=50e-6))
    assert result.quiet is not None and result.disturbed is not None and result.worst is not None
    assert result.arrival_tokens is not None and result.num_failed == 0
    assert result.arrival_tokens.median == pytest.approx(2000, abs=5)
    assert result.num_arrivals >= 1
    assert result.quiet.p99 < 0.09 < result.disturbed.p99
    assert result.worst.median == pytest.approx(result.disturbed.p99 / result.quiet.median)


def test_arrivals_beyond_the_rows_wait_and_do_not_fail() -> None:
    """Two answers, two rows beside them, six arrivals."""
    script = Script(gap_s=0.01, prefill_s=10e-6, rows=4)
    result = run_stalls(script, arrivals_at_once=6)
    assert (result.arrivals_at_once, result.num_failed) == (6, 0), result.first_error
    assert result.num_arrivals > 2
    assert result.worst is not None and result.worst.median > 1.2
    assert script.num_broken == 0


def test_arrivals_that_an_overloaded_server_refuses_are_counted_and_not_repeated() -> None:
    """Two rows are taken by the answers, two arrivals wait, two are refused."""
    script = Script(gap_s=0.01, rows=2, max_waiting=2)
    result = run_stalls(script, arrivals_at_once=4)
    assert (result.num_failed, result.first_error[:4]) == (2, "429:"), result.first_error
    assert result.quiet is not None and result.disturbed is not None
    assert result.num_arrivals == 0 and result.arrival_tokens is None


def test_a_server_that_refuses_the_long_prompts_is_quoted() -> None:
    with pytest.raises(BenchError, match="a prompt of 100 words without a picture: 400"):
        run_stalls(Script(accepts=frozenset()))


def test_a_second_turn_repeats_the_picture_and_the_answer() -> None:
    script = Script(prefill_s=1e-3)
    [result] = with_column(
        script,
        lambda columns: second_turn.measure(
            columns, PROMPTS, Effort(streams=[1], rounds=3, max_tokens=5), lambda _: None
        ),
    )
    first, second = script.bodies[0]["messages"], script.bodies[1]["messages"]
    assert second[:1] == first and [m["role"] for m in second] == ["user", "assistant", "user"]
    assert second[1]["content"] == "word0 word1 word2 word3 word4 "
    assert result.ratio is not None and result.ratio.n == 3  # the first is not counted
    assert result.cached_tokens is not None and result.cached_tokens.median == IMAGE_TOKENS
    # 52 tokens, then 78 of which 40 are known: 38.
    assert 0.5 < result.ratio.median < 1.0
    assert result.num_failed == 0


def test_the_memory_of_a_process_is_read_while_requests_come_and_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(soak, "_CANCEL_WITHIN_S", 1.0)  # the longest answers take 0.64 s
    script = Script(gap_s=0.02)
    budget = Budget(10**6, 2 * 10**6, 10**6)
    [result] = with_column(
        script,
        lambda columns: soak.measure(
            columns,
            PROMPTS,
            Effort(streams=[12], num_requests=60, budgets={os.getpid(): budget}),
            lambda _: None,
        ),
        pid=os.getpid(),
        max_choices=8,
    )
    assert result.num_requests == 60 and result.num_failed == 0, result.first_error
    assert 0 < result.num_cancelled < 30
    assert 0 < script.num_broken <= result.num_cancelled
    assert result.ratio == result.peak_bytes / (4 * 10**6)
    assert [sample.num_requests for sample in result.samples] == list(range(1, 61))
    ratio = result.serving_ratio
    assert ratio is not None and ratio.n == 60 and 2 < ratio.low <= ratio.high <= result.ratio
    kinds = {
        (isinstance(body["messages"][0]["content"], str), body.get("n", 1) > 1)
        for body in script.bodies
    }
    assert kinds == {(True, False), (True, True), (False, False), (False, True)}
    assert max(body.get("n", 1) for body in script.bodies) == 4


@pytest.mark.parametrize("max_choices", [1, 2])
def test_no_request_asks_for_more_choices_than_the_server_takes(max_choices: int) -> None:
    """Requests with n = 4 to a server of one row came back 400 and were counted as failures."""
    script = Script()
    [result] = with_column(
        script,
        lambda columns: soak.measure(
            columns,
            PROMPTS,
            Effort(streams=[12], num_requests=60),
            lambda _: None,
        ),
        pid=os.getpid(),
        max_choices=max_choices,
    )
    assert result.num_failed == 0 and result.ratio is None and result.serving_ratio is None
    assert max(body.get("n", 1) for body in script.bodies) == max_choices


def test_a_process_that_has_ended_is_an_error() -> None:
    with pytest.raises(BenchError, match="has ended"):
        with_column(
            Script(),
            lambda columns: soak.measure(
                columns,
                PROMPTS,
                Effort(streams=[1]),
                lambda _: None,
            ),
            pid=2**22 + 1,  # over the largest process id
        )


def test_growth_is_the_slope_of_the_least_squares_line() -> None:
    assert soak.slope([1.0, 2.0, 3.0, 4.0], [5.0, 7.0, 9.0, 11.0]) == pytest.approx(2.0)
    assert soak.slope([0.0, 1.0, 2.0], [0.0, 3.0, 0.0]) == pytest.approx(0.0)
    assert soak.slope([1.0], [5.0]) == 0.0


def test_what_caches_hold_is_no_growth_beyond_them() -> None:
    filling = [soak.Sample(number, 1000 + 7 * number, 5 * number) for number in range(9)]
    assert soak._slope_beyond(filling) == pytest.approx(2.0)
    assert soak._slope_beyond([*filling, soak.Sample(9, 1063)]) is None
    text = """# TYPE deshift_cache_bytes gauge
deshift_cache_bytes{cache="prefix"} 100
deshift_cache_bytes{cache="vision"} 2.5e+01
deshift_cache_bytes_limit{cache="vision"} 7
"""
    assert exposition.total(text, soak.CACHE_BYTES) == 125.0
    assert exposition.total(text, "deshift_cache") is None


def test_the_peak_is_at_least_what_is_held_now() -> None:
    found = Footprint.of(os.getpid())
    assert found is not None and found.peak_bytes >= found.now_bytes > 10**7
