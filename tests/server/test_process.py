"""Child servers: readiness, a death that is explained, an end that leaves nothing behind."""

import signal
import sys
from pathlib import Path

import pytest

from server.process import ChildError, child_server, free_port, is_port_free

SERVE = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1"]


def test_a_child_is_ready_inside_and_gone_outside(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    with child_server([*SERVE, str(port)], ready_url=url, log=tmp_path / "log") as process:
        assert process.poll() is None
        assert not is_port_free(port)
    assert process.returncode == -signal.SIGTERM
    assert is_port_free(port)


def test_a_child_that_dies_early_is_quoted(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no model here')"]
    with (
        pytest.raises(ChildError, match="ended with status 1(.|\n)*no model here"),
        child_server(command, ready_url="http://127.0.0.1:9/", log=tmp_path / "log"),
    ):
        pytest.fail("it never became ready")


def test_a_silent_child_times_out_and_is_killed_when_it_ignores_sigterm(tmp_path: Path) -> None:
    text = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True)"
    command = [sys.executable, "-c", text + "; time.sleep(60)"]
    with (
        pytest.raises(ChildError, match="did not answer 200 within 1 s but: ConnectError"),
        child_server(
            command, ready_url="http://127.0.0.1:9/", log=tmp_path / "log", timeout_s=1, grace_s=0.2
        ),
    ):
        pytest.fail("it never became ready")


@pytest.mark.parametrize("env", [{"EXTRA": "given"}, None])
def test_the_environment_is_the_given_one_or_ours(
    tmp_path: Path, env: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURS", "kept")
    text = "import os; print(os.environ.get('EXTRA'), os.environ.get('OURS'))"
    with (
        pytest.raises(ChildError, match="given None" if env else "None kept"),
        child_server(
            [sys.executable, "-c", text],
            ready_url="http://127.0.0.1:9/",
            log=tmp_path / "log",
            env=env,
        ),
    ):
        pytest.fail("it never became ready")
