"""Admission, chunks and rows, without a model."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from server.engine.scheduler import FEW_TOKENS, PrefillChunk, Scheduler
from server.engine.sequences import ActiveRequest, Sequence
from server.engine.types import (
    EngineInputs,
    EngineRequest,
    ImageInput,
    Prompt,
    SamplingParams,
    ShiftPair,
)
from steering.methods import GateReader, RowSteering
from steering.plan import Gate, SteeringPlan
from tests.tiny_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
SAMPLE = SteeringPlan(mode="sample", alpha=1.0, reason=None)
GATED = replace(SAMPLE, gate=Gate(0), vector_id="0" * 64)


def prompt(length: int, *pictures: tuple[int, int]) -> Prompt:
    images = tuple(ImageInput("", {}, start, end, end - start) for start, end in pictures)
    return Prompt(tuple(range(length)), images, torch.arange(length)[None], length)


def active(
    own: Prompt, max_tokens: int, n: int = 1, pair: ShiftPair | None = None
) -> ActiveRequest:
    plan = SteeringPlan() if pair is None else SAMPLE
    params = SamplingParams(max_tokens, n=n)
    inputs = EngineInputs(own, pair)
    return ActiveRequest(EngineRequest("r", inputs, params, plan, RowSteering(), print), max_tokens)


def request(prompt_len: int, max_tokens: int = 10, n: int = 1) -> ActiveRequest:
    return active(prompt(prompt_len), max_tokens, n)


def sample_request(own_len: int, text_len: int, *pictures: tuple[int, int]) -> ActiveRequest:
    """It measures its own shift: three prompts, the corrupted one as long as its own."""
    pair = ShiftPair(prompt(own_len, *pictures), prompt(text_len))
    return active(prompt(own_len, *pictures), 10, pair=pair)


def scheduler(
    max_rows: int = 4,
    kv_tokens: int = 1000,
    on_admit: Callable[[ActiveRequest], None] = lambda _active: None,
    keep_pictures_whole: bool = False,
) -> Scheduler:
    """A row takes as many tokens as it is long."""
    return Scheduler(max_rows, kv_tokens, lambda length: length, on_admit, keep_pictures_whole)


def spans(chunks: list[PrefillChunk]) -> list[tuple[int, int]]:
    return [(chunk.start, chunk.end) for chunk in chunks]


def finish_prefill(sched: Scheduler, done: ActiveRequest) -> list[Sequence]:
    done.sequences = [Sequence(done, i, TOKENIZER) for i in range(done.num_rows)]
    sched.join(done)
    return done.sequences


def test_a_step_prefills_at_most_its_budget_and_fills_it() -> None:
    sched = scheduler()
    first, second = request(45), request(12)
    sched.add(first)
    sched.add(second)
    assert spans(sched.schedule(20)) == [(0, 20)]
    assert spans(sched.schedule(15)) == [(20, 35)]
    last, begun = sched.schedule(20)
    assert (last.start, last.end, last.is_last) == (35, 45, True)
    assert (begun.active, begun.start, begun.end, begun.is_last) == (second, 0, 10, False)


def test_several_prompts_share_a_step() -> None:
    sched = scheduler()
    for length in (5, 6, 7):
        sched.add(request(length))
    chunks = sched.schedule(100)
    assert spans(chunks) == [(0, 5), (0, 6), (0, 7)]
    assert all(chunk.is_last for chunk in chunks)


def test_requests_are_admitted_in_order_and_within_rows() -> None:
    sched = scheduler(max_rows=3)
    big, small = request(5, n=3), request(5)
    sched.add(request(5))
    sched.add(big)
    sched.add(small)
    (chunk,) = sched.schedule(100)
    assert list(sched.waiting) == [big, small], "nobody overtakes"
    (row,) = finish_prefill(sched, chunk.active)
    assert sched.schedule(100) == []
    sched.leave(row)
    assert [c.active for c in sched.schedule(100)] == [big]


def test_memory_counts_what_each_row_may_come_to_need() -> None:
    sched = scheduler(kv_tokens=100)
    forked = request(10, max_tokens=5, n=3)
    for each in (forked, request(30, max_tokens=20), request(1, max_tokens=5)):
        sched.add(each)
    assert [chunk.active for chunk in sched.schedule(100)][0] is forked
    assert sched.reserved == 3 * 15 + 50
    assert len(sched.waiting) == 1
    rows = finish_prefill(sched, forked)
    assert sched.reserved == 3 * 15 + 50
    sched.leave(rows[1])
    assert sched.reserved == 2 * 15 + 50
    assert len(sched.schedule(100)) == 1, "the last one fits now"


def test_rows_keep_their_order_when_one_leaves() -> None:
    sched = scheduler()
    forked = request(5, n=4)
    sched.add(forked)
    sched.schedule(20)
    a, b, c, d = finish_prefill(sched, forked)
    sched.leave(b)
    assert sched.rows == [a, c, d]


def test_a_dropped_request_leaves_no_trace() -> None:
    sched = scheduler()
    waiting, prefilling = request(5), request(50)
    sched.add(prefilling)
    sched.schedule(20)
    sched.add(waiting)
    for each in (waiting, prefilling):
        sched.drop(each)
    assert sched.is_idle and sched.reserved == 0


def test_admission_may_move_prompts_forward() -> None:
    """By what the prefix cache has of them; only the rest is prefilled."""

    def from_cache(admitted: ActiveRequest) -> None:
        for state in admitted.prompts:
            state.num_done = len(state.prompt) - 3

    sched = scheduler(on_admit=from_cache)
    sched.add(request(50))
    sched.add(sample_request(40, 30))
    assert spans(sched.schedule(20)) == [(47, 50), (37, 40), (27, 30), (37, 40)]


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 7, 1000])
def test_a_requests_three_prompts_end_in_one_step(budget: int) -> None:
    """Its own prompt's last token subtracts what the other two show in that very pass."""
    sched = scheduler()
    measuring = sample_request(9, 5)
    sched.add(measuring)
    steps = [sched.schedule(budget)]
    while not any(chunk.is_last for chunk in steps[-1]):
        assert steps[-1], "every step makes progress"
        steps.append(sched.schedule(budget))
    assert [chunk.state.role for chunk in steps[-1]] == ["corrupted", "text-only", "own"]
    assert all(chunk.is_last for chunk in steps[-1])
    assert sched.schedule(budget) == []


def test_a_request_that_cannot_end_leaves_its_last_tokens_and_the_budget_goes_on() -> None:
    sched = scheduler()
    sched.add(sample_request(5, 3))
    sched.add(request(20))
    assert spans(sched.schedule(12)) == [(0, 4), (0, 2), (0, 4), (0, 2)]
    assert spans(sched.schedule(12)) == [(4, 5), (2, 3), (4, 5), (2, 11)]


@pytest.mark.parametrize(
    ("keep_pictures_whole", "expected"),
    [(True, [(0, 30), (30, 50)]), (False, [(0, 20), (20, 40)])],
)
def test_a_picture_is_not_cut_where_its_tokens_see_each_other(
    keep_pictures_whole: bool, expected: list[tuple[int, int]]
) -> None:
    sched = scheduler(keep_pictures_whole=keep_pictures_whole)
    sched.add(active(prompt(50, (4, 9), (10, 30)), 5))
    assert spans([*sched.schedule(20), *sched.schedule(20)]) == expected


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 16, 100])
@pytest.mark.parametrize("keep_pictures_whole", [False, True])
def test_random_prompts_advance_in_order_and_within_the_budget(
    budget: int, keep_pictures_whole: bool
) -> None:
    chance = random.Random(budget)
    picture_len = 6

    def draw() -> ActiveRequest:
        length = chance.randrange(1, 40)
        starts = range(chance.randrange(4), length - picture_len, picture_len + 3)
        pictures = [(start, start + picture_len) for start in starts]
        if chance.random() < 0.5:
            return sample_request(length, chance.randrange(1, length + 1), *pictures)
        return active(prompt(length, *pictures), 5)

    def from_cache(admitted: ActiveRequest) -> None:
        for state in admitted.prompts:
            state.num_done = chance.choice([0, chance.randrange(len(state.prompt))])
            reached[id(state)] = state.num_done

    # Beyond the budget go at most the last tokens of a pair and the rest of three pictures.
    slack = 2 + 3 * picture_len * keep_pictures_whole
    reached: dict[int, int] = {}
    sched = scheduler(3, 10**6, from_cache, keep_pictures_whole)
    for _ in range(12):
        sched.add(draw())
    while not sched.is_idle:
        chunks = sched.schedule(budget)
        assert chunks, "every step makes progress"
        assert sum(chunk.end - chunk.start for chunk in chunks) <= budget + slack
        for chunk in chunks:
            assert reached[id(chunk.state)] == chunk.start < chunk.end
            reached[id(chunk.state)] = chunk.end
            if keep_pictures_whole:
                assert not any(i.start < chunk.end < i.end for i in chunk.state.prompt.images)
        for each in {id(chunk.active): chunk.active for chunk in chunks}.values():
            ended = [chunk.is_last for chunk in chunks if chunk.active is each]
            assert not any(ended) or len(ended) == len(each.prompts) and all(ended)
            if any(ended):
                for row in finish_prefill(sched, each):
                    sched.leave(row)


@pytest.mark.parametrize("budget", [1, 3, 5, 100])
def test_a_gate_is_read_before_the_own_prompts_last_token(budget: int) -> None:
    """Mode dataset: it runs to its end, and that token again. Mode sample: the pair's last tokens
    run together, the own prompt's alone in the next step."""
    reader = GateReader(Gate(0), torch.ones(4), 0.0)
    pair = ShiftPair(prompt(7), prompt(4))
    for plan, pairs in ((replace(GATED, mode="dataset", vector_id="0" * 64), None), (GATED, pair)):
        scheduler = Scheduler(4, 1000, lambda length: length)
        inputs = EngineInputs(prompt(7), pairs)
        steering = RowSteering(torch.ones(1, 4), gate=reader)
        request = EngineRequest("r", inputs, SamplingParams(9), plan, steering, print)
        asked = ActiveRequest(request, 9)
        scheduler.add(asked)
        chunks = scheduler.schedule(budget)
        seen: list[tuple[str, int]] = []  # whose tokens have run
        while not any(chunk.reads_gate for chunk in chunks):
            assert chunks and not any(chunk.ends_prefill for chunk in chunks)
            seen += tokens(chunks)
            chunks = scheduler.schedule(budget)
        read_with = tokens(chunks)
        own_end = 7 if pairs is None else 6
        expected = [("own", token) for token in range(own_end)]
        if pairs is not None:
            expected += [("corrupted", t) for t in range(7)] + [("text-only", t) for t in range(4)]
            assert {("corrupted", 6), ("text-only", 3)} <= {*read_with}
        assert sorted(seen + read_with) == sorted(expected)
        asked.go_on_through_gate(0.5)
        (last,) = scheduler.schedule(budget)
        assert (last.state, last.start, last.end) == (asked.own, 6, 7)
        assert last.ends_prefill and not last.reads_gate


def tokens(chunks: list[PrefillChunk]) -> list[tuple[str, int]]:
    """Whose they are, and where."""
    return [(c.state.role, token) for c in chunks for token in range(c.start, c.end)]


def test_how_many_requests_would_begin_to_decode_within_a_step() -> None:
    sched = scheduler(max_rows=4)
    for length in (30, 50, 21):
        sched.add(request(length, FEW_TOKENS))
    assert [sched.num_within(tokens) for tokens in (29, 30, 79, 80, 100, 101)] == [0, 1, 1, 2, 2, 3]
    sched.schedule(25)
    assert [sched.num_within(tokens) for tokens in (4, 5, 55, 76)] == [0, 1, 2, 3]
    finish_prefill(sched, sched.prefilling[0])
    sched.add(request(1, FEW_TOKENS, n=2))
    assert sched.num_within(1000) == 2, "three of four rows are free, two of these are taken"
    sample = scheduler()
    pair = ShiftPair(prompt(20), prompt(5))
    sample.add(active(prompt(20), FEW_TOKENS, pair=pair))
    assert (sample.num_within(44), sample.num_within(45)) == (0, 1)


def test_answers_that_are_over_at_once_or_have_no_room_do_not_make_a_step_long() -> None:
    """A client's many answers of one token would hold a stream up for as long as they come."""
    sched = scheduler(max_rows=9)
    for _ in range(8):
        sched.add(request(10, max_tokens=1))
    assert sched.num_within(1000) == 0
    crowded = scheduler(max_rows=9, kv_tokens=100)
    for _ in range(4):
        crowded.add(request(10, max_tokens=30))
    assert crowded.num_within(1000) == 2, "40 tokens each, of 100"
    crowded.schedule(10)
    assert crowded.num_within(1000) == 2
