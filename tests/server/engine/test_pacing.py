"""The prefill budget against a machine of constant costs."""

import pytest

from server.engine.pacing import (
    LONG_STEP_EVERY,
    MAX_LONG_STEPS,
    MAX_STRETCH,
    MIN_BURST,
    MIN_CHUNK,
    Pacer,
)

NUM_ROWS = 4
DECODE_S = 0.02


def settled(token_s: float, max_chunk: int = 512, decode_s: float = DECODE_S) -> Pacer:
    """After 100 steps, every other one with as much prefill as was allotted."""
    pacer = Pacer(max_chunk)
    for _ in range(50):
        num_prefilled = pacer.budget(NUM_ROWS, 1, 0)
        pacer.observe(decode_s + num_prefilled * token_s, num_prefilled, NUM_ROWS)
        pacer.observe(decode_s, 0, NUM_ROWS)
    return pacer


@pytest.mark.parametrize("token_s", [0.00006, 0.0001, 0.0008])
def test_the_budget_becomes_what_keeps_a_step_within_its_stretch(token_s: float) -> None:
    """The first step's tokens look dearer than they are: no decode step was seen before it."""
    budget = settled(token_s).budget(NUM_ROWS, 1, 0)
    assert budget == pytest.approx((MAX_STRETCH - 1) * DECODE_S / token_s, rel=0.05)
    assert DECODE_S + budget * token_s <= MAX_STRETCH * DECODE_S + 1e-12


@pytest.mark.parametrize(("token_s", "expected"), [(1e-6, 512), (1.0, MIN_CHUNK)])
def test_the_budget_has_bounds(token_s: float, expected: int) -> None:
    """Prefill that is dear goes on in small chunks; a step never takes more than the maximum."""
    assert settled(token_s).budget(NUM_ROWS, 1, 0) == expected


def test_a_maximum_below_the_minimum_holds() -> None:
    assert settled(1.0, max_chunk=7).budget(NUM_ROWS, 1, 0) == 7


def test_while_no_row_waits_a_step_takes_the_whole_chunk() -> None:
    assert Pacer(512).budget(0, 1, 0) == 512
    assert settled(1.0).budget(0, 1, 0) == 512


def test_the_first_steps_are_small_and_one_of_them_shows_what_decoding_costs() -> None:
    pacer = Pacer(512)
    assert pacer.budget(NUM_ROWS, 1, 0) == 0
    pacer.observe(DECODE_S, 0, NUM_ROWS)
    assert pacer.budget(NUM_ROWS, 1, 0) == 4 * MIN_CHUNK
    pacer.observe(0.05, 100, 0)
    assert pacer.budget(NUM_ROWS, 1, 0) == int((MAX_STRETCH - 1) * DECODE_S / 0.0005)


def test_a_number_of_rows_that_never_ran_alone_is_taken_for_the_nearest_that_did() -> None:
    pacer = settled(0.0001)
    pacer.observe(2 * DECODE_S, 0, 4 * NUM_ROWS)
    known, more = pacer.budget(NUM_ROWS, 1, 0), pacer.budget(4 * NUM_ROWS, 1, 0)
    assert known == pytest.approx((MAX_STRETCH - 1) * 200, rel=0.05) and more == pytest.approx(
        2 * known, rel=0.05
    )
    assert pacer.budget(NUM_ROWS + 1, 1, 0) == known
    assert pacer.budget(4 * NUM_ROWS - 1, 1, 0) == more


def test_a_step_with_prefill_that_was_faster_than_one_without_counts_as_cheap_not_free() -> None:
    pacer = Pacer(512)
    pacer.observe(DECODE_S, 0, NUM_ROWS)
    pacer.observe(DECODE_S / 2, 100, NUM_ROWS)
    assert pacer.budget(NUM_ROWS, 1, 0) == 512


def test_one_step_that_was_held_up_does_not_stop_prefill() -> None:
    pacer = settled(0.0001)
    before = pacer.budget(NUM_ROWS, 1, 0)
    pacer.observe(8 * DECODE_S, before, NUM_ROWS)
    assert before / 3 < pacer.budget(NUM_ROWS, 1, 0) < before


def test_a_burst_gets_a_few_long_steps_and_then_waits_its_turn() -> None:
    pacer = settled(0.0001, max_chunk=2000)
    paced = pacer.budget(NUM_ROWS, 1, 0)
    for _ in range(5):  # what is granted and not used is not lost
        assert pacer.budget(NUM_ROWS, MIN_BURST, 0) == 2000
        pacer.observe(DECODE_S, 0, NUM_ROWS)
    for _ in range(MAX_LONG_STEPS):
        assert pacer.budget(NUM_ROWS, MIN_BURST, 0) == 2000
        pacer.observe(DECODE_S + 0.0001 * 2000, 2000, NUM_ROWS)
    for _ in range(LONG_STEP_EVERY):
        assert pacer.budget(NUM_ROWS, 5 * NUM_ROWS, 0) == pytest.approx(paced, rel=0.05)
        pacer.observe(DECODE_S, 0, NUM_ROWS)
    assert pacer.budget(NUM_ROWS, 5 * NUM_ROWS, 0) == 2000


@pytest.mark.parametrize(
    ("num_rows", "num_ready", "is_long"),
    [(1, MIN_BURST - 1, False), (1, MIN_BURST, True), (4, 7, False), (4, 8, True)],
)
def test_many_that_begin_with_one_step_do_not_wait_their_turn(
    num_rows: int, num_ready: int, is_long: bool
) -> None:
    """Sixteen chats that began together after another burst took fifteen short steps."""
    pacer = settled(0.0001, max_chunk=2000)
    for _ in range(MAX_LONG_STEPS):
        pacer.budget(NUM_ROWS, MIN_BURST, 0)
        pacer.observe(DECODE_S + 0.0001 * 2000, 2000, NUM_ROWS)
    for _ in range(3):  # as often as they come
        assert (pacer.budget(num_rows, num_ready, num_ready) == 2000) == is_long
        pacer.observe(DECODE_S + 0.0001 * 2000, 2000 if is_long else 100, num_rows)


def test_long_steps_that_were_not_granted_leave_no_debt() -> None:
    """Pictures that are kept whole made such steps; bursts then waited for thousands of others."""
    pacer = settled(0.0001, max_chunk=2000)
    for _ in range(50):
        assert pacer.budget(NUM_ROWS, 1, 0) < 600
        pacer.observe(DECODE_S + 0.0001 * 600, 600, NUM_ROWS)
    for _ in range(LONG_STEP_EVERY):
        pacer.observe(DECODE_S, 0, NUM_ROWS)
    assert pacer.budget(NUM_ROWS, MIN_BURST, 0) == 2000


@pytest.mark.parametrize(
    ("num_rows", "num_waiting", "is_burst"),
    [(1, 1, False), (1, 2, True), (4, 3, False), (4, 4, True), (12, 5, False), (12, 6, True)],
)
def test_what_a_burst_is(num_rows: int, num_waiting: int, is_burst: bool) -> None:
    pacer = settled(0.0001, max_chunk=2000)
    assert (pacer.budget(num_rows, num_waiting, 0) == 2000) == is_burst
