"""Other servers as child processes: start one, wait until it answers, end it.

Knows nothing of what they serve. For the commands only.
"""

import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

POLL_S = 0.1


class ChildError(Exception):
    """A child process ended or stayed silent; the message holds the end of its log."""


@contextmanager
def child_server(
    command: Sequence[str],
    *,
    ready_url: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300.0,
    grace_s: float = 20.0,
) -> "Iterator[subprocess.Popen[bytes]]":
    """Run `command` until the block ends; enter the block once `ready_url` answers 200.

    `env` is its whole environment, by default this process's; output goes to `log`. The child has
    a process group of its own, so that Ctrl-C in a terminal reaches it only through us. It is asked
    to end with SIGTERM and killed after `grace_s`. Raises ChildError when it ends or times out
    first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
    try:
        _wait(process, ready_url, log, timeout_s)
        yield process
    finally:
        _end(process, grace_s)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def is_port_free(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def end_of_log(log: Path, num_lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    last_answer = "no answer"
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ChildError(
                    f"{_shown(process)} ended with status {process.returncode} before {url} "
                    f"answered. The end of {log}:\n{end_of_log(log)}"
                )
            try:
                response = client.get(url)
                if response.status_code == 200:
                    return
                last_answer = f"{response.status_code} {response.text[:500]}"
            except httpx.TransportError as error:
                last_answer = repr(error)
            time.sleep(POLL_S)
    raise ChildError(
        f"{url} did not answer 200 within {timeout_s:.0f} s but: {last_answer}. "
        f"The end of {log}:\n{end_of_log(log)}"
    )


def _shown(process: "subprocess.Popen[bytes]") -> str:
    return shlex.join(process.args) if isinstance(process.args, list) else str(process.args)


def _end(process: "subprocess.Popen[bytes]", grace_s: float) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
