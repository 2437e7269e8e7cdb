"""A server on a real socket: clients that leave, draining, startup that fails."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.engine.types import EngineError, EngineInputs, TextEvent
from server.errors import ServerError, StartupError
from server.serve import admin_socket, listening_socket, serve
from steering.errors import SteeringError
from steering.stores import MemoryStore
from tests.server.conftest import LiveServer, live_server, make_settings, wait_until
from tests.server.fakes import FakeEngine, chat_body, make_prompt, plays, says

PATH = "/v1/chat/completions"
ROOT = Path(__file__).parent.parent.parent


def send(live: LiveServer, body: dict[str, Any]) -> socket.socket:
    """Post a request by hand and leave its connection open."""
    content = json.dumps(body).encode()
    connection = live.connect()
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(
    live: LiveServer, fake_engine: FakeEngine, stream: bool
) -> None:
    """Generation must not go on for nobody."""
    fake_engine.script = plays(TextEvent(0, "Hel"), threading.Event())  # and then for ever
    connection = send(live, chat_body(stream=stream))
    if stream:
        received = b""
        while b"Hel" not in received:
            received += connection.recv(1000)
    wait_until(lambda: fake_engine.num_running == 1)
    connection.close()
    wait_until(lambda: fake_engine.num_running == 0)
    assert fake_engine.cancelled == [fake_engine.requests[0].request_id]
    wait_until(lambda: live.services.in_flight.count == 0)
    fake_engine.script = says("again")
    assert httpx.post(live.url + PATH, json=chat_body()).status_code == 200


def test_a_client_that_leaves_before_the_first_token_frees_its_row(
    live: LiveServer, fake_engine: FakeEngine
) -> None:
    fake_engine.script = plays(threading.Event())
    connection = send(live, chat_body(stream=True))
    wait_until(lambda: fake_engine.num_running == 1)
    connection.close()
    wait_until(lambda: live.services.in_flight.count == 0 and fake_engine.num_running == 0)


def test_a_finished_request_is_not_cancelled(live: LiveServer, fake_engine: FakeEngine) -> None:
    for stream in (True, False):
        httpx.post(live.url + PATH, json=chat_body(stream=stream))
    assert not fake_engine.cancelled


def test_tokens_arrive_as_they_are_made(live: LiveServer, fake_engine: FakeEngine) -> None:
    gate = threading.Event()
    fake_engine.script = plays(TextEvent(0, "first"), gate, *says("second")(_one_choice()))
    with httpx.stream("POST", live.url + PATH, json=chat_body(stream=True)) as response:
        lines = response.iter_lines()
        seen = ""
        while "first" not in seen:
            seen = next(lines)
        gate.set()
        assert any("second" in line for line in lines)


def _one_choice() -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(params=SimpleNamespace(n=1), inputs=EngineInputs(make_prompt(3)))


def test_nothing_is_lost_between_a_fast_engine_and_a_slow_reader(
    live: LiveServer, fake_engine: FakeEngine
) -> None:
    pieces = [f"{number} " for number in range(3000)]
    fake_engine.script = says(*pieces)
    text = ""
    with httpx.stream("POST", live.url + PATH, json=chat_body(stream=True)) as response:
        for number, line in enumerate(response.iter_lines()):
            if number % 500 == 0:
                time.sleep(0.01)
            if line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                text += choices[0]["delta"].get("content", "")
    assert text == "".join(pieces)


def test_draining_finishes_streams_refuses_new_requests_and_stops(
    fake_engine: FakeEngine, store: MemoryStore
) -> None:
    gate = threading.Event()
    with live_server(fake_engine, store) as live:
        fake_engine.script = plays(TextEvent(0, "early"), gate, *says("late")(_one_choice()))
        with httpx.stream("POST", live.url + PATH, json=chat_body(stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            live.signal(signal.SIGTERM)
            wait_until(lambda: fake_engine.state == "draining")
            refused = httpx.post(live.url + PATH, json=chat_body())
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert refused.json()["error"]["code"] == "service_unavailable"
            assert httpx.get(live.url + "/ready").status_code == 503
            assert httpx.get(live.url + "/health").status_code == 200
            gate.set()
            rest = list(lines)
            assert any("late" in line for line in rest) and "data: [DONE]" in rest
        live.join()
    assert fake_engine.state == "stopped" and not fake_engine.cancelled


def test_draining_ends_after_its_timeout_and_tells_those_it_cuts_off(
    fake_engine: FakeEngine, store: MemoryStore
) -> None:
    with live_server(fake_engine, store, drain_timeout_s=0.1) as live:
        fake_engine.script = plays(TextEvent(0, "early"), threading.Event())
        with httpx.stream("POST", live.url + PATH, json=chat_body(stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            live.signal(signal.SIGTERM)
            rest = [line for line in lines if line]
            assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == (
                "generation_draining"
            )
        live.join()


def test_a_body_that_never_comes_is_a_408(fake_engine: FakeEngine, store: MemoryStore) -> None:
    with live_server(fake_engine, store, request_timeout_s=0.05) as live:
        connection = live.connect()
        connection.sendall(
            f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            "content-length: 10\r\n\r\n{".encode()
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
        connection.close()


def test_a_large_body_is_refused_while_it_is_being_sent(
    fake_engine: FakeEngine, store: MemoryStore
) -> None:
    with live_server(fake_engine, store, max_body_bytes=100_000) as live:
        connection = live.connect()
        connection.sendall(
            f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            "transfer-encoding: chunked\r\n\r\n".encode()
        )
        chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
        for _ in range(4):
            connection.sendall(chunk)
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")
        connection.close()
        assert httpx.post(live.url + PATH, json=chat_body()).status_code == 200


def test_a_client_that_leaves_while_its_prompt_is_prepared_is_not_generated_for(
    live: LiveServer, fake_engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody looked for the client until the engine ran: what waited for the pool was decoded."""
    fake_engine.prepare_gate = threading.Event()
    pool = live.services.pool
    held = [pool.submit(fake_engine.prepare_gate.wait, 10) for _ in range(8)]
    connection = send(live, chat_body(images=1))
    wait_until(lambda: live.services.bodies.held > 0)
    connection.close()
    wait_until(lambda: live.services.in_flight.count == 0)
    fake_engine.prepare_gate.set()
    assert all(future.result() for future in held)
    assert httpx.post(live.url + PATH, json=chat_body("after")).status_code == 200
    assert len(fake_engine.prompts) == len(fake_engine.requests) == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(
    live: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It was logged as a failure of ours, with a traceback and status 500."""
    caplog.set_level(logging.INFO, "deshift.requests")
    connection = live.connect()
    connection.sendall(
        f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        "content-length: 10\r\n\r\n{".encode()
    )
    wait_until(lambda: live.services.bodies.held == 1)  # what has come of the ten
    connection.close()
    wait_until(lambda: live.services.in_flight.count == 0)
    assert live.services.bodies.held == 0
    (line,) = caplog.messages
    assert "status=499" in line


def test_the_second_signal_ends_running_requests_at_once(
    fake_engine: FakeEngine, store: MemoryStore
) -> None:
    """It only cut the wait for uvicorn's connections: the engine went on for drain_timeout_s."""
    with live_server(fake_engine, store, drain_timeout_s=60.0) as live:
        fake_engine.script = plays(TextEvent(0, "early"), threading.Event())
        with httpx.stream("POST", live.url + PATH, json=chat_body(stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            live.signal(signal.SIGTERM)
            wait_until(lambda: fake_engine.state == "draining")
            start = time.monotonic()
            live.signal(signal.SIGINT)
            rest = [line for line in lines if line]
            assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == (
                "generation_draining"
            )
        live.join()
        assert time.monotonic() - start < 4
    assert fake_engine.state == "stopped"


def test_the_second_signal_does_not_wait_for_a_body_that_never_comes(
    fake_engine: FakeEngine, store: MemoryStore
) -> None:
    with live_server(fake_engine, store) as live:
        connection = live.connect()
        connection.sendall(
            f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            "content-length: 10\r\n\r\n{".encode()
        )
        wait_until(lambda: live.services.in_flight.count == 1)
        start = time.monotonic()
        live.signal(signal.SIGTERM)
        live.signal(signal.SIGTERM)
        live.join()
        assert time.monotonic() - start < 4  # uvicorn's own wait is LAST_BYTES_S
        connection.close()


# -------------------------------------------------------------------------------------- startup


def test_a_taken_port_is_named_before_a_model_is_loaded() -> None:
    with listening_socket(make_settings()) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"127.0.0.1:{port}.*--port"):
            listening_socket(make_settings(port=port))


def test_a_taken_admin_port_is_named_before_a_model_is_loaded() -> None:
    with admin_socket(make_settings(admin_port=0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"127.0.0.1:{port}.*DESHIFT_ADMIN_PORT"):
            serve(make_settings(admin_port=port, model="./none"))


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(StartupError, match="no.such.host.invalid:0"):
        listening_socket(make_settings(host="no.such.host.invalid", api_key="k"))


@pytest.mark.parametrize(
    ("changes", "word"),
    [({}, "DESHIFT_MODEL"), ({"model": "./none"}, "./none"), ({"store": "ftp://x"}, "ftp://x")],
)
def test_startup_failures_are_one_line(changes: dict[str, Any], word: str) -> None:
    with pytest.raises((ServerError, SteeringError), match=word) as caught:
        serve(make_settings(admin_port=0, **changes))
    assert "\n" not in str(caught.value)


def test_an_engine_that_does_not_start_stops_the_server(
    fake_engine: FakeEngine, store: MemoryStore
) -> None:
    """The canary's message must come out as it is, not as a traceback in uvicorn's log."""
    import asyncio

    from server.app import create_app
    from server.serve import run

    fake_engine.start_error = EngineError("the canary failed at layer 3")
    app = create_app(make_settings(), engine=fake_engine, store=store)
    with (
        listening_socket(make_settings()) as sock,
        admin_socket(make_settings(admin_port=0)) as admin_sock,
        pytest.raises(EngineError, match="canary failed at layer 3"),
    ):
        asyncio.run(run(app, sock, admin_sock))
    assert fake_engine.state == "stopped"


def test_no_model_is_a_clear_error() -> None:
    from server.app import build_engine

    with pytest.raises(ServerError, match="--model"):
        build_engine(make_settings())


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
    assert httpx.get(server_process.admin_url + tenants, headers=key).status_code == 200
    assert httpx.get(server_process.admin_url + tenants).status_code == 401
    assert httpx.get(server_process.url + tenants).status_code == 404
    # An operator's key is no client's, and operators' listener answers no client.
    answer = httpx.post(server_process.url + PATH, json=chat_body(), headers=key)
    assert answer.status_code == 401
    answer = httpx.post(server_process.admin_url + PATH, json=chat_body(), headers=key)
    assert answer.status_code == 404
    for url in (server_process.url, server_process.admin_url):
        assert httpx.get(url + "/health").status_code == 200
        assert httpx.get(url + "/ready").status_code == 200
    server_process.process.send_signal(signal.SIGTERM)
    assert "Traceback" not in server_process.end()


def test_a_header_does_not_choose_the_address_whose_wrong_keys_are_counted(
    server_process: ServerProcess,
) -> None:
    """Whoever guessed from this machine had a new address with every guess."""
    answers = [
        httpx.get(
            f"{server_process.admin_url}/admin/v1/tenants",
            headers={"authorization": "Bearer wrong", "x-forwarded-for": f"10.0.0.{number}"},
        )
        for number in range(11)
    ]
    assert [each.status_code for each in answers] == [401] * 10 + [429]


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
