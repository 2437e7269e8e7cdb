"""Plain ASGI around the admin listener: its headers, and an operator for every path of the API."""

from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.admin.auth import (
    CSRF_HEADER,
    SAFE_METHODS,
    Operator,
    check_csrf,
    operator_of,
    slow_down,
)
from server.control import Author
from server.errors import ServerError, error_response

API_PREFIX = "/admin"
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class SecurityHeaders:
    """On every answer, whatever made it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        await self._app(scope, receive, send_guarded)


class OperatorsOnly:
    """Finds the operator of every path under /admin before anything of the body is read.

    With a session a change needs the x-csrf-token header, since browsers send cookies unasked.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(API_PREFIX):
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        try:
            operator = operator_of(connection)
            if operator.via == "console" and scope["method"] not in SAFE_METHODS:
                check_csrf(connection, Headers(scope=scope).get(CSRF_HEADER, ""))
        except ServerError as error:
            await slow_down(error)
            await error_response(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["operator"] = operator
        await self._app(scope, receive, send)


_BEARER = HTTPBearer(auto_error=False, description="An admin key, of DESHIFT_ADMIN_KEYS.")


def found_operator(
    request: Request,
    _: Annotated[
        HTTPAuthorizationCredentials | None, Security(_BEARER)
    ],  # for the OpenAPI document
) -> Operator:
    operator: Operator = request.state.operator
    return operator


CurrentOperator = Annotated[Operator, Depends(found_operator)]


def author(operator: Operator, reason: str) -> Author:
    """Raises InvalidRequestError for a reason that is empty, too long or not one line."""
    return Author(by=operator.name, reason=reason, via=operator.via)
