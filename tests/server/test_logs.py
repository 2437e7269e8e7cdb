"""The log as text and as JSON: what a line holds, what it never holds, that none can be forged."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from server.directory import Principal
from server.engine.types import Failed, RequestTimings, TextEvent
from server.logs import JsonLines, RequestLine, TextLines
from server.record import CHAT, RequestRecord
from server.steered import Overhead, Steered
from steering.plan import SteeringPlan
from tests.server.fakes import FakeEngine, chat_body, plays
from tests.tiny_models import TinyModel

METHOD, PATH = CHAT
KEY = "s3cret-key-of-a-client"
FORGED = '/x"\r\n{"level": "INFO"}\u2028\x1b[2J\x85'
VECTOR = "f" * 64


class Lines(logging.Handler):
    """What a handler with this formatter would have written."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


@pytest.fixture
def written() -> Iterator[Callable[[logging.Formatter], Lines]]:
    """Collects everything that is logged, from DEBUG on, in a format."""
    root, handlers, level = logging.getLogger(), [], logging.getLogger().level

    def collect(formatter: logging.Formatter) -> Lines:
        handlers.append(Lines(formatter))
        root.addHandler(handlers[-1])
        root.setLevel(logging.DEBUG)
        return handlers[-1]

    yield collect
    for handler in handlers:
        root.removeHandler(handler)
    root.setLevel(level)


def log_record(message: str, *args: object, **values: Any) -> logging.LogRecord:
    record = logging.LogRecord("some.library", logging.WARNING, __file__, 1, message, args, None)
    record.created = 1_795_000_000.5
    for name, value in values.items():
        setattr(record, name, value)
    return record


def failed_record() -> logging.LogRecord:
    try:
        raise ValueError("first\n2026-11-21T00:00:00.000Z INFO deshift forged\rlast")
    except ValueError:
        return log_record("it failed", exc_info=sys.exc_info())


def chat_record(**changes: Any) -> RequestRecord:
    plan = SteeringPlan(
        mode="dataset", alpha=0.37, vector_id=VECTOR, revision=12, reason=None, max_relative_dose=1
    )
    values: dict[str, Any] = {
        "method": METHOD,
        "path": PATH,
        "principal": Principal("acme", "web"),
        "status": 200,
        "has_images": True,
        "prompt_tokens": 80,
        "completion_tokens": 7,
        "cached_tokens": 64,
        "steered": Steered(plan, 0.25, Overhead(store_s=0.001, admission_s=0.002)),
        "stages": {"admission": 0.002, "media": 0.03},
        "timings": RequestTimings(
            queue_s=0.1, prefill_s=0.2, time_to_first_token_s=0.3, e2e_s=1.0, inject_s=0.004
        ),
        "projection": 0.5,
        "trace_id": "a" * 32,
        "started": 100.0,
        "ended_at": 101.5,
    }
    return RequestRecord("r1", **{**values, **changes})


def test_the_line_of_a_request_as_json_is_exactly_this() -> None:
    record = log_record("")
    record.msg = RequestLine(chat_record())
    assert json.loads(JsonLines().format(record)) == {
        "timestamp": "2026-11-18T11:06:40.500Z",
        "level": "WARNING",
        "logger": "some.library",
        "message": "POST /v1/chat/completions 200",
        "request_id": "r1",
        "trace_id": "a" * 32,
        "tenant": "acme",
        "key": "web",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "seconds": 1.5,
        "stages_ms": {"admission": 2.0, "media": 30.0},
        "has_images": True,
        "is_streamed": False,
        "projection": 0.5,
        "steering": {
            "mode": "dataset",
            "method": "subtract",
            "alpha": 0.37,
            "vector": VECTOR,
            "revision": 12,
            "relative_dose": 0.25,
        },
        "prompt_tokens": 80,
        "completion_tokens": 7,
        "cached_tokens": 64,
        "queue_ms": 100.0,
        "ttft_ms": 300.0,
        "overhead_ms": 7.0,  # 1 store, 2 admission, 4 inject
    }


def test_as_text_it_is_one_line_of_names_and_values() -> None:
    record = log_record("")
    record.msg = RequestLine(chat_record(failure="timeout"))
    assert TextLines().format(record) == (
        "2026-11-18T11:06:40.500Z WARNING some.library request_id=r1 tenant=acme key=web "
        "method=POST path='/v1/chat/completions' status=200 prompt_tokens=80 completion_tokens=7 "
        f"steering=mode=dataset;alpha=0.37;schedule=all;vector={VECTOR};revision=12 seconds=1.500 "
        f"failure=timeout trace_id={'a' * 32}"
    )


def test_numbers_that_json_has_not_are_left_out() -> None:
    record = log_record("")
    record.msg = RequestLine(chat_record(projection=float("nan"), timings=None))
    line = JsonLines().format(record)
    assert "NaN" not in line
    assert json.loads(line).keys().isdisjoint({"projection", "ttft_ms", "prompt_tokens"})


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
def test_no_record_can_hold_a_line_end_or_what_a_terminal_obeys(
    formatter: logging.Formatter,
) -> None:
    line = formatter.format(log_record("asked for %s", FORGED))
    assert len(line.splitlines()) == 1
    assert line.isprintable()


def test_json_says_what_text_escapes() -> None:
    assert json.loads(JsonLines().format(log_record("%s", FORGED)))["message"] == FORGED
    assert r'/x"\r\n{"level": "INFO"}\u2028\x1b[2J\x85' in TextLines().format(
        log_record("%s", FORGED)
    )


def test_an_exception_is_one_line_of_json() -> None:
    line = JsonLines().format(failed_record())
    assert len(line.splitlines()) == 1
    exception = json.loads(line)["exception"]
    assert exception.startswith("Traceback") and exception.endswith("forged\rlast")


def test_no_line_of_a_traceback_looks_like_a_record_in_text() -> None:
    first, *rest = TextLines().format(failed_record()).split("\n")
    assert first.endswith("it failed")
    assert any("INFO deshift forged" in line for line in rest)
    assert all(line.startswith("    ") and line.isprintable() for line in rest)


def test_fields_of_other_records_are_kept_and_colours_are_not() -> None:
    told = json.loads(
        JsonLines().format(log_record("x", request_id="r1", color_message="\x1b[1mx\x1b[0m"))
    )
    assert told["request_id"] == "r1"
    assert told.keys() == {"timestamp", "level", "logger", "message", "request_id"}


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
def test_a_path_with_line_ends_and_quotes_stays_one_line(
    client: TestClient,
    written: Callable[[logging.Formatter], Lines],
    formatter: logging.Formatter,
) -> None:
    lines = written(formatter)
    client.get("/x%0d%0a%22,%22status%22:200%0a%27 status=200")
    (line,) = [text for text in lines.texts if "deshift.requests" in text]
    assert len(line.splitlines()) == 1
    if isinstance(formatter, JsonLines):
        told = json.loads(line)
        assert (told["path"], told["status"]) == ('/x\r\n","status":200\n\' status=200', 404)


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
def test_no_key_prompt_answer_or_picture_is_in_the_log_of_a_run(
    client_for: Callable[..., TestClient],
    fake_engine: FakeEngine,
    written: Callable[[logging.Formatter], Lines],
    formatter: logging.Formatter,
) -> None:
    """Pitfall 21: answers, refusals, failures before and within an answer, an error of ours."""
    client = client_for(api_key=KEY)
    lines = written(formatter)
    headers = {"authorization": f"Bearer {KEY}"}
    body = chat_body("PROMPT", images=1)
    statuses = [client.post(PATH, json=body, headers=headers).status_code]
    statuses.append(client.post(PATH, json=body | {"n": "PROMPT"}, headers=headers).status_code)
    statuses.append(client.post(PATH, json=body, headers={"authorization": KEY}).status_code)
    fake_engine.script = plays(TextEvent(0, "Hello"), Failed("engine", "the engine's words"))
    client.post(PATH, json=body | {"stream": True}, headers=headers)
    statuses.append(client.post(PATH, json=body, headers=headers).status_code)
    assert statuses == [200, 400, 401, 500]
    told = [text for text in lines.texts if "deshift.requests" in text]
    assert len(told) == 5
    for secret in ("PROMPT", "Hello", KEY, "base64", "iVBOR"):
        assert secret not in "\n".join(lines.texts)
    if isinstance(formatter, JsonLines):
        ended = [json.loads(line) for line in told]
        assert [line["status"] for line in ended] == [200, 400, 401, 200, 500]
        assert ended[3]["failure"] == "engine" and "failure" not in ended[0]
        assert "tenant" not in ended[2] and ended[0]["key"] == "settings"


def test_an_error_of_ours_carries_the_request_s_id_as_a_field(
    client: TestClient, fake_engine: FakeEngine, written: Callable[[logging.Formatter], Lines]
) -> None:
    fake_engine.prepare_error = RuntimeError("broken\nin two")
    lines = written(JsonLines())
    answer = client.post(PATH, json=chat_body())
    assert answer.status_code == 500
    told = [json.loads(text) for text in lines.texts]
    (failed,) = [line for line in told if line.get("exception")]
    assert failed["request_id"] == answer.headers["x-request-id"]
    assert failed["exception"].endswith("RuntimeError: broken\nin two")


@pytest.fixture(scope="module")
def model_dir(tiny_llava: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava.save(tmp_path_factory.mktemp("model") / "tiny-llava")


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            httpx.get(url)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_every_line_of_a_server_s_log_is_json(model_dir: Path, tmp_path: Path) -> None:
    """The whole process: what libraries say while the model loads, uvicorn's warnings, the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log, url = tmp_path / "log", f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "serve", "--model", str(model_dir)]
            + ["--port", str(port), "--store", f"sqlite:///{tmp_path / 'db'}"]
            + ["--steering-mode", "sample", "--max-model-len", "512"],
            env=os.environ | {"DESHIFT_LOG_FORMAT": "json", "DESHIFT_ADMIN_PORT": "0"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(f"{url}/ready", process, log)
            with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
                raw.sendall(b"NOT HTTP AT ALL\r\n\r\n")
                assert raw.recv(100).startswith(b"HTTP/1.1 400")
            body = chat_body("PROMPT", max_tokens=2) | {"model": "tiny-llava"}
            answer = httpx.post(f"{url}{PATH}", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all({"timestamp", "level", "logger", "message"} <= line.keys() for line in lines)
    assert all(line["timestamp"].endswith("Z") for line in lines)
    (mine,) = [line for line in lines if line.get("path") == PATH]
    assert mine["request_id"] == answer.headers["x-request-id"]
    assert mine["completion_tokens"] == 2 and mine["overhead_ms"] >= 0
    assert any(line["logger"] == "uvicorn.error" for line in lines), "its warnings, too"
    assert "PROMPT" not in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_warnings_and_what_nobody_caught_are_records_too(log_format: str) -> None:
    script = f"""
import threading, warnings
from server.logs import configure_logging
configure_logging({log_format!r})
warnings.warn("first\\nsecond")
thread = threading.Thread(target=lambda: 1 / 0, name="worker")
thread.start()
thread.join()
raise OSError("the\\nend")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 1
    lines = ended.stderr.splitlines()
    if log_format == "text":
        records = [line for line in lines if not line.startswith("    ")]
        assert [line.split()[1] for line in records] == ["WARNING", "CRITICAL", "CRITICAL"]
        return
    told = [json.loads(line) for line in lines]
    assert [line["logger"] for line in told] == ["py.warnings", "deshift", "deshift"]
    assert "first\nsecond" in told[0]["message"]
    assert told[1]["message"] == "thread worker ended by an error"
    assert "ZeroDivisionError" in told[1]["exception"]
    assert told[2]["exception"].endswith("OSError: the\nend")
