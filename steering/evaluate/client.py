"""One server under evaluation: who it is, and asking it one chat, again where it says "later".

Any OpenAI-compatible server. Does not decide what is asked (run.py).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from steering.errors import EvaluationError

LONGEST_ANSWER_S = 600.0
_MAX_MESSAGE = 300
_BUSY = (429, 503)
_NEVER = (400, 401, 403, 404, 405, 422)
_OF_ONE_REQUEST = ("context_length_exceeded",)
# 503s that waiting does not cure: an operator has to.
LASTING = ("vectors_unavailable", "shift_unavailable", "steering_killed")


class Refused(EvaluationError):
    """The server's own words to one request."""

    def __init__(self, status: int, code: str | None, message: str, wait_s: float | None) -> None:
        super().__init__(f"{status} {code or ''}: {message}".replace(" :", ":"))
        self.status = status
        self.code = code
        self.wait_s = wait_s

    @property
    def is_passing(self) -> bool:
        """Whether the same request may be answered a little later."""
        return self.status in _BUSY and self.code not in LASTING

    @property
    def is_lasting(self) -> bool:
        """Whether every request of this kind will be refused, not this one only."""
        return self.code in LASTING or self.status in _NEVER and self.code not in _OF_ONE_REQUEST


class Unreachable(EvaluationError):
    """Nothing answers at the URL."""


@dataclass(frozen=True)
class Patience:
    """How often one chat is sent before its error counts, and the longest first wait, which
    doubles; waits are drawn at random below these, and are no shorter than the server asks for."""

    attempts: int = 8
    first_wait_s: float = 0.5
    longest_wait_s: float = 60.0


@dataclass(frozen=True)
class Reply:
    text: str
    finish_reason: str | None
    steering: Mapping[str, Any] | None
    seconds: float


@dataclass(frozen=True)
class Server:
    """model: the name that requests use. is_deshift: it steers and says so. listed, ready: what
    /v1/models and /ready say; the latter None where only others answer it."""

    url: str
    model: str
    is_deshift: bool
    listed: Mapping[str, Any] = field(default_factory=dict)
    ready: Mapping[str, Any] | None = None


def http_client(url: str, api_key: str | None, concurrency: int) -> httpx.AsyncClient:
    """A client of that server; `url` with or without /v1. Raises EvaluationError."""
    try:
        base = httpx.URL(url.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL:
        base = httpx.URL()
    if base.scheme not in ("http", "https") or not base.host or base.userinfo or base.query:
        raise EvaluationError(
            "--url must be http(s)://HOST[:PORT], without credentials in it (see --api-key-env)"
        )
    return httpx.AsyncClient(
        base_url=base,
        headers={"authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx.Timeout(LONGEST_ANSWER_S, connect=10.0),
        limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        trust_env=False,
    )


async def connect(client: httpx.AsyncClient, model: str | None) -> Server:
    """Ask a server who it is. model: by default the first that it lists.

    Raises EvaluationError: nothing answers, it lists no models, or not this one.
    """
    url = str(client.base_url).rstrip("/")
    try:
        response = await client.get("/v1/models")
        ready = await client.get("/ready")
    except httpx.RequestError as error:
        problem = str(error) or type(error).__name__
        raise Unreachable(f"no server answers at {url}: {problem}") from None
    if response.status_code in (401, 403):
        raise EvaluationError(
            f"{url} refuses to be asked ({response.status_code}): name the environment variable "
            "that holds its key with --api-key-env"
        )
    listed = _listed(response)
    if not listed and model is None:
        raise EvaluationError(
            f"{url} lists no models ({response.status_code}): name one with --model"
        )
    by_name = {str(each["id"]): each for each in listed}
    name = model or next(iter(by_name))
    if by_name and name not in by_name:
        raise EvaluationError(f"{url} has no model {name!r}, but {', '.join(by_name)}")
    entry, state = by_name.get(name, {}), _object(ready)
    says_ready = "steering" in state and "engine" in state  # a proxy may hide it
    is_deshift = says_ready or entry.get("owned_by") == "deshift"
    return Server(url, name, is_deshift, entry, state if says_ready else None)


async def ask(client: httpx.AsyncClient, body: Mapping[str, Any], patience: Patience) -> Reply:
    """Send one chat; 429, 503 and lost connections are tried again, later and later.

    Raises Refused with the server's words, Unreachable.
    """
    attempts = AsyncRetrying(
        retry=retry_if_exception(_is_passing),
        stop=stop_after_attempt(patience.attempts),
        wait=lambda state: _wait_s(state, patience),
        reraise=True,
    )
    return await attempts(_ask_once, client, body)


async def _ask_once(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Reply:
    start = time.monotonic()
    try:
        response = await client.post("/v1/chat/completions", json=body)
    except httpx.ReadTimeout:
        raise Refused(408, "read_timeout", f"no answer in {LONGEST_ANSWER_S:g} s", None) from None
    except httpx.RequestError as error:
        problem = str(error) or type(error).__name__
        raise Unreachable(f"no server answers at {client.base_url}: {problem}") from None
    seconds = time.monotonic() - start
    answer = _object(response)
    if response.status_code != 200:
        raise _refusal(client, response, answer)
    try:
        choice = answer["choices"][0]
        text = choice["message"].get("content") or choice["message"].get("refusal") or ""
        return Reply(
            _whole(str(text)), choice.get("finish_reason"), answer.get("steering"), seconds
        )
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Refused(200, "malformed", "the answer is no chat completion", None) from None


def _refusal(
    client: httpx.AsyncClient, response: httpx.Response, answer: Mapping[str, Any]
) -> Refused:
    error = answer.get("error")
    error = error if isinstance(error, dict) else {}
    message = _whole(str(error.get("message") or response.reason_phrase)[:_MAX_MESSAGE])
    key = client.headers.get("authorization", "").removeprefix("Bearer ")
    if key:  # some servers quote it
        message = message.replace(key, "***")
    code = error.get("code")
    try:
        wait_s = float(response.headers["retry-after"])
    except (KeyError, ValueError):  # absent, or a date
        wait_s = None
    return Refused(response.status_code, None if code is None else str(code), message, wait_s)


def _whole(text: str) -> str:
    """JSON can spell half a character, which no file or page can hold: it becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_passing(error: BaseException) -> bool:
    return isinstance(error, Unreachable) or (isinstance(error, Refused) and error.is_passing)


def _wait_s(state: RetryCallState, patience: Patience) -> float:
    """Growing and scattered, and no less than the server asks for."""
    growing = wait_random_exponential(multiplier=patience.first_wait_s, max=patience.longest_wait_s)
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait_s if isinstance(error, Refused) and error.wait_s else 0.0
    return max(growing(state), min(asked, patience.longest_wait_s))


def _listed(response: httpx.Response) -> list[Mapping[str, Any]]:
    data = _object(response).get("data")
    rows = data if response.status_code == 200 and isinstance(data, list) else []
    return [row for row in rows if isinstance(row, dict) and "id" in row]


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
