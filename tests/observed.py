"""A fleet that a real Prometheus scrapes as deploy/prometheus says, under a load of every kind.

The load counts for itself what clients saw, to compare with what the metrics say.
"""

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.deploy.expressions import DEPLOY
from tests.fleet import API_KEY, POLICY, TENANT, Fleet, Replica, running_fleet, until
from tests.fleet_chats import QUESTION, chat
from tests.prometheus_server import PrometheusServer

# Beside the fleet's own tenant, which is steered at dataset level. Plain policies, one for each
# thing that can happen to a picture.
POLICIES: dict[str, dict[str, Any]] = {
    "sampled": POLICY | {"mode": "sample"},
    "plain": {"mode": "off"},
    "zero": POLICY | {"alpha": 0},
    "unlucky": POLICY | {"rollout": 0},
    "limited": POLICY | {"requests_per_minute": 1},
}
OUTCOMES = {200: "success", 400: "invalid", 401: "unauthorized", 429: "limited", 503: "unavailable"}
SCRAPES = 8  # of the whole load, at least


@dataclass
class Seen:
    """By the clients. steered: by `tenant mode`; skipped: by `tenant reason`."""

    outcomes: Counter[str] = field(default_factory=Counter)
    succeeded: Counter[str] = field(default_factory=Counter)  # by tenant
    steered: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    request_ids: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, tenant: str, response: httpx.Response) -> None:
        with self.lock:
            self.outcomes[OUTCOMES[response.status_code]] += 1
            self.request_ids.add(response.headers["x-request-id"])
            if response.status_code != 200:
                return
            self.succeeded[tenant] += 1
            header = response.headers["x-deshift-steering"]
            said = dict(part.split("=", 1) for part in header.split("; "))
            if "reason" in said:
                self.skipped[f"{tenant} {said['reason']}"] += 1
            else:
                self.steered[f"{tenant} {said['mode']}"] += 1


@dataclass
class Observed:
    """start, end: of what was driven, Unix seconds."""

    fleet: Fleet
    prometheus: PrometheusServer
    keys: dict[str, str]  # by tenant
    seen: Seen
    start: float
    end: float = 0.0

    def total(self, metric: str, *by: str) -> Counter[str]:
        """A metric's newest values, by the values of some labels with a space between."""
        found = self.prometheus.query(f"sum by ({', '.join(by)}) ({metric})")
        return Counter(
            {
                " ".join(each["metric"][label] for label in by): round(float(each["value"][1]))
                for each in found
            }
        )


@contextmanager
def observed_fleet(folder: Path) -> Iterator[Observed]:
    """Driven already; it goes on running and being scraped."""
    with running_fleet(folder, DESHIFT_PROBE_SHARE="1") as fleet:
        keys = {TENANT: fleet.key, "default": API_KEY}
        keys |= {name: _tenant(fleet, name, policy) for name, policy in POLICIES.items()}
        with PrometheusServer(folder / "prometheus", configuration(fleet, folder)) as prometheus:
            observed = Observed(fleet, prometheus, keys, Seen(), time.time())
            _drive(observed)
            observed.end = time.time()
            yield observed


def configuration(fleet: Fleet, folder: Path) -> Path:
    """deploy/prometheus with the fleet as targets and everything every second."""
    made = folder / "deployed"
    shutil.copytree(DEPLOY / "prometheus", made)
    config = yaml.safe_load((made / "prometheus.yml").read_text())
    for interval in ("scrape_interval", "scrape_timeout", "evaluation_interval"):
        config["global"][interval] = "1s"
    (job,) = config["scrape_configs"]
    del job["static_configs"]
    (made / "prometheus.yml").write_text(yaml.safe_dump(config))
    targets = [replica.admin.removeprefix("http://") for replica in fleet.replicas]
    (made / "targets" / "replicas.yml").write_text(json.dumps([{"targets": targets}]))
    return made / "prometheus.yml"


def _tenant(fleet: Fleet, name: str, policy: dict[str, Any]) -> str:
    """Make one; returns its key."""
    replica = fleet.replicas[0]
    made = replica.operate("POST", "/tenants", name=name, policy=policy)
    assert made.status_code == 201, made.text
    issued = replica.operate("POST", f"/tenants/{name}/keys", id="first")
    assert issued.status_code == 201, issued.text
    return str(issued.json()["key"])


def _drive(observed: Observed) -> None:
    """Clients on both replicas, while operators change policies and lose the store once."""
    fleet, prometheus = observed.fleet, observed.prometheus
    fleet.wait_until_well()
    is_over = threading.Event()
    pool = ThreadPoolExecutor()
    clients = [
        pool.submit(_client, observed, replica, number, is_over)
        for replica in fleet.replicas
        for number in (1, 2)
    ]
    try:
        scraped = 'min(count_over_time(deshift_steering_overhead_seconds_count{mode="sample"}[1h]))'
        _wait_for(prometheus, f"{scraped} >= 2", "the load is under way")
        for alpha in (0.25, 0.75):
            assert fleet.change(alpha).status_code == 200
            _wait_for(
                prometheus, f'min(deshift_steering_alpha{{tenant="{TENANT}"}}) == {alpha}', ""
            )
        for action in ("unsteered", "reject"):
            _kill(fleet.replicas[0], action)
            _wait_for(prometheus, f'max(deshift_kill_switch{{action="{action}"}}) == 1', action)
        _wait_for(prometheus, 'sum(deshift_requests_total{outcome="unavailable"}) > 0', "a 503")
        _kill(fleet.replicas[0], "none")
        fleet.redis.kill()
        _wait_for(prometheus, "sum(deshift_store_up) == 0", "the loss of the store is seen")
        fleet.redis.start()
        fleet.wait_until_well()
        _wait_for(prometheus, f"{scraped} >= {SCRAPES}", "enough scrapes under load")
    finally:
        is_over.set()
        pool.shutdown()
    for client in clients:
        client.result()


def _kill(replica: Replica, action: str) -> None:
    """Its own switch, which needs no store."""
    done = replica.operate("PUT", "/kill", action=action, scope="replica")
    assert done.status_code == 200, done.text


def _wait_for(prometheus: PrometheusServer, expression: str, what: str) -> None:
    until(lambda: prometheus.query(expression), what, 60)


def _client(observed: Observed, replica: Replica, number: int, is_over: threading.Event) -> None:
    """Rounds of everything, each kind of request once in a round."""
    seen, keys = observed.seen, observed.keys
    with httpx.Client(base_url=replica.url, timeout=60) as http:

        def ask(tenant: str, body: dict[str, Any], key: str | None = None) -> None:
            headers = {"authorization": f"Bearer {key or keys[tenant]}"}
            seen.add(tenant, http.post("/v1/chat/completions", json=body, headers=headers))

        for turn in count(1):
            if is_over.is_set():
                return
            about_a_new_picture = chat(f"{QUESTION} to {number}?", max_tokens=12, seed=turn)
            for tenant in keys:
                ask(tenant, about_a_new_picture)
            without_picture = chat(max_tokens=4, with_picture=False) | {"stream": False}
            for tenant in (TENANT, "plain"):
                ask(tenant, without_picture)
            ask(TENANT, without_picture | {"n": 99})
            ask(TENANT, without_picture, key="sk-nobody-has-this-key")
            _leave(observed, http)


def _leave(observed: Observed, http: httpx.Client) -> None:
    """In the middle of an answer that would be long."""
    body = chat(max_tokens=400, with_picture=False)
    headers = {"authorization": f"Bearer {observed.keys['plain']}"}
    with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        next(response.iter_lines())
    with observed.seen.lock:
        observed.seen.outcomes["cancelled"] += 1
