"""The deployment's own files run as plain processes: Redis by start.sh, the server with the compose
file's environment, the image's health check, Prometheus with its configuration.

No container is made: what is replaced are host names, ports and folders.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.deploy.test_dockerfile import FINAL, health_command, instruction
from tests.deploy.validators import ROOT, SECRETS, compose_config, unescaped
from tests.fleet import until
from tests.fleet_chats import chat
from tests.prometheus_server import PrometheusServer
from tests.redis_server import free_port, program
from tests.tiny_models import build_tiny_llava

START = ROOT / "deploy" / "redis" / "start.sh"


@dataclass(frozen=True)
class Site:
    """What runs: each with the environment that compose gives it."""

    folder: Path
    compose: dict[str, Any]
    redis_port: int
    port: int
    admin_port: int

    def local(self, text: str) -> str:
        """Compose's host names as this machine's addresses."""
        return text.replace("redis:6379", f"127.0.0.1:{self.redis_port}")

    def environment(self, service: str) -> dict[str, str]:
        given = self.compose["services"][service]["environment"]
        return {name: self.local(value) for name, value in given.items() if value is not None}


def redis_process(
    folder: Path, environment: dict[str, str], *options: str
) -> subprocess.Popen[bytes]:
    """start.sh as compose runs it, in a data folder of its own; the log is redis.log."""
    program("redis-server")
    for name in ("data", "run"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    folders = {"CONFIG_DIR": str(START.parent), "RUN_DIR": str(folder / "run")}
    with (folder / "redis.log").open("wb") as log:
        return subprocess.Popen(
            ["sh", str(START), *options],
            cwd=folder / "data",
            env={"PATH": os.environ["PATH"], **folders, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Killed at the end, if it still runs."""
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Redis, running; the tiny model, on disk."""
    folder = tmp_path_factory.mktemp("site")
    model = build_tiny_llava().save(folder / "tiny-llava")
    compose = compose_config(MODEL=str(model), DESHIFT_STEERING_MODE="sample", SERVER_CPUS="1")
    made = Site(folder, compose, free_port(), free_port(), free_port())
    process = redis_process(
        folder,
        made.environment("redis"),
        *("--port", str(made.redis_port), "--bind", "127.0.0.1"),
    )
    with ended(process):
        until(lambda: redis_is_healthy(made), "Redis passes its health check")
        yield made


def redis_is_healthy(site: Site) -> bool:
    """The health check of the compose file."""
    kind, command = unescaped(site.compose["services"]["redis"]["healthcheck"]["test"])
    assert kind == "CMD-SHELL"
    here = command.replace("redis-cli", f"redis-cli -p {site.redis_port}")
    environment = {"PATH": os.environ["PATH"], **site.environment("redis")}
    return subprocess.run(["sh", "-c", here], env=environment, capture_output=True).returncode == 0


def server_environment(site: Site) -> dict[str, str]:
    """Of image and compose file, on this machine's own addresses."""
    image = dict(word.split("=", 1) for word in instruction("ENV", FINAL)[0].split())
    cache = site.folder / "cache"
    here = {
        "DESHIFT_HOST": "127.0.0.1",
        "DESHIFT_PORT": str(site.port),
        "DESHIFT_ADMIN_HOST": "127.0.0.1",
        "DESHIFT_ADMIN_PORT": str(site.admin_port),
        "HF_HUB_OFFLINE": "1",
        "PATH": os.environ["PATH"],
    }
    moved = {k: v.replace("/var/lib/deshift", str(cache)) for k, v in image.items()}
    return moved | site.environment("deshift") | here


@contextmanager
def server_process(site: Site, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The image's command."""
    command = json.loads(instruction("CMD", FINAL)[0])
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", *command],
            env=server_environment(site),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    with ended(process):
        yield process


def server_is_healthy(site: Site) -> bool:
    """The health check of the image."""
    program_name, *arguments = health_command()
    assert program_name == "python"
    environment = {"DESHIFT_PORT": str(site.port), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, timeout=20
    )
    return done.returncode == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"REDIS_SERVER_PASSWORD": None}, "REDIS_SERVER_PASSWORD must be set"),
        ({"REDIS_OPERATOR_PASSWORD": ""}, "REDIS_OPERATOR_PASSWORD must be set"),
        ({"REDIS_OPERATOR_PASSWORD": "with@sign:and/slash"}, "of letters, digits"),
        ({"REDIS_SERVER_PASSWORD": "short"}, "at least 16 characters"),
        ({"REDIS_SERVER_PASSWORD": SECRETS["REDIS_OPERATOR_PASSWORD"]}, "must differ"),
    ],
)
def test_redis_does_not_start_with_passwords_that_protect_nothing(
    tmp_path: Path, changes: dict[str, str | None], said: str
) -> None:
    given = {name: SECRETS[name] for name in SECRETS if name.startswith("REDIS_")} | changes
    process = redis_process(tmp_path, {k: v for k, v in given.items() if v is not None})
    with ended(process):
        assert process.wait(10) == 1
    log = (tmp_path / "redis.log").read_text()
    assert said in log
    assert not any(value and value in log for value in given.values())
    assert not list((tmp_path / "run").iterdir())


def test_redis_has_the_users_of_the_acl_with_the_passwords_of_the_environment(site: Site) -> None:
    def client(user: str | None, password: str | None) -> "redis.Redis":
        once = Retry(NoBackoff(), 0)  # a wrong password stays wrong
        return redis.Redis(port=site.redis_port, username=user, password=password, retry=once)

    with client(None, None) as nobody, pytest.raises(redis.AuthenticationError):
        nobody.ping()
    with client("deshift-operator", SECRETS["REDIS_OPERATOR_PASSWORD"]) as operator:
        operator.set("deshift:x", "1")
        with pytest.raises(redis.exceptions.NoPermissionError):
            operator.flushall()
    with client("deshift-server", SECRETS["REDIS_SERVER_PASSWORD"]) as server:
        assert server.get("deshift:x") == b"1"
        with pytest.raises(redis.exceptions.NoPermissionError):
            server.set("deshift:x", "2")
    assert list((site.folder / "data").rglob("*.aof")), "every change is in the log on disk"
    written = site.folder / "run" / "users.acl"
    assert written.stat().st_mode & 0o077 == 0
    assert "SHA256_OF" not in written.read_text()
    for name in SECRETS:
        assert SECRETS[name] not in written.read_text()


@pytest.mark.slow
def test_the_server_runs_on_composes_environment_and_drains_when_it_is_stopped(
    site: Site, tmp_path: Path
) -> None:
    """Health check, a steered answer, what Prometheus gets, SIGTERM during a stream."""
    log = tmp_path / "server.log"
    assert not server_is_healthy(site)
    with server_process(site, log) as process, prometheus(site, tmp_path) as monitor:
        until(
            lambda: process.poll() is None and server_is_healthy(site),
            "the server passes the image's health check",
            timeout_s=90,
        )
        base, key = f"http://127.0.0.1:{site.port}", SECRETS["DESHIFT_API_KEY"]
        ready = httpx.get(f"{base}/ready").json()
        assert (ready["status"], ready["store"]["state"]) == ("ready", "ok"), ready
        bearer = {"authorization": f"Bearer {key}"}
        body = chat(max_tokens=8) | {"stream": False}
        answer = httpx.post(f"{base}/v1/chat/completions", json=body, headers=bearer, timeout=60)
        assert answer.json()["steering"]["mode"] == "sample", answer.text
        assert httpx.post(f"{base}/v1/chat/completions", json=body).status_code == 401
        until(
            lambda: monitor.query('deshift_requests_total{outcome="success"}'),
            f"Prometheus has the answer: {monitor.targets()}",
            timeout_s=30,
        )
        assert {each["health"] for each in monitor.targets()} == {"up"}
        assert {each["labels"]["job"] for each in monitor.targets()} == {"deshift"}
        assert {rule["lastError"] for rule in monitor.rules() if "lastError" in rule} <= {""}
        assert stream_stopped_by_sigterm(process, base, bearer)
        assert process.wait(60) == 0, log.read_text()
    lines = log.read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines), "every line is JSON"
    assert not any(secret in line for line in lines for secret in SECRETS.values())


def stream_stopped_by_sigterm(
    process: subprocess.Popen[bytes], base: str, bearer: dict[str, str]
) -> bool:
    """SIGTERM after the first token; whether the answer came to its end all the same."""
    body = chat(max_tokens=200)
    is_sent = threading.Event()
    with httpx.stream(
        "POST", f"{base}/v1/chat/completions", json=body, headers=bearer, timeout=60
    ) as response:
        lines = []
        for line in response.iter_lines():
            if not is_sent.is_set() and '"content"' in line:
                process.send_signal(signal.SIGTERM)
                is_sent.set()
            lines.append(line)
    return is_sent.is_set() and [line for line in lines if line][-1] == "data: [DONE]"


@contextmanager
def prometheus(site: Site, folder: Path) -> Iterator[PrometheusServer]:
    """With deploy/prometheus; compose's host name becomes an address, and times become short."""
    program("prometheus")
    copy = folder / "prometheus"
    shutil.copytree(ROOT / "deploy" / "prometheus", copy)
    config = copy / "prometheus.yml"
    text = config.read_text()
    assert "deshift:8001" in text
    text = text.replace("deshift:8001", f"127.0.0.1:{site.admin_port}")
    text, count = re.subn(r"(scrape|evaluation)_interval: \S+", r"\1_interval: 1s", text)
    assert count == 2
    config.write_text(re.sub(r"scrape_timeout: \S+", "scrape_timeout: 1s", text))
    with PrometheusServer(folder / "monitor", config) as started:
        yield started


def test_prometheus_runs_with_options_that_it_knows(site: Site) -> None:
    """Those of the compose file, each named in Prometheus' own list of them."""
    known = subprocess.run(
        [program("prometheus"), "--help-long"], capture_output=True, text=True, timeout=30
    )
    options = site.compose["services"]["prometheus"]["command"]
    assert len(options) == 4
    for option in options:
        assert f"{option.split('=')[0]}=" in known.stdout + known.stderr, option


@pytest.mark.slow
def test_a_start_is_ended_by_sigterm_although_the_server_does_not_listen_yet(
    site: Site, tmp_path: Path
) -> None:
    """In a container the server is process 1, which no signal ends that it does not handle."""
    caught = 1 << (signal.SIGTERM - 1)

    def is_handled(pid: int) -> bool:
        status = Path(f"/proc/{pid}/status").read_text()
        (mask,) = re.findall(r"^SigCgt:\s+(\w+)$", status, re.M)
        return bool(int(mask, 16) & caught)

    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    with server_process(site, tmp_path / "server.log") as process:
        until(lambda: is_handled(process.pid), "SIGTERM is handled", timeout_s=60)
        assert not server_is_healthy(site)
        process.send_signal(signal.SIGTERM)
        # An interrupted Python ends itself by SIGINT, and with a status where that is ignored, in a
        # shell's background, say, or as process 1.
        status = process.wait(60)
        assert status > 0 or status == -signal.SIGINT, "ended by itself, not by the signal"
