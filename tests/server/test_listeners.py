"""A process with its two listeners: who is answered where, and how both end."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import wait_until
from tests.server.fakes import chat_body

PATH = "/v1/chat/completions"
ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import asyncio, time
from server.app import create_app
from server.serve import admin_socket, configure_logging, listening_socket, run
from steering.stores import MemoryStore
from tests.server.conftest import make_settings
from tests.server.fakes import FakeEngine, says

def slowly(request):
    for step in says(*["word "] * 20)(request):
        time.sleep(0.1)
        yield step

settings = make_settings(
    steering_mode="off", admin_port=0, admin_keys="alice:operator-key-of-alice"
)
configure_logging()
app = create_app(settings, engine=FakeEngine(slowly), store=MemoryStore())
with listening_socket(settings) as sock, admin_socket(settings) as admin_sock:
    asyncio.run(run(app, sock, admin_sock))
print("stopped cleanly")
"""


class ServerProcess:
    """SCRIPT, running; `url` and `admin_url` are its two listeners."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        places: dict[str, str] = {}
        for line in self.process.stderr:
            for what in ("serving tiny", "operators"):
                if f"{what} on http://127.0.0.1:" in line:
                    places[what] = line.strip().rpartition(" ")[2]
            if len(places) == 2:
                break
        self.url, self.admin_url = places["serving tiny"], places["operators"]

    def end(self) -> str:
        """Wait for its end, which must be a clean one; returns the rest of its log."""
        out, error = self.process.communicate(timeout=20)
        assert (self.process.returncode, out) == (0, "stopped cleanly\n"), error
        return str(error)


@pytest.fixture
def server_process() -> Iterator[ServerProcess]:
    server = ServerProcess()
    yield server
    server.process.kill()
    server.process.communicate()


def test_each_listener_has_its_own_paths_and_both_stop_on_sigterm(
    server_process: ServerProcess,
) -> None:
    key = {"authorization": "Bearer operator-key-of-alice"}
    tenants = "/admin/v1/tenants"
    with httpx.Client() as client:
        assert client.get(server_process.admin_url + tenants, headers=key).status_code == 200
        assert client.get(server_process.admin_url + tenants).status_code == 401
        assert client.get(server_process.url + tenants).status_code == 404
        # An operator's key is no client's, and operators' listener answers no client.
        answer = client.post(server_process.url + PATH, json=chat_body(), headers=key)
        assert answer.status_code == 401
        answer = client.post(server_process.admin_url + PATH, json=chat_body(), headers=key)
        assert answer.status_code == 404
        for url in (server_process.url, server_process.admin_url):
            assert client.get(url + "/health").status_code == 200
            assert client.get(url + "/ready").status_code == 200
    server_process.process.send_signal(signal.SIGTERM)
    assert "Traceback" not in server_process.end()


def test_a_header_does_not_choose_the_address_whose_wrong_keys_are_counted(
    server_process: ServerProcess,
) -> None:
    """Whoever guessed from this machine had a new address with every guess."""
    with httpx.Client(headers={"authorization": "Bearer wrong"}) as client:
        answers = [
            client.get(
                f"{server_process.admin_url}/admin/v1/tenants",
                headers={"x-forwarded-for": f"10.0.0.{number}"},
            )
            for number in range(11)
        ]
    assert [each.status_code for each in answers] == [401] * 10 + [429]


@pytest.mark.slow
def test_operators_are_answered_while_clients_drain_and_then_both_end(
    server_process: ServerProcess,
) -> None:
    key = {"authorization": "Bearer operator-key-of-alice"}
    body = chat_body(stream=True)
    with httpx.stream("POST", server_process.url + PATH, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        server_process.process.send_signal(signal.SIGTERM)
        admin = server_process.admin_url
        wait_until(lambda: httpx.get(admin + "/ready").status_code == 503)
        assert httpx.get(admin + "/health").status_code == 200
        kill = {"action": "reject", "scope": "replica", "reason": "while it drains"}
        assert httpx.put(f"{admin}/admin/v1/kill", json=kill, headers=key).status_code == 200
        preview = {"policy": {}, "messages": [{"role": "user", "content": "Hi"}], "alphas": [0]}
        refused = httpx.post(f"{admin}/admin/v1/preview", json=preview, headers=key)
        assert refused.status_code == 503
        assert "data: [DONE]" in list(lines)
    log = server_process.end()
    assert "Traceback" not in log
    assert "kill switch of this replica: reject, by alice via api: 'while it drains'" in log
    for url in (server_process.url, server_process.admin_url):
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")


@pytest.mark.slow
def test_a_second_sigterm_ends_both_at_once(server_process: ServerProcess) -> None:
    admin = httpx.URL(server_process.admin_url)
    with socket.create_connection((admin.host, admin.port)) as slow:  # a body that never comes
        slow.sendall(
            b"POST /admin/v1/tenants HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n"
            b"authorization: Bearer operator-key-of-alice\r\n\r\n"
        )
        httpx.get(server_process.admin_url + "/health")  # by now the other has been taken up
        start = time.monotonic()
        for _ in range(2):
            server_process.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        server_process.end()
        assert time.monotonic() - start < 4
