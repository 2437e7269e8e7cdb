"""What a pass costs, and who bears it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.engine.costs import Costs
from server.engine.stats import Counters


def chunk(role: str, num_tokens: int, *, reads_gate: bool = False) -> Any:
    booked: list[float] = []
    state = SimpleNamespace(role=role, asker="own" if role == "own" else "shift")
    active = SimpleNamespace(book_shift=booked.append, booked=booked)
    return SimpleNamespace(
        start=7, end=7 + num_tokens, state=state, active=active, reads_gate=reads_gate
    )


def test_the_pair_bears_what_its_tokens_add_and_not_the_weights_that_are_read_anyway() -> None:
    """It bore its share of the whole pass, 10 ms of 66 more than clients of the demonstration
    model measured."""
    counters = Counters()
    costs = Costs(torch.device("cpu"), counters)
    rows: list[Any] = [object()]
    costs.book_pass([], rows, [], 0.02)
    own, pair = chunk("own", 20), [chunk("corrupted", 50), chunk("text-only", 30)]
    costs.book_pass([*pair, own], [], [], 0.12)
    assert sum(pair[0].active.booked) == pytest.approx(0.05)
    assert sum(pair[1].active.booked) == pytest.approx(0.03)
    assert own.active.booked == []
    assert counters.prefill_tokens["shift"] == 80 and counters.prefill_tokens["own"] == 20


def test_passes_without_prompts_are_remembered_by_the_number_of_their_rows() -> None:
    costs = Costs(torch.device("cpu"), Counters())
    for num_rows, seconds in ((1, 0.02), (16, 0.04)):
        costs.book_pass([], [object()] * num_rows, [], seconds)  # type: ignore[list-item]
    few, many = chunk("corrupted", 10), chunk("corrupted", 10)
    costs.book_pass([few], [object()] * 2, [], 0.05)  # type: ignore[list-item]
    costs.book_pass([many], [object()] * 15, [], 0.05)  # type: ignore[list-item]
    assert few.active.booked == [pytest.approx(0.03)]
    assert many.active.booked == [pytest.approx(0.01)]


def test_a_pass_that_was_faster_than_one_without_prompts_counts_as_cheap_not_free() -> None:
    costs = Costs(torch.device("cpu"), Counters())
    costs.book_pass([], [object()], [], 0.05)  # type: ignore[list-item]
    gated = chunk("own", 10, reads_gate=True)
    costs.book_pass([gated], [], [], 0.04)
    assert gated.active.booked == [pytest.approx(0.0004)]
