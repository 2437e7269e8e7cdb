"""Requests per minute and at once, by tenant. Windows of a second, so that they end in the test."""

import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
from limits import RateLimitItemPerSecond

from server.documents import PolicyFields
from server.errors import RateLimitError
from server.limits import TenantLimits
from server.policy import Policy


def policy(tenant: str = "acme", rate: int | None = None, at_once: int | None = None) -> Policy:
    fields = PolicyFields(requests_per_minute=rate, concurrency=at_once)
    return Policy.of(fields, revision=1, tenant=tenant)


def admit(limits: TenantLimits, asked: Policy) -> None:
    with limits.admitted(asked):
        pass


def test_without_limits_nobody_is_refused() -> None:
    limits = TenantLimits()
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(limits.admitted(policy()))


def test_the_rate_counts_requests_that_are_over_too_and_each_tenant_alone() -> None:
    limits = TenantLimits()
    for _ in range(3):
        admit(limits, policy(rate=3))
    with pytest.raises(RateLimitError, match="3 requests a minute") as caught:
        admit(limits, policy(rate=3))
    assert 59 < caught.value.retry_after_s <= 60
    admit(limits, policy("other", rate=3))


def test_after_the_time_that_is_told_there_is_room_and_not_before() -> None:
    """The minute moves: room comes when the oldest request leaves it, not at the full minute."""
    limits = TenantLimits(rate=RateLimitItemPerSecond)
    admit(limits, policy(rate=2))
    time.sleep(0.4)
    admit(limits, policy(rate=2))
    with pytest.raises(RateLimitError) as caught:
        admit(limits, policy(rate=2))
    assert caught.value.retry_after_s <= 0.6
    time.sleep(caught.value.retry_after_s / 2)
    with pytest.raises(RateLimitError):
        admit(limits, policy(rate=2))
    time.sleep(caught.value.retry_after_s / 2 + 0.02)
    admit(limits, policy(rate=2))
    with pytest.raises(RateLimitError):
        admit(limits, policy(rate=2))


def test_a_changed_limit_holds_for_the_next_request() -> None:
    limits = TenantLimits()
    held = policy(rate=1, at_once=1)
    with limits.admitted(held):
        with pytest.raises(RateLimitError):
            admit(limits, held)
        admit(limits, replace(held, concurrency=2, requests_per_minute=5))
        admit(limits, replace(held, concurrency=None, requests_per_minute=None))
        with pytest.raises(RateLimitError):
            admit(limits, held)


def test_what_runs_is_counted_until_its_end_whatever_that_is() -> None:
    limits = TenantLimits()
    with pytest.raises(ZeroDivisionError), limits.admitted(policy(at_once=1)):
        with pytest.raises(RateLimitError, match="1 requests of this tenant are running") as caught:
            admit(limits, policy(at_once=1))
        assert caught.value.retry_after_s == 1
        admit(limits, policy("other", at_once=1))
        raise ZeroDivisionError
    assert limits.num_running("acme") == 0
    admit(limits, policy(at_once=1))


def test_what_is_refused_counts_for_nothing() -> None:
    limits = TenantLimits()
    both = policy(rate=2, at_once=1)
    with limits.admitted(both):
        for _ in range(5):
            with pytest.raises(RateLimitError, match="running"):
                admit(limits, both)
    admit(limits, both)
    for _ in range(2):
        with pytest.raises(RateLimitError, match="a minute"):
            admit(limits, both)
    assert limits.num_running("acme") == 0
