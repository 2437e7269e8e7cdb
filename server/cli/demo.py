"""`deshift demo`: build the demonstration model, serve it, show what steering does."""

import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console

from server.cli.options import console
from server.config import PREFIX
from server.demo import cases, show
from server.errors import ServerError
from server.process import ChildError, child_server, end_of_log, free_port, is_port_free
from steering.errors import SteeringError

HOST = "127.0.0.1"


def demo(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 8000,
    once: Annotated[bool, typer.Option("--once", help="End after the table.")] = False,
) -> None:
    """Build the demonstration model, serve it and show a harmful and a harmless question.

    The server is the real one, a child process; the table holds its answers to real requests.
    """
    screen = console()
    try:
        if not is_port_free(port, HOST):
            raise cases.DemoError(
                f"port {port} is taken: choose another, `make demo PORT={port + 1}` "
                f"or `deshift demo --port {port + 1}`"
            )
        _serve_and_show(screen, port, once)
    except KeyboardInterrupt:
        screen.print("\nThe server has ended.")
    except (ChildError, ServerError, SteeringError, httpx.HTTPError) as error:
        screen.print(f"deshift demo: {error}", style="red", markup=False)
        raise typer.Exit(1) from None


def _serve_and_show(screen: Console, port: int, once: bool) -> None:
    from server.demo import setup  # torch: seconds

    cache = setup.cache_dir()
    url = f"http://{HOST}:{port}"
    log = cache / "demo-server.log"
    start = time.monotonic()
    screen.print(f"Building the demonstration model in {cache} (half a minute the first time)")
    admin_port, admin_key = free_port(), secrets.token_urlsafe(18)
    operators = {
        f"{PREFIX}ADMIN_PORT": str(admin_port),
        f"{PREFIX}ADMIN_KEYS": f"demo:{admin_key}",
    }
    env = setup.environment({**setup.prepare(cache), **operators})
    screen.print(f"Starting the server (its log: {log})")
    command = [sys.executable, "-m", "server.cli", "serve", "--host", HOST, "--port", str(port)]
    with child_server(command, ready_url=f"{url}/ready", log=log, env=env) as process:
        screen.print(f"Ready after {time.monotonic() - start:.0f} s; asking")
        every = cases.cases()
        with httpx.Client(base_url=url, timeout=120.0, trust_env=False) as client:
            rows = []
            for case in every:
                with screen.status(f"Asking: {case.title}"):  # seen on a terminal only
                    rows.append(cases.ask(client, case, cases.MODEL_NAME))
        screen.print(show.table(rows))
        if once:
            return
        folder = _short(cache / "demo")
        print(show.next_steps(url, folder, cases.photograph(), every[2]))
        print(
            f"Operators' console: http://{HOST}:{admin_port}/ (sign in with {admin_key}): "
            "change alpha there and ask again.",
            flush=True,
        )
        _wait(process, log)


def _wait(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until Ctrl-C. Raises ChildError when the server ends by itself."""
    status = process.wait()
    raise ChildError(f"the server ended with status {status}. Its last words:\n{end_of_log(log)}")


def _short(path: Path) -> Path:
    """Relative to the working directory where that is shorter to type."""
    absolute = path.absolute()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute
