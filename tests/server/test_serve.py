"""A server on a real socket: clients that leave, bodies that never come, draining."""

import asyncio
import gc
import json
import logging
import signal
import socket
import threading
import time
from typing import Any

import anyio
import httpx
import pytest

from server.app import create_app
from server.engine.types import EngineInputs, TextEvent
from server.process import free_port
from server.serve import admin_socket, listening_socket, run
from steering.stores import MemoryStore
from tests.server.conftest import LiveServer, live_server, make_settings, wait_until
from tests.server.fakes import FakeEngine, chat_body, make_prompt, plays, says

PATH = "/v1/chat/completions"


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


@pytest.mark.anyio
async def test_what_stays_for_good_is_not_walked_by_the_garbage_collector() -> None:
    """A walk over the libraries' objects held every stream up for 200 ms."""
    settings = make_settings(admin_port=free_port())
    app = create_app(settings, engine=FakeEngine())
    with listening_socket(settings) as sock, admin_socket(settings) as for_operators:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        serving = asyncio.create_task(run(app, sock, for_operators))
        async with httpx.AsyncClient(trust_env=False) as client:
            with anyio.fail_after(10):
                while not await answers(client, f"{url}/health"):
                    await asyncio.sleep(0.01)
        assert gc.get_freeze_count() > 100_000
        serving.cancel()
        await asyncio.wait([serving])
    assert gc.get_freeze_count() == 0


async def answers(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).status_code == 200
    except httpx.ConnectError:
        return False
