"""Changes on a fleet of real processes under load, and faults of the store that they share.

No request is dropped, no picture is answered unsteered, and nobody is restarted.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest

from steering.stores import opened_store
from steering.stores.base import ALIAS_PREFIX
from steering.stores.redis import AUDIT, CHANGED, DOCUMENTS, REVISION, VECTOR
from steering.vectors import ShiftVectors
from tests.fleet import (
    API_KEY,
    OPERATOR_KEY,
    SYNC_S,
    TENANT,
    Fleet,
    running_fleet,
    until,
)
from tests.fleet_chats import chat, check_steered

pytestmark = pytest.mark.slow
POLICY_PATH = f"/tenants/{TENANT}/policy"
DOCUMENT = f"tenant/{TENANT}"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture
def fleet(running: Fleet) -> Iterator[Fleet]:
    """Well, before a test and after it."""
    running.wait_until_well()
    processes = [replica.process.pid for replica in running.replicas]
    yield running
    running.wait_until_well()
    assert [replica.process.poll() for replica in running.replicas] == [None, None], processes


class PolicyForm(HTMLParser):
    """The fields of the console's policy form, as a browser would send them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fields: dict[str, str] = {}
        self._is_inside = False
        self._select = ""
        self._option: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag == "form":
            self._is_inside = told.get("id") == "policy-form"
        elif self._is_inside and tag == "input":
            self.fields[str(told["name"])] = told.get("value") or ""
        elif self._is_inside and tag == "select":
            self._select = str(told["name"])
        elif self._is_inside and tag == "option" and self._select:
            is_first = self._select not in self.fields
            if is_first or "selected" in told:
                self.fields[self._select] = told.get("value") or ""
                self._option = None if "value" in told else self._select

    def handle_data(self, data: str) -> None:
        if self._option is not None:
            self.fields[self._option] = data.strip()
            self._option = None

    def handle_endtag(self, tag: str) -> None:
        self._is_inside &= tag != "form"
        if tag == "select":
            self._select = ""


def change_by_api(fleet: Fleet, alpha: float) -> None:
    assert fleet.change(alpha, replica=0).status_code == 200


def change_by_command(fleet: Fleet, alpha: float) -> None:
    done = fleet.command("policy", "set", TENANT, "--alpha", str(alpha), "--reason", "a test")
    assert done.returncode == 0, done.stderr


def change_by_console(fleet: Fleet, alpha: float) -> None:
    with httpx.Client(base_url=fleet.replicas[1].admin, timeout=15) as browser:
        assert browser.post("/sign-in", data={"key": OPERATOR_KEY, "next": "/"}).is_redirect
        form = PolicyForm(browser.get(f"/tenants/{TENANT}").text).fields
        sent = browser.post(POLICY_PATH, data=form | {"alpha": str(alpha), "reason": "a test"})
        assert sent.is_redirect, sent.text
        unsigned = form | {"alpha": "0", "reason": "forged", "csrf": "0" * 64}
        assert browser.post(POLICY_PATH, data=unsigned).status_code == 403


@pytest.mark.parametrize(
    ("change", "alpha"),
    [(change_by_api, 0.25), (change_by_command, 0.375), (change_by_console, 0.5)],
)
def test_a_change_is_in_force_on_every_replica_and_streams_keep_theirs(
    fleet: Fleet, change: Callable[[Fleet, float], None], alpha: float
) -> None:
    """By the admin API of one replica, by the command, and by the console of the other one.

    Each answer has one revision from its first to its last chunk, also where it goes on while later
    ones are under the new policy already.
    """
    before = fleet.replicas[0].in_force()
    alphas = {before["revision"]: before["alpha"]}
    with fleet.load() as answers:
        change(fleet, alpha)
        until(lambda: fleet.alphas() == [alpha, alpha], "it is in force on both", 5)
        in_force = time.monotonic()
        alphas[fleet.revision()] = alpha
    check_steered(answers, alphas)
    for replica in fleet.replicas:
        mine = [each for each in answers if each.replica == replica.name]
        later = {float(each.said["alpha"]) for each in mine if each.started > in_force}
        assert later == {alpha}
        first = min(each.started for each in mine if float(each.said["alpha"]) == alpha)
        overtaken = [each for each in mine if each.started < first < each.ended]
        assert before["alpha"] in {float(each.said["alpha"]) for each in overtaken}


def test_changes_take_far_less_than_the_interval(fleet: Fleet) -> None:
    took = []
    for alpha in (*[0.25, 0.5] * 5,):
        assert fleet.change(alpha).status_code == 200
        took.append(until(lambda alpha=alpha: fleet.alphas() == [alpha] * 2, "in force"))  # type: ignore[misc]
    assert statistics.median(took) < SYNC_S / 2


def test_of_two_writers_at_once_exactly_one_wins(fleet: Fleet) -> None:
    """Each by the admin API of another replica, on the same revision."""
    with ThreadPoolExecutor(2) as pool, fleet.load() as answers:
        for number in range(8):
            seen = fleet.revision()
            wanted = (0.1 + number / 16, 0.7 + number / 16)  # new ones: no change is no conflict
            sent = [
                pool.submit(fleet.change, alpha, replica, revision=seen)
                for replica, alpha in enumerate(wanted)
            ]
            codes = [each.result().status_code for each in sent]
            assert sorted(codes) == [200, 409]
            lost = sent[codes.index(409)].result().json()["error"]
            assert (lost["code"], lost["revision"]) == ("stale_revision", seen + 1)
            winner = wanted[codes.index(200)]
            until(lambda winner=winner: fleet.alphas() == [winner] * 2, "the winner is in force")  # type: ignore[misc]
    check_steered(answers)
    assert fleet.change(0.5).status_code == 200


def test_redis_killed_under_load_is_followed_again_with_its_data(fleet: Fleet) -> None:
    steered, revision = fleet.logprobs(), fleet.revision()
    audit = fleet.replicas[0].operate("GET", "/audit").json()["entries"]
    with fleet.load() as answers:
        fleet.redis.kill()
        fleet.wait_for_stores("unreachable")
        assert fleet.logprobs() == pytest.approx(steered, abs=1e-3)
        refused = fleet.change(0.25)
        assert refused.status_code == 503 and "127.0.0.1" in refused.json()["error"]["message"]
        ages = [replica.in_force()["age_s"] for replica in fleet.replicas]
        time.sleep(0.5)
        older = [replica.in_force()["age_s"] for replica in fleet.replicas]
        assert all(late - early > 0.4 for early, late in zip(ages, older, strict=True))
        fleet.redis.start()
        fleet.wait_until_well()
        assert fleet.revision() == revision, "nothing that was told to be made is lost"
        assert fleet.replicas[1].operate("GET", "/audit").json()["entries"] == audit
        assert fleet.change(0.25).status_code == 200
        until(lambda: fleet.alphas() == [0.25, 0.25], "a change after it is in force")
    check_steered(answers)
    assert fleet.change(0.5).status_code == 200


def test_redis_that_comes_back_empty_is_foreign_until_it_is_restored(fleet: Fleet) -> None:
    """Fail closed: an empty store says nothing about steering, and everything stays in force."""
    steered, revision = fleet.logprobs(), fleet.revision()
    with fleet.load() as answers:
        fleet.redis.restart(empty=True)
        fleet.wait_for_stores("foreign")
        assert "revision" in fleet.replicas[0].ready()["store"]["problem"]
        assert [replica.in_force()["revision"] for replica in fleet.replicas] == [revision] * 2
        assert fleet.logprobs() == pytest.approx(steered, abs=1e-3)

        def told() -> set[str]:
            listed = fleet.replicas[1].operate("GET", "/replicas").json()["replicas"]
            return {f"{each['name']} {each['status']['store']}" for each in listed}

        until(lambda: told() == {"one foreign", "two foreign"}, "operators are shown it")
        with ThreadPoolExecutor(2) as pool:  # two operators, each by another replica
            sent = pool.map(lambda each: each.operate("POST", "/store/restore"), fleet.replicas)
            codes = sorted(each.status_code for each in sent)
        # 400 where the other one's word was followed already, 409 where it was only in the store
        assert codes in ([200, 400], [200, 409])
        fleet.wait_until_well()
        assert fleet.change(0.25, replica=1).status_code == 200
        until(lambda: fleet.alphas() == [0.25, 0.25], "a change after it is in force")
        again = fleet.replicas[0].operate("POST", "/store/restore")
        assert again.status_code == 400 and again.json()["error"]["code"] == "store_not_foreign"
    check_steered(answers)
    assert {each.said["vector"] for each in answers} == {fleet.vector}
    assert fleet.change(0.5).status_code == 200


def test_redis_paused_for_seconds_holds_nobody_up(fleet: Fleet) -> None:
    with fleet.load() as answers:
        began = time.monotonic()
        fleet.redis.pause()
        try:
            fleet.wait_for_stores("unreachable")
            time.sleep(max(0.0, began + 10 - time.monotonic()))
        finally:
            fleet.redis.resume()
        ended = time.monotonic()
        fleet.wait_until_well()
        assert fleet.change(0.25).status_code == 200
        until(lambda: fleet.alphas() == [0.25, 0.25], "a change after it is in force")
    check_steered(answers)
    during = [each for each in answers if began < each.started and each.ended < ended]
    assert {each.replica for each in during} == {"one", "two"}
    assert fleet.change(0.5).status_code == 200


def test_a_change_that_nobody_hears_of_heals_within_the_interval(fleet: Fleet) -> None:
    """As the store commits, without its message."""
    with fleet.load() as answers, fleet.redis.admin() as client:
        text = client.hget(DOCUMENTS, DOCUMENT).partition(b" ")[2]
        document = json.loads(text)
        document["policy"]["alpha"] = 0.75
        with client.pipeline() as pipe:
            revision = int(client.get(REVISION)) + 1
            pipe.set(REVISION, revision)
            pipe.hset(DOCUMENTS, DOCUMENT, f"{revision} {json.dumps(document)}")
            pipe.zadd(CHANGED, {DOCUMENT: revision})
            entry: dict[str, Any] = {"by": "a test", "via": "command", "reason": "a lost message"}
            entry |= {"action": "policy.set", "changes": []}
            pipe.xadd(AUDIT, {"at": time.time(), "entry": json.dumps(entry)}, id=f"{revision}-0")
            pipe.execute()
        took = until(lambda: fleet.alphas() == [0.75, 0.75], "it is in force on both")
        assert took < SYNC_S + 2.0, "seconds; a look on a busy machine may be late"
    check_steered(answers)
    assert fleet.change(0.5).status_code == 200


def test_a_damaged_set_under_a_switched_alias_leaves_the_last_good_one(fleet: Fleet) -> None:
    steered = fleet.logprobs()

    async def put(vectors: ShiftVectors, alias: bool = False) -> None:
        async with opened_store(fleet.redis.url()) as store:
            if alias:
                target = json.dumps({"vector": vectors.id})
                await store.commit({f"{ALIAS_PREFIX}default": target}, {}, "{}")
            else:
                await store.put_vectors(vectors.to_bytes())

    with fleet.redis.admin() as client:
        data: Any = client.get(VECTOR + fleet.vector)
        good = ShiftVectors.from_bytes(data)
        other = replace(good, mean=good.mean / 2)
        asyncio.run(put(other))
        client.setrange(VECTOR + other.id, len(data) - 40, b"bees")
    with fleet.load() as answers:
        refused = fleet.replicas[0].operate("PUT", "/aliases/default", vector=other.id)
        assert refused.status_code >= 400, "what is damaged is not even activated"
        asyncio.run(put(other, alias=True))  # so it is done behind the operators' back

        def problems() -> list[str]:
            told = [replica.ready()["steering"]["problems"] for replica in fleet.replicas]
            return [each.get("default", "") for each in told]

        until(lambda: all(problems()), "every replica says what is wrong")
        assert all(other.id[:12] in each for each in problems())
        assert fleet.logprobs() == pytest.approx(steered, abs=1e-3)
        damaged_until = time.monotonic()
        asyncio.run(put(other))  # mended
        fleet.wait_until_well()
        mended = fleet.replicas[1].operate("PUT", "/aliases/default", vector=fleet.vector)
        assert mended.status_code == 200, mended.text
        until(
            lambda: {each.in_force()["vector"] for each in fleet.replicas} == {fleet.vector},
            "the first set is in force again",
        )
    check_steered(answers)
    early = {each.said["vector"] for each in answers if each.started < damaged_until}
    assert early == {fleet.vector}
    assert {each.said["vector"] for each in answers} <= {fleet.vector, other.id}


def test_the_kill_switch_works_without_the_store(fleet: Fleet) -> None:
    """On one replica by HTTP, on the other one by the command; and is taken back there."""
    one, two = fleet.replicas
    steered = fleet.logprobs()
    fleet.redis.kill()
    try:
        fleet.wait_for_stores("unreachable")
        assert one.operate("PUT", "/kill", action="reject").status_code == 503, "the fleet's"
        killed = one.operate("PUT", "/kill", action="reject", scope="replica")
        assert killed.status_code == 200 and killed.json()["replica"] == "reject"
        arguments = ("--replica", two.admin, "--admin-key-from-env", "--reason", "a bad day")
        done = fleet.command("kill", "unsteered", *arguments)
        assert done.returncode == 0, done.stderr
        refused = one.ask(fleet.key, chat())
        assert refused.status == 503 and "steering_killed" in refused.problem
        assert one.ask(fleet.key, chat(with_picture=False)).said["reason"] == "text-only"
        unsteered = two.ask(fleet.key, chat())
        assert unsteered.status == 200
        assert (unsteered.said["mode"], unsteered.said["reason"]) == ("off", "kill-switch")
        assert abs(two.logprob(fleet.key) - steered[1]) > 1e-2, "what the others are compared by"
        assert [each.ready()["steering"]["kill"] for each in (one, two)] == ["reject", "unsteered"]
        done = fleet.command("kill", "none", *arguments, "--replica", one.admin)
        assert done.returncode == 0, done.stderr
        assert fleet.logprobs() == pytest.approx(steered, abs=1e-3)
    finally:
        fleet.redis.start()
    fleet.wait_until_well()
    check_steered([each.ask(fleet.key, chat()) for each in fleet.replicas])


def test_a_replica_that_starts_without_the_store_steers_nobody_less(fleet: Fleet) -> None:
    """It cannot know the tenant's key nor any vectors yet; both come with the store."""
    fleet.redis.kill()
    try:
        with fleet.one_more("three") as three:
            assert three.ready()["status"] == "not ready" and three.store == "unreachable"
            assert three.ask(fleet.key, chat()).status == 503, "not a 401: the key may be good"
            assert three.ask(API_KEY, chat()).status == 503, "by default steered, and it cannot be"
            assert three.ask(API_KEY, chat(with_picture=False)).status == 200
            fleet.redis.start()
            until(lambda: three.ready()["status"] == "ready", "it is ready by itself")
            check_steered([three.ask(fleet.key, chat()), three.ask(API_KEY, chat())])
            three.process.terminate()
            assert three.process.wait(20) == 0
    finally:
        fleet.redis.restart()


def test_keys_are_good_on_their_own_listener_only(fleet: Fleet) -> None:
    for replica in fleet.replicas:
        assert replica.ask(OPERATOR_KEY, chat()).status == 401
        for key in (fleet.key, API_KEY, OPERATOR_KEY[:-1]):
            headers = {"authorization": f"Bearer {key}"}
            for path in ("/admin/v1/tenants", f"/admin/v1/tenants/{TENANT}/in-force"):
                assert httpx.get(replica.admin + path, headers=headers).status_code == 401
            assert httpx.post(replica.admin + "/sign-in", data={"key": key}).status_code == 401
        for key, url in ((fleet.key, replica.url), (OPERATOR_KEY, replica.admin)):
            headers = {"authorization": f"Bearer {key}"}
            path = "/admin/v1/tenants" if url == replica.url else "/v1/models"
            assert httpx.get(url + path, headers=headers).status_code == 404


def test_the_logs_of_the_whole_run_hold_no_secret(fleet: Fleet) -> None:
    """Every test above has left its lines in them."""
    check_steered([replica.ask(fleet.key, chat()) for replica in fleet.replicas])
    for replica in fleet.replicas:
        assert replica.ask(fleet.key[:-1], chat()).status == 401
        log = replica.log.read_text()
        assert "tenant=must" in log
        assert [secret for secret in fleet.secrets if secret in log] == []
        assert "Traceback" not in log
