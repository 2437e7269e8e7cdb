"""An OpenAI-compatible endpoint on a real socket that says what a test tells it to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from steering.evaluate.judges.endpoint import Endpoint

Said = tuple[int, str]  # status, content of the message


class ScriptedJudge:
    """says: question -> status and reply. bodies, headers: of what came in."""

    def __init__(self, says: Callable[[str], Said]) -> None:
        self.says = says
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.raw: bytes | None = None  # instead of a completion
        self.url = ""

    def endpoint(self, **settings: Any) -> Endpoint:
        return Endpoint(self.url, "judge-1", **{"longest_wait_s": 0.01, **settings})


@contextmanager
def scripted(says: Callable[[str], Said]) -> Iterator[ScriptedJudge]:
    judge = ScriptedJudge(says)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            judge.bodies.append(body)
            judge.authorizations.append(self.headers.get("Authorization"))
            status, text = judge.says(body["messages"][0]["content"])
            reply = {"choices": [{"message": {"role": "assistant", "content": text}}]}
            content = judge.raw or json.dumps(reply).encode()
            self.send_response(status if self.path == "/v1/chat/completions" else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Not on the terminal of the tests."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
