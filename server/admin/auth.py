"""Who operates: admin keys, the console's sessions, and tokens against forged forms.

Covers recognising an operator. Does not cover which paths need one (app.py, the console) nor
tenants' keys, which are good for nothing here.
"""

import asyncio
import base64
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from server.config import PREFIX, Settings, parse_admin_keys
from server.errors import AuthenticationError, RateLimitError, ServerError

SESSION_S = 12 * 3600
FAILED_ATTEMPTS_PER_MINUTE = 10
GUESS_DELAY_S = 1.0  # of every answer to a wrong key beyond those
CSRF_HEADER = "x-csrf-token"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class NoAdminKeysError(ServerError):
    """There is no admin key, so nobody can be an operator."""

    status = 403
    type = "permission_error"
    code = "admin_keys_missing"

    def __init__(self) -> None:
        super().__init__(
            f"nobody may operate this server: set {PREFIX}ADMIN_KEYS to name:key, several "
            "separated by commas, and restart it"
        )


class CsrfError(ServerError):
    """A change that came with a session, but not from a page that was made for it."""

    status = 403
    type = "permission_error"
    code = "csrf_token_invalid"

    def __init__(self) -> None:
        super().__init__("the page is out of date, or the change was sent by another site: reload")


@dataclass(frozen=True)
class Operator:
    """Who makes a change, and by which way; both stand in the audit."""

    name: str
    via: Literal["api", "console"]


class AdminAuth:
    """Recognises operators. One object for each process: its sessions end with it.

    keys: by operator's name. `now` gives unix seconds.
    """

    def __init__(self, keys: Mapping[str, str], now: Callable[[], float] = time.time) -> None:
        self._keys = {name: key.encode("ascii") for name, key in keys.items()}
        self._now = now
        self._secret = secrets.token_bytes(32)
        self._ended: dict[str, float] = {}  # logged out before their time: session -> its end
        self._failures = MovingWindowRateLimiter(MemoryStorage())
        self._allowed_failures = RateLimitItemPerMinute(FAILED_ATTEMPTS_PER_MINUTE)

    @classmethod
    def from_settings(cls, settings: Settings) -> "AdminAuth":
        keys = settings.admin_keys
        return cls({} if keys is None else parse_admin_keys(keys.get_secret_value()))

    @property
    def has_keys(self) -> bool:
        return bool(self._keys)

    def check_key(self, key: str, address: str) -> str:
        """The operator's name. A right key is always taken: the kill switch is behind it.

        Raises NoAdminKeysError, AuthenticationError, and RateLimitError for a wrong key of an
        address that has failed too often: see `slow_down`.
        """
        if not self._keys:
            raise NoAdminKeysError
        given, found = key.encode("utf-8", "surrogatepass"), None
        for name, expected in self._keys.items():  # all of them: the time tells nothing
            if hmac.compare_digest(given, expected):
                found = name
        if found is not None:
            return found
        if self._failures.hit(self._allowed_failures, address):
            raise AuthenticationError("this is no admin key")
        reset_at = self._failures.get_window_stats(self._allowed_failures, address).reset_time
        raise RateLimitError(
            "too many wrong admin keys from this address", max(1.0, reset_at - time.time())
        )

    def new_session(self, operator: str) -> str:
        """The text of a session cookie, signed."""
        end = int(self._now()) + SESSION_S
        payload = f"{operator}|{end}|{secrets.token_urlsafe(16)}".encode()
        text = base64.urlsafe_b64encode(payload).decode()
        return f"{text}.{self._signed('session', text)}"

    def session_operator(self, session: str) -> str | None:
        """Whose session it is; None for one that is over or not ours."""
        text, _, signature = session.partition(".")
        if not _is_equal(signature, self._signed("session", text)) or session in self._ended:
            return None
        operator, end, _ = base64.urlsafe_b64decode(text).decode().split("|")
        return operator if self._now() < int(end) else None

    def end_session(self, session: str) -> None:
        """From now on it is nobody's, whoever has a copy of the cookie."""
        now = self._now()
        self._ended = {each: end for each, end in self._ended.items() if end > now}
        if self.session_operator(session) is not None:
            self._ended[session] = now + SESSION_S

    def csrf_token(self, session: str) -> str:
        """What every form of this session must hold."""
        return self._signed("csrf", session)

    def is_csrf_token(self, session: str, token: str) -> bool:
        return _is_equal(token, self.csrf_token(session))

    def _signed(self, purpose: str, text: str) -> str:
        content = f"{purpose}:{text}".encode("utf-8", "surrogatepass")
        return hmac.new(self._secret, content, sha256).hexdigest()


def auth_of(connection: HTTPConnection) -> AdminAuth:
    auth: AdminAuth = connection.app.state.auth
    return auth


def address_of(connection: HTTPConnection) -> str:
    return connection.client.host if connection.client is not None else "unknown"


def operator_of(connection: HTTPConnection) -> Operator:
    """Who asks, by `Authorization: Bearer <admin key>` or else by the console's session.

    Raises NoAdminKeysError, AuthenticationError, RateLimitError. Changes that come with a session
    need `check_csrf`, too.
    """
    auth = auth_of(connection)
    if not auth.has_keys:
        raise NoAdminKeysError
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return Operator(auth.check_key(key.strip(), address_of(connection)), "api")
    name = auth.session_operator(session_of(connection))
    if name is None:
        raise AuthenticationError(
            "an admin key is needed, in the header `Authorization: Bearer <key>`"
        )
    return Operator(name, "console")


async def slow_down(error: Exception) -> None:
    """Let whoever guesses keys wait; to be awaited before such an error is answered."""
    if isinstance(error, RateLimitError):
        await asyncio.sleep(GUESS_DELAY_S)


def session_of(connection: HTTPConnection) -> str:
    """The session cookie's text, or "" without one."""
    return connection.cookies.get(cookie_name(connection), "")


def csrf_token_of(connection: HTTPConnection) -> str:
    """For the forms (or the x-csrf-token header) of the page that is being made."""
    return auth_of(connection).csrf_token(session_of(connection))


def check_csrf(connection: HTTPConnection, token: str) -> None:
    """Raises CsrfError unless `token` was made for this session."""
    if not auth_of(connection).is_csrf_token(session_of(connection), token):
        raise CsrfError


def log_in(request: Request, response: Response, key: str) -> str:
    """Put a new session into `response`; returns the operator's name.

    Raises NoAdminKeysError, AuthenticationError, RateLimitError.
    """
    auth = auth_of(request)
    name = auth.check_key(key, address_of(request))
    response.set_cookie(
        cookie_name(request),
        auth.new_session(name),
        max_age=SESSION_S,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return name


def log_out(request: Request, response: Response) -> None:
    """End the session, here and in the browser."""
    auth_of(request).end_session(session_of(request))
    response.delete_cookie(
        cookie_name(request),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


def cookie_name(connection: HTTPConnection) -> str:
    """With the listener's port: browsers give a host's cookies to all of its ports, so that two
    replicas on one machine would log each other's operators out."""
    server = connection.scope.get("server")
    return f"deshift-session-{server[1] if server else 0}"


def _is_equal(left: str, right: str) -> bool:
    encoded = (text.encode("utf-8", "surrogatepass") for text in (left, right))
    return hmac.compare_digest(*encoded)
