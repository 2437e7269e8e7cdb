"""When the cost of steering is a failure, and how a report is written."""

import json
import math

import pytest
from rich.console import Console

from server.bench.summary import Interval
from server.verify.check import Check, FailedError, SkippedError, is_verified
from server.verify.overhead import Overhead, judged
from server.verify.report import as_json, table


def interval(*values: float) -> Interval:
    found = Interval.of(values)
    assert found is not None
    return found


def overhead(ttft: Interval | None, step: Interval | None) -> Overhead:
    return Overhead([], {"cells": []}, ttft, step)


def test_a_cost_is_only_a_failure_beyond_a_given_bound() -> None:
    costly = overhead(interval(1.2, 1.3, 1.4), interval(1.0))
    reason, _ = judged(costly, None)
    assert "TTFT 1.300 (1.200-1.400" in reason
    with pytest.raises(FailedError, match="TTFT at dataset level is 1.300 times off's"):
        judged(costly, 0.1)


def test_a_cost_that_may_be_noise_is_no_failure() -> None:
    """A machine under load: the interval reaches below the bound."""
    assert judged(overhead(interval(0.9, 1.3, 1.6), interval(0.8, 1.2)), 0.05)


def test_a_decode_step_that_could_not_be_told_is_left_out() -> None:
    assert "decode step" not in judged(overhead(interval(1.0), None), 0.5)[0]
    with pytest.raises(SkippedError):
        judged(overhead(None, None), 0.5)


CHECKS = [
    Check("one", "ok", "well [sic]", {"gap": math.inf, "of": (1.0, math.nan)}),
    Check("two", "skipped", "not allowed"),
]


def test_the_report_is_json_whatever_was_measured() -> None:
    told = json.loads(as_json(CHECKS, {"url": "http://x"}))
    assert told["verified"] is True and told["url"] == "http://x"
    assert told["checks"][0]["figures"] == {"gap": None, "of": [1.0, None]}


def test_the_table_shows_reasons_as_they_are() -> None:
    console = Console(width=100, record=True)
    console.print(table(CHECKS, "title"))
    text = console.export_text()
    assert "well [sic]" in text and "skipped" in text


def test_only_skips_verify_nothing() -> None:
    assert not is_verified(CHECKS[1:])
    assert is_verified(CHECKS)
    assert not is_verified([*CHECKS, Check("three", "failed", "")])
