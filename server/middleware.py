"""Plain ASGI around every request: id, record, in-flight count, host, key, limits, body limit.

Never buffers an answer. Does not cover what a path does (routes/).
"""

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.config import PREFIX, Settings, is_loopback, parse_admin_keys
from server.control import KEY_START
from server.directory import Principal, TenantDirectory
from server.documents import DEFAULT_TENANT
from server.errors import (
    AuthenticationError,
    BodyTooLargeError,
    ForbiddenHostError,
    RateLimitError,
    UnavailableError,
    error_response,
)
from server.generation import ClientLeftError
from server.limits import TenantLimits
from server.record import CHAT, Observer, RequestRecord, record_of
from server.services import BodyBudget, BodyShare, InFlight

log = logging.getLogger("deshift.requests")
OPEN_PATHS = frozenset({"/health", "/ready"})
SETTINGS_KEY_ID = "settings"  # stands for DESHIFT_API_KEY where a key's id is told
CLIENT_LEFT_STATUS = 499  # only in the log: nobody receives it
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+))(?::[0-9]*)?")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


def principal_of(scope: Scope) -> Principal:
    """Of any request that came through Auth, on other than the open paths."""
    principal: Principal = scope["state"]["principal"]
    return principal


def body_share_of(scope: Scope) -> BodyShare:
    share: BodyShare = scope["state"]["body_share"]
    return share


class RequestContext:
    """Outermost: gives the request its id and record, counts it, answers 500 for what escapes.

    At the end it hands the record to the observers; one that fails is logged, and no more.
    """

    def __init__(
        self, app: ASGIApp, in_flight: InFlight, observers: Sequence[Observer] = ()
    ) -> None:
        self._app = app
        self._in_flight = in_flight
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = RequestRecord(
            _request_id(headers.get("x-request-id")),
            method=scope["method"],
            path=scope["path"][:80],
            traceparent=headers.get("traceparent"),
        )
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
        except asyncio.CancelledError:  # the server stops, and waits for this one no longer
            record.failure = record.failure or "draining"
            raise
        except Exception as error:  # the outermost boundary
            log.exception("request_id=%s failed", record.request_id, extra=record.ids)
            if record.status:
                record.failure = record.failure or "internal"
            else:
                await error_response(error)(scope, receive, send_with_id)
        finally:
            self._in_flight.count -= 1
            record.status = record.status or CLIENT_LEFT_STATUS
            record.ended_at = time.monotonic()
            self._tell(record)

    def _tell(self, record: RequestRecord) -> None:
        for observe in self._observers:
            try:
                observe(record)
            except Exception:  # boundary: what only watches breaks no answer, nor other observers
                log.exception("request_id=%s was not observed", record.request_id, extra=record.ids)


def _request_id(asked: str | None) -> str:
    """The client's id if it is harmless in headers and logs, else one of ours."""
    return asked if asked and _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex


class LoopbackHost:
    """Lets only requests through whose Host is a loopback name, with any port.

    For a server on loopback without a key: another site whose name is made to resolve to 127.0.0.1
    (DNS rebinding) would otherwise be same-origin with it in a browser on this machine.
    """

    def __init__(self, app: ASGIApp, setting: str = f"{PREFIX}API_KEY") -> None:
        self._app = app
        self._setting = setting  # what lets other names in

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else "localhost"
        match = _HOST.fullmatch(host)
        if match is None or not is_loopback(match[1] or match[2]):
            error = ForbiddenHostError(
                f"the Host {host[:80]!r} is not this machine's own: ask for http://127.0.0.1 or "
                f"http://localhost, or set {self._setting}"
            )
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class Auth:
    """Finds whose request it is, or refuses it, except on the open paths.

    A tenant's key, or the settings' key for the default tenant. Where neither the settings nor any
    tenant has a key it is the default tenant's anyway, whatever key a client's library put there;
    but keys of a tenant's form and operators' keys are never taken for no key.
    """

    def __init__(self, app: ASGIApp, settings: Settings, directory: TenantDirectory) -> None:
        self._app = app
        self._directory = directory
        self._waits_for_store = settings.cold_start == "refuse"
        self._api_key = settings.api_key and settings.api_key.get_secret_value().encode()
        admin_keys = settings.admin_keys and parse_admin_keys(
            settings.admin_keys.get_secret_value()
        )
        self._admin_keys = [key.encode() for key in (admin_keys or {}).values()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                principal = self._principal(_bearer_key(scope))
            except (AuthenticationError, UnavailableError) as error:
                await error_response(error)(scope, receive, send)
                return
            scope["state"]["principal"] = principal
            record_of(scope).principal = principal
        await self._app(scope, receive, send)

    def _principal(self, key: bytes | None) -> Principal:
        """Raises AuthenticationError, UnavailableError."""
        directory = self._directory
        if self._waits_for_store and not directory.is_synced:
            raise UnavailableError(
                "this server waits for its store (cold_start is 'refuse'); /ready says why",
                code="store_unavailable",
            )
        if key is not None:
            if self._api_key and hmac.compare_digest(key, self._api_key):
                return Principal(DEFAULT_TENANT, SETTINGS_KEY_ID)
            principal = directory.authenticate(key.decode("latin-1"), time.time())
            if principal is not None:
                return principal
        if self._lets_in_anybody and not (key is not None and self._is_somebodys(key)):
            return Principal(DEFAULT_TENANT, "")
        if key is not None and not directory.is_synced:
            raise UnavailableError(
                "API keys cannot be checked before the store has been read; /ready says why",
                code="store_unavailable",
            )
        raise AuthenticationError(
            "a valid API key is needed, in the header `Authorization: Bearer <key>`"
        )

    @property
    def _lets_in_anybody(self) -> bool:
        return not self._api_key and not self._directory.requires_key

    def _is_somebodys(self, key: bytes) -> bool:
        is_admins = any([hmac.compare_digest(key, each) for each in self._admin_keys])
        return is_admins or key.startswith(KEY_START.encode())


def _bearer_key(scope: Scope) -> bytes | None:
    value: bytes = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, key = value.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" and key.strip() else None


class RateLimits:
    """Holds each tenant to its limits for POST /v1/chat/completions, before the body is read.

    A request runs until its answer's last byte, or until it fails or its client leaves.
    """

    def __init__(self, app: ASGIApp, directory: TenantDirectory, limits: TenantLimits) -> None:
        self._app = app
        self._directory = directory
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) != CHAT:
            await self._app(scope, receive, send)
            return
        with ExitStack() as admission:
            try:
                policy = self._directory.policy(principal_of(scope).tenant, time.time())
                admission.enter_context(self._limits.admitted(policy))
            except (AuthenticationError, UnavailableError, RateLimitError) as error:
                await error_response(error)(scope, receive, send)
                return
            await self._app(scope, receive, send)


class BodyLimit:
    """Refuses a body over the limit, or beyond what all bodies together may take, before it is
    parsed, whether its length is declared or not. The budget counts what has come: what is only
    declared would keep others out for nothing.

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

        if declared.isdecimal() and int(declared) > self._max_bytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        try:
            await self._app(scope, receive_limited, send)
        finally:
            share.release()

    def _take(self, share: BodyShare, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise self._too_large()
        share.grow_to(num_bytes)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the body is larger than {self._max_bytes} bytes")
