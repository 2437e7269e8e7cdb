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


@dataclass
class Script:
    """`accepts`: the fields beyond OpenAI's that this server knows; others are refused."""

    accepts: frozenset[str] = frozenset({"ignore_eos", "stream_options", "steering"})
    refusal_status: int = 400
    gap_s: float = 0.0
    fail: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def fake_server(script: Script) -> Iterator[str]:
    """The server's URL; it runs in threads until the block ends."""

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
            else:
                self._stream(body)

        def _stream(self, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            steering = body.get("steering", {}).get("mode", "dataset")
            self.send_header("x-deshift-steering", f"mode={steering}")
            self.end_headers()
            config = json.loads(body.get("generation_config", "{}"))
            exact = body.get("ignore_eos") or "min_new_tokens" in config
            num_tokens = body["max_tokens"] if exact else min(NATURAL_LEN, body["max_tokens"])
            self._event({"choices": [{"delta": {"role": "assistant"}}]})
            for index in range(num_tokens):
                time.sleep(script.gap_s)
                self._event({"choices": [{"delta": {"content": f"word{index} "}}]})
            wants_usage = body.get("stream_options", {}).get("include_usage")
            if wants_usage or "generation_config" in script.accepts:
                usage = {"prompt_tokens": 40, "completion_tokens": num_tokens}
                self._event({"choices": [], "usage": usage})
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
