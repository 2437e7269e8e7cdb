"""Admission and rows, without a model."""

import torch

from server.engine.cache import KVShape, PromptCache, RowCache
from server.engine.scheduler import RowMove, Scheduler
from server.engine.sequences import ActiveRequest, Sequence
from server.engine.types import EngineInputs, EngineRequest, SamplingParams
from steering.plan import SteeringPlan
from tests.tiny_models import byte_tokenizer

TOKENIZER = byte_tokenizer()


def request(prompt_len: int, max_tokens: int = 10, n: int = 1) -> ActiveRequest:
    inputs = EngineInputs(tuple(range(prompt_len)), {}, torch.zeros(1, prompt_len), prompt_len)
    params = SamplingParams(max_tokens, n=n)
    request = EngineRequest("r", inputs, params, SteeringPlan(), None, print)
    return ActiveRequest(request, max_tokens)


def scheduler(max_rows: int = 4, kv_tokens: int = 1000, prefill_chunk: int = 20) -> Scheduler:
    return Scheduler(max_rows, kv_tokens, prefill_chunk, lambda rows, length: rows * length)


def spans(sched: Scheduler) -> list[tuple[int, int]]:
    return [(chunk.start, chunk.end) for chunk in sched.schedule()]


def finish_prefill(sched: Scheduler, active: ActiveRequest) -> list[Sequence]:
    active.sequences = [Sequence(active, i, TOKENIZER) for i in range(active.num_rows)]
    sched.join(active)
    return active.sequences


def test_a_step_prefills_at_most_its_budget_and_fills_it() -> None:
    sched = scheduler()
    first, second = request(45), request(12)
    sched.add(first)
    sched.add(second)
    assert spans(sched) == [(0, 20)]
    assert spans(sched) == [(20, 40)]
    last, begun = sched.schedule()
    assert (last.start, last.end, last.is_last) == (40, 45, True)
    assert (begun.active, begun.start, begun.end, begun.is_last) == (second, 0, 12, True)


def test_requests_are_admitted_in_order_and_within_rows() -> None:
    sched = scheduler(max_rows=3, prefill_chunk=100)
    big, small = request(5, n=3), request(5)
    sched.add(request(5))
    sched.add(big)
    sched.add(small)
    (chunk,) = sched.schedule()
    assert list(sched.waiting) == [big, small], "nobody overtakes"
    (row,) = finish_prefill(sched, chunk.active)
    assert sched.schedule() == []
    sched.leave(row)
    assert [c.active for c in sched.schedule()] == [big]


def test_memory_counts_every_row_at_the_longest_rows_length() -> None:
    sched = scheduler(kv_tokens=100, prefill_chunk=100)
    sched.add(request(10, max_tokens=20))
    sched.add(request(30, max_tokens=20))
    sched.add(request(1, max_tokens=1))
    assert len(sched.schedule()) == 2
    assert sched.reserved() == (2, 50)
    assert len(sched.waiting) == 1


def test_rows_stay_dense_when_one_leaves() -> None:
    sched = scheduler()
    active = request(5, n=4)
    sched.add(active)
    sched.schedule()
    a, b, c, d = finish_prefill(sched, active)
    assert sched.leave(b) == RowMove(source=3, target=1)
    assert sched.rows == [a, d, c]
    assert sched.leave(c) is None
    assert sched.leave(a) == RowMove(source=1, target=0)
    assert sched.rows == [d]


def test_a_dropped_request_leaves_no_trace() -> None:
    sched = scheduler()
    waiting, prefilling = request(5), request(50)
    sched.add(prefilling)
    sched.schedule()
    sched.add(waiting)
    for active in (waiting, prefilling):
        sched.drop(active)
    assert sched.is_idle and sched.reserved() == (0, 0)


SHAPE = KVShape(1, 1, 2, torch.float32, torch.device("cpu"))


def filled(length: int, value: float) -> PromptCache:
    prompt = PromptCache(SHAPE, length)
    prompt.begin(0)
    prompt.update(torch.full((1, 1, length, 2), value), torch.full((1, 1, length, 2), -value), 0)
    return prompt


def test_growing_the_row_cache_keeps_what_is_there() -> None:
    rows = RowCache(SHAPE)
    rows.fit(1, 10)
    rows.insert(0, filled(10, 1.0))
    rows.fit(3, 100)
    rows.insert(2, filled(80, 3.0))
    rows.move(2, 1, 80)
    mask = rows.begin(torch.tensor([10, 80, 80]))
    assert mask.shape == (3, 1, 1, 81)
    assert mask[:, 0, 0].sum(dim=-1).tolist() == [11, 81, 81]
    fresh = torch.tensor([7.0, 8.0, 9.0])[:, None, None, None].expand(3, 1, 1, 2)
    keys, values = rows.update(fresh, -fresh, 0)
    assert keys.shape == values.shape == (3, 1, 81, 2)
    assert keys[0, 0, :, 0].tolist() == [1.0] * 10 + [7.0] + [0.0] * 70
    assert keys[1, 0, :, 0].tolist() == [3.0] * 80 + [8.0]
    assert values[2, 0, :, 0].tolist() == [-3.0] * 80 + [-9.0]


def test_the_footprint_rounds_up_to_whole_steps() -> None:
    assert RowCache.footprint(2, 64) == 128
    assert RowCache.footprint(2, 65) == 256
