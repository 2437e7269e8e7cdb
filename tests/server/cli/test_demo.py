"""`deshift demo`: its messages against scripted answers; the real one in a slow test."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from server.cli.main import app
from server.config import Settings
from server.demo import cases, setup, show
from server.process import free_port, is_port_free

ROOT = Path(__file__).parents[3]


@pytest.fixture
def answering() -> Iterator[httpx.Client]:
    """A server that answers with what it was asked, and refuses unsteered requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            kinds = ",".join(part["type"] for part in body["messages"][0]["content"])
            unsteered = body.get("steering") == {"mode": "off"}
            self.send_response(403 if unsteered else 200)
            self.send_header("x-deshift-steering", "mode=dataset; alpha=0.2")
            self.end_headers()
            answer = {"choices": [{"message": {"content": f"got {kinds} [/]"}}]}
            self.wfile.write(json.dumps({"error": "no"} if unsteered else answer).encode())

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with httpx.Client(base_url=f"http://127.0.0.1:{server.server_address[1]}") as client:
            yield client
        server.shutdown()


def test_the_rows_are_the_five_that_are_promised() -> None:
    rows = [(bool(case.image_url), case.extra != {}) for case in cases.cases()]
    assert rows == [(False, False), (True, True), (True, False), (True, True), (True, False)]


def test_answers_are_shown_verbatim_and_refusals_of_the_server_are_quoted(
    answering: httpx.Client,
) -> None:
    text_only, unsteered, steered, *_ = cases.cases()
    shown = [cases.ask(answering, case, "m") for case in (text_only, steered)]
    assert [row.answer for row in shown] == ["got text [/]", "got image_url,text [/]"]
    with pytest.raises(cases.DemoError, match='403 {"error": "no"}'):
        cases.ask(answering, unsteered, "m")
    output = StringIO()
    Console(file=output, width=120).print(show.table(shown))
    assert "got image_url,text [/]" in output.getvalue()
    assert "mode=dataset; alpha=0.2" in output.getvalue()


def test_the_snippets_run_as_printed(answering: httpx.Client, tmp_path: Path) -> None:
    case = cases.cases()[2]
    url = str(answering.base_url)
    lines = show.next_steps(url, tmp_path, cases.photograph(), case).splitlines()
    [curl] = [line for line in lines if line.startswith("curl")]
    done = subprocess.run(curl, shell=True, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "got image_url,text [/]"
    start = next(i for i, line in enumerate(lines) if line.startswith("import base64"))
    snippet = "\n".join(lines[start:])
    refused = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
    assert "PermissionDenied" in refused.stderr  # the unsteered request, which this server refuses
    snippet = "\n".join(line for line in lines[start:] if "leave this line out" not in line)
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
    assert done.stdout == "got image_url,text [/]\n", done.stderr


def test_a_taken_port_is_named_before_anything_is_built(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cache = tmp_path / "cache"
        result = CliRunner().invoke(
            app, ["demo", "--port", str(port)], env={"DESHIFT_CACHE": str(cache)}
        )
    assert result.exit_code == 1
    assert f"port {port} is taken" in result.output and f"PORT={port + 1}" in result.output
    assert not cache.exists()


def test_none_of_the_callers_settings_reaches_the_demonstrations_server() -> None:
    """An API key made its own requests 401, and a DESHIFT_REVISION stopped the start."""
    caller = {
        "PATH": "/bin",
        "DESHIFT_API_KEY": "k",
        "DESHIFT_REVISION": "main",
        "DESHIFT_CACHE": "/there",
        "DESHIFT_HOST": "0.0.0.0",
    }
    assert setup.cache_dir(caller) == Path("/there")
    assert setup.cache_dir({}) == Settings().cache
    variables = {"DESHIFT_CACHE": "/here", "DESHIFT_MODEL": "/here/model"}
    assert setup.environment(variables, caller) == {"PATH": "/bin", **variables}


@pytest.mark.slow
def test_the_demonstration_from_nothing_to_its_table_and_again(tmp_path: Path) -> None:
    """Nothing of it is left running; the second time it is quick."""
    environment = os.environ | {
        "DESHIFT_CACHE": str(tmp_path),
        "DESHIFT_API_KEY": "meant for another server",
        "DESHIFT_REVISION": "main",
    }
    port = free_port()
    command = [sys.executable, "-m", "server.cli", "demo", "--once", "--port", str(port)]
    for _ in range(2):
        start = time.monotonic()
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
        )
        seconds = time.monotonic() - start
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Answers of the running server, verbatim" in done.stdout
        assert done.stdout.count("mode=dataset") >= 2
        assert is_port_free(port)
    assert seconds < 60  # 20 on an idle machine
