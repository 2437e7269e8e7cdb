"""Start the servers to compare on the same checkpoint: Deshift itself and `transformers serve`."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from server.bench.target import Target
from server.process import child_server, free_port

# It needs openai and accelerate beside what Deshift installs: pip install 'deshift[reference]'.
# It batches text models only: chats with a vision-language model run one after the other.
TRANSFORMERS_SERVE = "from transformers.cli.transformers import main; main()"


@contextmanager
def transformers_serve(model: Path, logs: Path, dtype: str) -> Iterator[Target]:
    """`transformers serve` on a free loopback port, pinned to `model`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", TRANSFORMERS_SERVE, "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    log = logs / "transformers-serve.log"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with child_server(command, ready_url=f"{url}/health", log=log, env=env):
        yield Target("transformers", url, model=str(model))


@contextmanager
def deshift_serve(
    model: Path, logs: Path, dtype: str, env: Mapping[str, str] | None = None
) -> Iterator[Target]:
    """This server on a free loopback port, with the settings of `env` or of this environment."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "server.cli", "serve", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    with child_server(command, ready_url=f"{url}/ready", log=logs / "deshift-serve.log", env=env):
        yield Target("deshift", url)
