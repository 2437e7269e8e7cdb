"""A scripted OpenAI-compatible server on a loopback port: streams words at a fixed pace."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NATURAL_LEN = 3
TOKENS_PER_WORD = 2
IMAGE_TOKENS = 40


@dataclass
class Script:
    """`accepts`: the fields beyond OpenAI's that this server knows; others are refused.

    prefill_s: seconds a prompt token, in which no answer gets on; pictures that it has seen cost
    nothing. shift_ms: what it says that mode `sample` took, and takes. num_broken: answers whose
    client went away. rows: answers at once, others wait; max_waiting: beyond these, 429.
    """

    accepts: frozenset[str] = frozenset(
        {"ignore_eos", "stream_options", "steering", "n", "logprobs"}
    )
    refusal_status: int = 400
    gap_s: float = 0.0
    prefill_s: float = 0.0
    shift_ms: float = 0.0
    fail: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    num_broken: int = 0
    rows: int = 1000
    max_waiting: int = 1000
    engine: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def fake_server(script: Script) -> Iterator[str]:
    """The server's URL; it runs in threads until the block ends."""
    seen: set[str] = set()
    rows = threading.Semaphore(script.rows)
    places = threading.Semaphore(script.rows + script.max_waiting)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(200, {"object": "list", "data": [{"id": "the-model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            script.bodies.append(body)
            plain = {"model", "messages", "max_tokens", "temperature", "stream"}
            if unknown := body.keys() - plain - script.accepts:
                self._answer(script.refusal_status, {"detail": f"unexpected {sorted(unknown)}"})
            elif script.fail and body["max_tokens"] > 2:
                self._answer(503, {"error": {"message": "no room"}})
            elif not places.acquire(blocking=False):
                self._answer(429, {"error": {"message": "the queue is full"}})
            else:
                try:
                    with rows:
                        self._stream(body)
                except (BrokenPipeError, ConnectionResetError):
                    script.num_broken += 1
                finally:
                    places.release()

        def _stream(self, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            steering = body.get("steering", {}).get("mode", "dataset")
            self.send_header("x-deshift-steering", f"mode={steering}")
            self.end_headers()
            num_prompt, num_cached = _prompt_tokens(body, seen)
            shift_ms = script.shift_ms if steering == "sample" else 0.0
            with script.engine:
                time.sleep(script.prefill_s * (num_prompt - num_cached) + shift_ms / 1000)
            config = json.loads(body.get("generation_config", "{}"))
            exact = body.get("ignore_eos") or "min_new_tokens" in config
            num_tokens = body["max_tokens"] if exact else min(NATURAL_LEN, body["max_tokens"])
            self._event({"choices": [{"delta": {"role": "assistant"}}]})
            for index in range(num_tokens):
                time.sleep(script.gap_s)
                with script.engine:
                    self._event({"choices": [{"delta": {"content": f"word{index} "}}]})
            self._event({"choices": [{"delta": {}, "finish_reason": "length"}]})
            wants_usage = body.get("stream_options", {}).get("include_usage")
            if wants_usage or "generation_config" in script.accepts:
                usage = {
                    "prompt_tokens": num_prompt,
                    "completion_tokens": num_tokens,
                    "prompt_tokens_details": {"cached_tokens": num_cached},
                }
                applied = {"mode": steering, "overhead_ms": 1.0 + shift_ms, "shift_ms": shift_ms}
                told = {"steering": applied} if "steering" in script.accepts else {}
                self._event({"choices": [], "usage": usage, **told})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, event: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def _prompt_tokens(body: dict[str, Any], seen: set[str]) -> tuple[int, int]:
    """(all, those of pictures that were seen before); remembers the pictures."""
    total = cached = 0
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "text":
                total += TOKENS_PER_WORD * len(part["text"].split())
                continue
            url = part["image_url"]["url"]
            total += IMAGE_TOKENS
            cached += IMAGE_TOKENS if url in seen else 0
            seen.add(url)
    return total, cached
