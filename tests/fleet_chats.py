"""Clients of a running server: a streamed answer about a picture, and all that was seen of it."""

import base64
import io
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.server.engine.conftest import picture

QUESTION = "What does the zebra say"


def chat(
    text: str = QUESTION, *, max_tokens: int = 8, with_picture: bool = True, seed: int = 1
) -> dict[str, Any]:
    """A request's body; the answer is streamed and has exactly `max_tokens` tokens.

    seed: another one is another picture.
    """
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if with_picture:
        parts.insert(0, {"type": "image_url", "image_url": {"url": picture_url(seed)}})
    return {
        "model": "tiny-llava",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    }


def picture_url(seed: int = 1) -> str:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass
class Answer:
    """What a client saw of one streamed answer. started, ended: monotonic seconds."""

    replica: str
    started: float
    status: int = 0
    steering: str = ""  # the header
    revisions: list[int] = field(default_factory=list)  # of every chunk
    text: str = ""
    is_done: bool = False
    problem: str = ""
    ended: float = 0.0

    @property
    def said(self) -> dict[str, str]:
        """The header, by name."""
        return (
            dict(part.split("=", 1) for part in self.steering.split("; ")) if self.steering else {}
        )


def stream_chat(
    url: str, replica: str, key: str, body: dict[str, Any], client: httpx.Client | None = None
) -> Answer:
    """Read one answer to its end; nothing is raised, everything is told."""
    answer = Answer(replica, time.monotonic())
    try:
        with ExitStack() as stack:
            client = client or stack.enter_context(httpx.Client(timeout=60))
            headers = {"authorization": f"Bearer {key}"}
            path = f"{url}/v1/chat/completions"
            response = stack.enter_context(client.stream("POST", path, json=body, headers=headers))
            answer.status = response.status_code
            answer.steering = response.headers.get("x-deshift-steering", "")
            if response.status_code != 200:
                answer.problem = response.read().decode()
                return answer
            for line in response.iter_lines():
                _read_line(answer, line)
    except httpx.HTTPError as error:
        answer.problem = repr(error)
    finally:
        answer.ended = time.monotonic()
    return answer


def _read_line(answer: Answer, line: str) -> None:
    if line == "data: [DONE]":
        answer.is_done = True
    elif line.startswith("data: "):
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            answer.problem = str(chunk["error"])
            return
        answer.revisions.append(chunk["steering_revision"])
        answer.text += "".join(each["delta"].get("content") or "" for each in chunk["choices"])


def check_steered(answers: Iterable[Answer], alphas: Mapping[int, float] | None = None) -> None:
    """Every one complete and steered by one policy from first to last; `alphas` by revision."""
    for answer in answers:
        assert (answer.status, answer.problem, answer.is_done) == (200, "", True), answer
        said = answer.said
        assert said["mode"] == "dataset" and float(said["alpha"]) > 0, answer.steering
        assert set(answer.revisions) == {int(said["revision"])}, answer
        if alphas is not None:
            assert float(said["alpha"]) == alphas[int(said["revision"])], answer.steering
