"""A model on disk, a store and `deshift serve` on them as a process, with the official client."""

import base64
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.redis_server import free_port
from tests.server.engine.conftest import picture

ANCHORS = [
    {"label": label, "text": f"{verb} the {noun}."}
    for label, verb in (("harmful", "Break"), ("harmless", "Mend"))
    for noun in ("chair", "old clock", "garden gate")
]


def deshift(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments],
        env=os.environ | {"DESHIFT_ADMIN_PORT": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@dataclass(frozen=True)
class Site:
    """A tiny model on disk and a store with its vectors in force."""

    model: Path
    store: Path
    vector_id: str

    @property
    def store_url(self) -> str:
        return f"sqlite:///{self.store}"


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    log: Path
    clients: list[openai.OpenAI] = field(default_factory=list)

    def client(self, api_key: str = "unused") -> openai.OpenAI:
        client = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=api_key,
            max_retries=0,
            _strict_response_validation=True,
        )
        self.clients.append(client)
        return client

    def ready(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/ready").json()

    def wait_until_ready(self, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                httpx.get(f"{self.url}/ready")
                return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(f"not up within {timeout_s} s: {self.log.read_text()}")

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


@contextmanager
def serving(site: Site, tmp_path: Path, **environment: str) -> Iterator[Server]:
    """`deshift serve` as a process; killed at the end if it still runs."""
    port = free_port()
    log = tmp_path / f"server-{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "server.cli", "serve", "--model", str(site.model)),
                *("--port", str(port), "--store", site.store_url, "--dtype", "float32"),
                *("--max-model-len", "512", "--alpha", "0.5", "--max-rows", "16"),
            ],
            env=os.environ | {"DESHIFT_ADMIN_PORT": "0"} | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        server = Server(process, f"http://127.0.0.1:{port}", log)
        try:
            server.wait_until_ready()
            yield server
        finally:
            for client in server.clients:
                client.close()
            process.kill()
            process.wait()


def png_url(seed: int = 1) -> str:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def about(text: str, *seeds: int) -> Any:
    """One user turn with a picture a seed."""
    pictures = [{"type": "image_url", "image_url": {"url": png_url(seed)}} for seed in seeds]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


FAST: dict[str, Any] = {"model": "tiny-llava", "max_tokens": 8, "temperature": 0}
ENDLESS: dict[str, Any] = FAST | {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
