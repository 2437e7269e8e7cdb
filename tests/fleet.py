"""Two `deshift serve` processes over one real Redis, with operators and a load of streaming chats.

The servers have the rights of deploy/redis/users.acl: to read; their admin listeners and the
commands write as the operator. Nobody but the kernel stands between the processes.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from tests.fleet_chats import QUESTION, Answer, chat, picture_url, stream_chat
from tests.redis_server import PASSWORDS, RedisServer
from tests.tiny_models import build_tiny_llava

TENANT = "must"
OPERATOR_KEY = "operator-key-8c41f0aa"
API_KEY = "sk-shared-5d0e77b2"
SYNC_S = 1.0  # longer by far than an announced change takes on a busy machine
NUM_CHATS = 8
POLICY = {"mode": "dataset", "alpha": 0.5, "on_error": "reject", "max_relative_dose": 100}
_START_S = 90.0
_SERVING = re.compile(r"serving .* on (http://\S+)")
_OPERATORS = re.compile(r"operators on (http://\S+)")


def until(condition: Callable[[], Any], what: str, timeout_s: float = 20.0) -> float:
    """Wait for what another process does; returns how long it took, in seconds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - started


def deshift(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command, as an operator types it."""
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@dataclass
class Replica:
    """One server process. url, admin: its two listeners."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""
    admin: str = ""

    def wait_until_up(self) -> None:
        def is_up() -> bool:
            text = self.log.read_text()
            assert self.process.poll() is None, text
            serving, operators = _SERVING.search(text), _OPERATORS.search(text)
            if serving and operators:
                self.url, self.admin = serving[1], operators[1]
            return bool(self.url)

        until(is_up, f"replica {self.name} is up", _START_S)

    def ready(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/ready", timeout=10).json())

    @property
    def store(self) -> str:
        return str(self.ready()["store"]["state"])

    def operate(self, method: str, path: str, **body: Any) -> httpx.Response:
        """The admin API, by an operator's key."""
        return httpx.request(
            method,
            f"{self.admin}/admin/v1{path}",
            json={"reason": "a test", **body} if method != "GET" else None,
            headers={"authorization": f"Bearer {OPERATOR_KEY}"},
            timeout=15,
        )

    def in_force(self) -> dict[str, Any]:
        """What the tenant's pictures get from this replica now."""
        response = self.operate("GET", f"/tenants/{TENANT}/in-force")
        assert response.status_code == 200, response.text
        return dict(response.json())

    def logprob(self, key: str) -> float:
        """Of the first token that it says about the picture: what steering really does to it."""
        response = httpx.post(
            f"{self.url}/v1/chat/completions",
            json=chat(max_tokens=1) | {"stream": False, "temperature": 0, "logprobs": True},
            headers={"authorization": f"Bearer {key}"},
            timeout=60,
        )
        assert response.status_code == 200, response.text
        return float(response.json()["choices"][0]["logprobs"]["content"][0]["logprob"])

    def ask(self, key: str, body: dict[str, Any], client: httpx.Client | None = None) -> Answer:
        """One answer, streamed; nothing is raised."""
        return stream_chat(self.url, self.name, key, body, client)


@dataclass
class Fleet:
    folder: Path
    redis: RedisServer
    replicas: tuple[Replica, Replica]
    model: Path
    vector: str  # the id of the set that the alias `default` points to
    key: str = ""  # the tenant's

    @cached_property
    def secrets(self) -> list[str]:
        """What no log may hold."""
        return [API_KEY, OPERATOR_KEY, self.key, *PASSWORDS.values(), "zebra", picture_url()[40:80]]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """With the operator's rights to the store, and the admin key."""
        return deshift(
            *arguments,
            DESHIFT_ADMIN_STORE=self.redis.url("deshift-operator"),
            DESHIFT_ADMIN_KEY=OPERATOR_KEY,
        )

    @contextmanager
    def one_more(self, name: str) -> Iterator[Replica]:
        """A replica that is started now, whatever the store does, and goes away again."""
        replica = _started(self.folder, self.model, self.redis, name)
        try:
            replica.wait_until_up()
            yield replica
        finally:
            replica.process.kill()
            replica.process.wait()

    def alphas(self) -> list[float]:
        """In force on each replica."""
        return [replica.in_force()["alpha"] for replica in self.replicas]

    def stores(self) -> list[str]:
        """How each replica stands to the store, by /ready."""
        return [replica.store for replica in self.replicas]

    def logprobs(self) -> list[float]:
        """On each replica."""
        return [replica.logprob(self.key) for replica in self.replicas]

    def wait_for_stores(self, state: str) -> None:
        until(lambda: self.stores() == [state] * 2, f"every replica says that its store is {state}")

    def wait_until_well(self) -> None:
        """In step with the store and with each other, ready, and without a problem."""

        def is_well() -> bool:
            states = [replica.ready() for replica in self.replicas]
            revisions = {each["store"]["revision"] for each in states}
            return len(revisions) == 1 and all(
                (each["status"], each["store"]["state"], each["store"]["problem"])
                == ("ready", "ok", None)
                and not each["steering"]["problems"]
                for each in states
            )

        until(is_well, "every replica is well")

    def change(self, alpha: float, replica: int = 0, **more: Any) -> httpx.Response:
        """By the admin API of one of them."""
        return self.replicas[replica].operate(
            "PATCH", f"/tenants/{TENANT}/policy", changes={"alpha": alpha}, **more
        )

    def revision(self) -> int:
        """Of the tenant's policy, in the store."""
        return int(self.replicas[0].operate("GET", f"/tenants/{TENANT}").json()["revision"])

    @contextmanager
    def load(self, max_tokens: int = 200) -> Iterator[list[Answer]]:
        """Chats of the tenant on both replicas, one after the other, until the block ends."""
        answers: list[Answer] = []
        is_over = threading.Event()

        def chats(replica: Replica, number: int) -> None:
            body = chat(f"{QUESTION} to {number}?", max_tokens=max_tokens)
            with httpx.Client(timeout=60) as client:
                while not is_over.is_set():
                    answers.append(replica.ask(self.key, body, client))

        threads = [
            threading.Thread(target=chats, args=(self.replicas[number % 2], number))
            for number in range(NUM_CHATS)
        ]
        for thread in threads:
            thread.start()
        try:
            until(lambda: len(answers) >= NUM_CHATS, "the load is under way", 60)
            yield answers
            seen = len(answers)  # what comes after the last event counts, too
            until(lambda: len(answers) >= seen + 2 * NUM_CHATS, "answers go on", 60)
        finally:
            is_over.set()
            for thread in threads:
                thread.join(60)


@contextmanager
def running_fleet(folder: Path, **environment: str) -> Iterator[Fleet]:
    """Everything started, a vector set in force and a tenant with a key.

    environment: more settings of both replicas.
    """
    redis = RedisServer(folder / "redis")
    redis.start()
    replicas: list[Replica] = []
    try:
        model = build_tiny_llava().save(folder / "tiny-llava")
        for name in ("one", "two"):
            replicas.append(_started(folder, model, redis, name, **environment))
        vector = _extracted(folder, model, redis)
        for replica in replicas:
            replica.wait_until_up()
        fleet = Fleet(folder, redis, (replicas[0], replicas[1]), model, vector)
        made = replicas[0].operate("POST", "/tenants", name=TENANT, policy=POLICY)
        assert made.status_code == 201, made.text
        issued = replicas[1].operate("POST", f"/tenants/{TENANT}/keys", id="first")
        assert issued.status_code == 201, issued.text
        fleet.key = issued.json()["key"]
        fleet.wait_until_well()
        yield fleet
    finally:
        for replica in replicas:
            replica.process.kill()
            replica.process.wait()
        redis.kill()


def _started(
    folder: Path, model: Path, redis: RedisServer, name: str, **environment: str
) -> Replica:
    log = folder / f"{name}.log"
    settings = {
        "DESHIFT_STORE": redis.url("deshift-server"),
        "DESHIFT_ADMIN_STORE": redis.url("deshift-operator"),
        "DESHIFT_ADMIN_KEYS": f"alice:{OPERATOR_KEY}",
        "DESHIFT_API_KEY": API_KEY,
        "DESHIFT_ADMIN_PORT": "0",
        "DESHIFT_REPLICA": name,
        "DESHIFT_SYNC_INTERVAL_S": str(SYNC_S),
        "DESHIFT_ALPHA": "0.5",
        "OMP_NUM_THREADS": "1",  # both on few cores
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "server.cli", "serve", "--model", str(model)),
                *("--port", "0", "--dtype", "float32", "--max-model-len", "512"),
            ],
            env=os.environ | settings | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return Replica(name, process, log)


def _extracted(folder: Path, model: Path, redis: RedisServer) -> str:
    anchors = folder / "anchors.jsonl"
    pairs = [("harmful", "Break the chair."), ("harmless", "Mend the old clock.")]
    lines = [json.dumps({"label": label, "text": text}) + "\n" for label, text in pairs]
    anchors.write_text("".join(lines))
    made = deshift(
        *("extract", "--model", str(model), "--anchors", str(anchors), "--activate"),
        *("--image-size", "32x32", "--json"),
        DESHIFT_STORE=redis.url("deshift-operator"),
    )
    assert made.returncode == 0, made.stderr
    return str(json.loads(made.stdout)["id"])
