"""Plain ASGI around every request: id, log line, in-flight count, host, key, body limit.

Never buffers an answer. Does not cover what a path does (routes/).
"""

import hmac
import logging
import re
import time
import uuid
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.config import is_loopback
from server.engine.types import QueueFullError
from server.errors import (
    AuthenticationError,
    BodyTooLargeError,
    ForbiddenHostError,
    error_response,
)
from server.generation import ClientLeftError
from server.services import BodyBudget, BodyShare, InFlight

log = logging.getLogger("deshift.requests")
OPEN_PATHS = frozenset({"/health", "/ready"})
CLIENT_LEFT_STATUS = 499  # only in the log: nobody receives it
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+))(?::[0-9]*)?")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


@dataclass
class RequestRecord:
    """What the log line of one request says; handlers fill it in. Never text, images or keys."""

    request_id: str
    status: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    steering: str = "-"
    started: float = field(default_factory=time.monotonic)


def record_of(scope: Scope) -> RequestRecord:
    record: RequestRecord = scope["state"]["record"]
    return record


def body_share_of(scope: Scope) -> BodyShare:
    share: BodyShare = scope["state"]["body_share"]
    return share


class RequestContext:
    """Outermost: gives the request its id, counts it, logs it, and answers 500 for what escapes."""

    def __init__(self, app: ASGIApp, in_flight: InFlight) -> None:
        self._app = app
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(Headers(scope=scope).get("x-request-id")))
        scope.setdefault("state", {})["record"] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        self._in_flight.count += 1
        try:
            await self._app(scope, receive, send_with_id)
        except (ClientDisconnect, ClientLeftError):  # while the body came, or later
            record.status = CLIENT_LEFT_STATUS
        except Exception as error:  # the outermost boundary
            log.exception("request_id=%s failed", record.request_id)
            if not record.status:
                await error_response(error)(scope, receive, send_with_id)
        finally:
            self._in_flight.count -= 1
            _log(scope, record)


def _request_id(asked: str | None) -> str:
    """The client's id if it is harmless in headers and logs, else one of ours."""
    return asked if asked and _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex


def _log(scope: Scope, record: RequestRecord) -> None:
    level = logging.DEBUG if scope["path"] in OPEN_PATHS else logging.INFO
    log.log(
        level,
        "request_id=%s method=%s path=%s status=%d prompt_tokens=%d completion_tokens=%d "
        "steering=%s seconds=%.3f",
        record.request_id,
        ascii(scope["method"])[1:-1],
        ascii(scope["path"][:80]),  # quoted and escaped: a path may hold spaces, CR and LF
        record.status or CLIENT_LEFT_STATUS,
        record.prompt_tokens,
        record.completion_tokens,
        record.steering,
        time.monotonic() - record.started,
    )


class LoopbackHost:
    """Lets only requests through whose Host is a loopback name, with any port.

    For a server on loopback without a key: another site whose name is made to resolve to 127.0.0.1
    (DNS rebinding) would otherwise be same-origin with it in a browser on this machine.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else "localhost"
        match = _HOST.fullmatch(host)
        if match is None or not is_loopback(match[1] or match[2]):
            error = ForbiddenHostError(
                f"the Host {host[:80]!r} is not this machine's own: ask for http://127.0.0.1 or "
                "http://localhost, or set DESHIFT_API_KEY"
            )
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class ApiKey:
    """Lets only requests with the bearer key through, except on the open paths."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._expected = None if key is None else key.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_allowed(scope):
            error = AuthenticationError(
                "a valid API key is needed, in the header `Authorization: Bearer <key>`"
            )
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if self._expected is None or scope["path"] in OPEN_PATHS:
            return True
        value = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = value.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._expected)


class BodyLimit:
    """Refuses a body over the limit, or beyond what all bodies together may take, before it is
    parsed, whether its length is declared or not.

    Handlers give the body's share back (`body_share_of`) when they hold nothing of it any more.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, budget: BodyBudget) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._budget = budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        share = scope["state"]["body_share"] = BodyShare(self._budget)
        declared = Headers(scope=scope).get("content-length", "0")
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                self._take(share, num_bytes)
            return message

        try:
            self._take(share, int(declared) if declared.isdecimal() else 0)
        except (BodyTooLargeError, QueueFullError) as error:
            await error_response(error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive_limited, send)
        finally:
            share.release()

    def _take(self, share: BodyShare, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise BodyTooLargeError(f"the body is larger than {self._max_bytes} bytes")
        share.grow_to(num_bytes)
