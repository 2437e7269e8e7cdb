"""`deshift verify` from its command line: what it is told, what it writes, how it ends."""

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette

from server.process import free_port
from tests.server.cli.conftest import Deshift
from tests.server.conftest import wait_until
from tests.server.verify.scripted_server import ScriptedServer


@contextmanager
def listening(app: Starlette) -> Iterator[str]:
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_running_server_is_verified_and_everything_is_written(
    deshift: Deshift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", "sk-secret")
    written = tmp_path / "verify.json"
    server = ScriptedServer()
    with ExitStack() as stack:
        url, admin = (stack.enter_context(listening(app)) for app in (server.app, server.admin))
        command = ["verify", "--url", f"{url}/v1", "--admin-url", admin, "--rounds", "0"]
        command += ["--api-key-env", "THE_KEY", "--json", str(written), "--client-override", "any"]
        result = deshift(*command)
    assert result.exit_code == 0, result.output
    assert "10 ok, 0 failed, 1 skipped" in result.output
    report = json.loads(written.read_text())
    assert report["verified"] is True and report["url"] == url
    assert report["dtype"] == "float32", "the admin listener tells it"
    statuses = {check["name"]: check["status"] for check in report["checks"]}
    assert statuses["overhead"] == "skipped" and statuses["counters"] == "ok"
    assert report["machine"]["packages"]["torch"] and report["ready"]["status"] == "ready"
    assert "sk-secret" not in written.read_text() + result.output


def test_a_server_whose_steering_does_nothing_ends_with_1(deshift: Deshift, tmp_path: Path) -> None:
    written = tmp_path / "verify.json"
    with listening(ScriptedServer("inert").app) as url:
        result = deshift(
            *("verify", "--url", url, "--rounds", "0", "--dtype", "float32", "--json", written)
        )
    assert result.exit_code == 1
    assert "9 ok" not in result.output and "1 failed" in result.output
    assert json.loads(written.read_text())["verified"] is False


def test_a_bound_on_the_overhead_that_cannot_be_measured_fails(deshift: Deshift) -> None:
    with listening(ScriptedServer(override="none").app) as url:
        result = deshift("verify", "--url", url, "--max-overhead", "0.05")
    assert result.exit_code == 1
    assert "--max-overhead was given, and nothing was measured" in words(result.output)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of --url, --serve and --demo"),
        (["--demo", "--url", "http://x"], "give one of --url, --serve and --demo"),
        (["--demo", "--admin-url", "http://x"], "go with --url"),
        (["--url", "http://x", "--setting", "alpha=1"], "for a server that is started here"),
        (["--demo", "--rounds", "2", "--max-overhead", "0.1"], "needs --rounds 6 or more"),
        (["--url", "ftp://x"], "--url must be http(s)://HOST[:PORT]"),
        (["--url", "http://me:pw@x"], "without credentials in it"),
        (["--url", "http://x/v1?key=k"], "without credentials in it"),
        (["--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (["--url", "http://x", "--api-key-env", "NOT_THERE"], "has no NOT_THERE"),
    ],
)
def test_what_cannot_be_verified_is_said(deshift: Deshift, arguments: list[str], said: str) -> None:
    result = deshift("verify", *arguments)
    assert result.exit_code != 0
    assert words(said) in words(result.output.replace("│", " "))


def test_a_model_without_its_vectors_is_an_error(deshift: Deshift, checkpoint: Path) -> None:
    result = deshift("verify", "--serve", checkpoint, "--dtype", "float32")
    assert result.exit_code == 1
    assert "there are no vectors under the alias 'default'" in result.output


@pytest.fixture
def extracted(deshift: Deshift, checkpoint: Path, anchors: Path) -> Path:
    """The checkpoint, with vectors of its own in the command's store."""
    made = deshift(
        *("extract", "--model", checkpoint, "--anchors", anchors, "--activate"),
        *("--dtype", "float32", "--image-size", "32x32"),
    )
    assert made.exit_code == 0, made.output
    return checkpoint


@pytest.mark.slow
def test_a_model_directory_and_its_server_pass_every_check(
    deshift: Deshift, extracted: Path, tmp_path: Path
) -> None:
    written = tmp_path / "verify.json"
    command: list[str | Path] = ["verify", "--serve", extracted, "--dtype", "float32"]
    command += ["--setting", "alpha=0.5", "--setting", "max_model_len=512", "--rounds", "1"]
    command += ["--json", written, "--logs", tmp_path / "logs", "--client-override", "any"]
    result = deshift(*command)
    assert result.exit_code == 0, result.output
    assert "15 ok, 0 failed, 0 skipped" in result.output
    report = json.loads(written.read_text())
    figures = {check["name"]: check["figures"] for check in report["checks"]}
    assert [layer["layer"] for layer in figures["planned magnitude"]["layers"]] == [0, 1, 2]
    assert figures["fires"]["limit"] < 0.01 < max(figures["fires"]["gaps"]["policy"])
    assert figures["counters"]["sent"] == figures["counters"]["counted"]
    assert report["checkpoint"]
