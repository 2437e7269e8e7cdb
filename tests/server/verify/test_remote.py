"""The checks of a server: what a sound one passes, and that each fault fails its check alone."""

import math
from collections import Counter
from functools import partial
from typing import Any

import httpx
import pytest

from server.verify.check import Check, Tolerance, VerifyError, check, is_verified
from server.verify.client import Answer, Asker, connect, gap
from server.verify.counters import Counters, counted, scrape
from server.verify.remote import Remote
from tests.server.verify.scripted_server import Fault, ScriptedServer

NAMES = (
    *("noise", "first request", "fires", "alpha 0", "isolated rows", "clean cache"),
    *("one story", "override", "dose", "counters"),
)


def client_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


async def verified(server: ScriptedServer, **options: Any) -> dict[str, Check]:
    async with client_of(server.app) as client, client_of(server.admin) as admin:
        asker, _ = await connect(client, None)
        before = await scrape(admin)
        checks = await Remote(asker, "float32", **{"max_dose": 1.0} | options).run()
        after = await scrape(admin)
    checks.append(check("counters", lambda: counted(before, after, asker, is_alone=True)))
    assert tuple(each.name for each in checks) == NAMES
    return {each.name: each for each in checks}


def those(checks: dict[str, Check], status: str) -> list[str]:
    return [name for name, each in checks.items() if each.status == status]


@pytest.mark.anyio
async def test_a_sound_server_passes_every_check() -> None:
    checks = await verified(ScriptedServer())
    assert those(checks, "ok") == list(NAMES), checks
    assert is_verified(list(checks.values()))
    assert checks["fires"].figures["limit"] == 1e-4
    assert checks["clean cache"].figures["cached_tokens"][1] > 0
    assert checks["dose"].figures["largest"] == pytest.approx(0.4)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fault", "name", "words"),
    [
        ("inert", "fires", "policy and sample: steering changes log-probabilities by no more than"),
        ("leaks", "isolated rows", "alone and in a batch differ by"),
        ("zero-is-something", "alpha 0", "off and picture, {'alpha': 0} differ by"),
        ("dirty-cache", "clean cache", "before and after a high alpha differ by"),
        ("lazy", "first request", "the first answer and its repetition differ by"),
        ("two-stories", "one story", "the chunks of one stream name revisions (6, 7)"),
        ("overdosed", "dose", "a relative dose of 4 is over 1"),
        ("miscounts", "counters", "answers said mode dataset, counted are"),
        ("misses-hooks", "counters", "steering missed its turn 1.0 times"),
    ],
)
async def test_each_fault_fails_its_check_alone(fault: Fault, name: str, words: str) -> None:
    checks = await verified(ScriptedServer(fault))
    assert those(checks, "failed") == [name], checks
    assert words in checks[name].reason
    assert not is_verified(list(checks.values()))


@pytest.mark.anyio
async def test_noise_beyond_rounding_fails_by_itself_and_hides_nothing() -> None:
    """Else any fault would lie within 3 times the noise."""
    checks = await verified(ScriptedServer("noisy"))
    assert "more than rounding" in checks["noise"].reason
    assert {"noise", "alpha 0", "isolated rows", "clean cache"} <= set(those(checks, "failed"))
    assert checks["noise"].figures["limit"] <= 3 * Tolerance("float32").ceiling


@pytest.mark.anyio
async def test_a_wish_that_is_taken_and_ignored_fails() -> None:
    checks = await verified(ScriptedServer("deaf"))
    assert "asked to be off, it says" in checks["override"].reason
    assert {"override", "alpha 0", "fires"} <= set(those(checks, "failed"))


@pytest.mark.anyio
async def test_without_leave_to_override_what_can_be_seen_is_checked() -> None:
    checks = await verified(ScriptedServer(override="none"), expected_override="none")
    assert those(checks, "skipped") == ["fires", "alpha 0", "clean cache"]
    assert all(
        "DESHIFT_CLIENT_OVERRIDE" in checks[name].reason for name in those(checks, "skipped")
    )
    assert those(checks, "failed") == []
    leaky = await verified(ScriptedServer("leaks", override="none"))
    assert those(leaky, "failed") == ["isolated rows"], "text beside steered pictures"


@pytest.mark.anyio
async def test_leave_to_strengthen_is_enough_to_see_steering_fire() -> None:
    checks = await verified(ScriptedServer(override="strengthen"))
    assert checks["fires"].status == "ok" and "a higher alpha" in checks["fires"].reason
    inert = await verified(ScriptedServer("inert", override="strengthen"))
    assert those(inert, "failed") == ["fires"]


@pytest.mark.anyio
async def test_requests_that_may_do_more_than_they_ought_to_fail() -> None:
    checks = await verified(ScriptedServer(), expected_override="none")
    assert those(checks, "failed") == ["override"]
    assert "client_override any says, not none" in checks["override"].reason


@pytest.mark.anyio
async def test_a_policy_that_steers_nobody_is_no_success() -> None:
    checks = await verified(ScriptedServer(alpha=0.0))
    assert "steers nobody: reason alpha-zero" in checks["first request"].reason


@pytest.mark.anyio
async def test_earlier_requests_are_of_no_account() -> None:
    checks = await verified(ScriptedServer(counted=Counter(dataset=5, off=2)))
    assert checks["counters"].status == "ok"


def test_more_requests_than_were_sent_fail_only_where_nobody_else_asks() -> None:
    fixed = (
        'deshift_engine_failures_total{kind="hooks"} 0\ndeshift_canary_passed{} 1\n'
        'deshift_requests_total{mode="off",outcome="success",tenant="a\\"b"} '
    )
    before, after = Counters.parse(fixed + "0"), Counters.parse(fixed + "2.0")
    asker = Asker(httpx.AsyncClient(), "m")
    asker.answered["off"] = 1
    seen = [
        check("counters", partial(counted, before, after, asker, is_alone=is_alone))
        for is_alone in (True, False)
    ]
    assert [each.status for each in seen] == ["failed", "skipped"]
    assert "1 requests more" in seen[0].reason and "others ask" in seen[1].reason


def answer(*tops: dict[str, float]) -> Answer:
    tokens = tuple(max(top, key=top.__getitem__).encode() for top in tops)
    named = tuple({name.encode(): value for name, value in top.items()} for top in tops)
    return Answer(tokens, named, {}, {})


def test_answers_are_compared_until_they_say_different_things() -> None:
    one = answer({"a": -1.0, "b": -2.0}, {"c": -1.0, "d": -1.1}, {"x": -1.0})
    same = answer({"a": -1.0, "b": -2.25}, {"c": -1.2, "d": -1.1}, {"x": -9.0})
    assert gap(one, same) == pytest.approx(0.25), "after another choice the rest is of no account"
    assert gap(one, answer({"z": -1.0})) == math.inf
    assert gap(one, answer()) == math.inf
    assert gap(one, answer({"a": math.nan, "b": -2.0})) == math.inf


def test_the_limit_follows_the_noise_between_its_bounds() -> None:
    assert Tolerance("float32").limit == 1e-4
    assert Tolerance("float32", 1e-3).limit == pytest.approx(3e-3)
    assert Tolerance("bfloat16", 0.01).limit == 0.05
    assert Tolerance("bfloat16", 0.1).limit == pytest.approx(0.3)
    assert Tolerance("float32", 50.0).limit == pytest.approx(3e-2)


@pytest.mark.anyio
async def test_what_is_no_server_of_ours_is_said() -> None:
    async with client_of(ScriptedServer().app) as client:
        with pytest.raises(VerifyError, match="no series of Deshift"):
            await scrape(client)
    async with httpx.AsyncClient(base_url="http://127.0.0.1:9", trust_env=False) as nobody:
        with pytest.raises(VerifyError, match="no server answers at"):
            await connect(nobody, None)
