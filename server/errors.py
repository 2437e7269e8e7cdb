"""The exceptions of the server package and the one table from exceptions to OpenAI's error shape.

Does not cover which code raises what; the engine's own exceptions live in engine/types.py.
"""

import math
from typing import ClassVar

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from server.engine.types import (
    EngineError,
    FailureKind,
    InputError,
    NotAcceptingError,
    PromptTooLongError,
    QueueFullError,
)
from steering.errors import (
    ConflictError,
    NotFoundError,
    ReadOnlyError,
    StoreError,
    VectorError,
)

RETRY_AFTER_S = 1


class ServerError(Exception):
    """Base of everything this package raises on purpose; the message is for a person."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str | None = None
    param: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param if param is not None else self.param
        self.code = code if code is not None else self.code


class ConfigError(ServerError):
    """A setting is malformed or contradicts another; names the variable. Stops startup."""


class StartupError(ServerError):
    """The server cannot start: port, model, vectors or store. The message is one line."""


class DocumentError(ServerError):
    """A document of the store cannot be read: damaged, or of another version."""

    status = 503
    code = "store_damaged"


class InvalidRequestError(ServerError):
    """The body, one of its fields or one of its pictures cannot be honoured."""

    status = 400
    type = "invalid_request_error"


class AuthenticationError(ServerError):
    """No API key, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class OverrideForbiddenError(ServerError):
    """The request's `steering` asks for what the policy does not let clients change."""

    status = 403
    type = "permission_error"
    code = "steering_override_forbidden"
    param = "steering"


class RateLimitError(ServerError):
    """The tenant's own limit; `retry_after_s` says when to come back."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ForbiddenHostError(ServerError):
    """The Host header names no loopback address: see middleware.LoopbackHost."""

    status = 403
    type = "permission_error"
    code = "host_not_allowed"


class NoSuchTenantError(ServerError):
    """An operator names a tenant, or a key of it, that does not exist."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ExistsError(ServerError):
    """An operator makes something whose name is taken."""

    status = 409
    type = "conflict_error"
    code = "already_exists"


class UnknownModelError(ServerError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"
    param = "model"


class RequestTimeoutError(ServerError):
    status = 408
    type = "timeout_error"
    code = "request_timeout"


class BodyTooLargeError(ServerError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnavailableError(ServerError):
    """Not now: draining, or no valid shift vectors although the policy steers."""

    status = 503
    type = "service_unavailable_error"
    code = "service_unavailable"


class GenerationFailedError(ServerError):
    """The engine ended an accepted request without its answer."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message, code=f"generation_{kind}")
        self.kind = kind


_HTTP_STATUS_OF_FAILURE: dict[FailureKind, int] = {
    "timeout": 408,
    "draining": 503,
    "cancelled": 503,
    "engine": 500,
}


def error_status(error: Exception) -> int:
    """The HTTP status of a known exception; 500 for any other."""
    match error:
        case GenerationFailedError():
            return _HTTP_STATUS_OF_FAILURE[error.kind]
        case ServerError():
            return error.status
        case PromptTooLongError() | InputError():
            return 400
        case QueueFullError():
            return 429
        case NotAcceptingError():
            return 503
        case HTTPException():
            return error.status_code
        case ConflictError():
            return 409
        case ReadOnlyError():
            return 403
        case NotFoundError():
            return 404
        case StoreError():
            return 503
        case VectorError():
            return 400
    return 500


def error_body(error: Exception) -> dict[str, dict[str, str | None]]:
    """OpenAI's error object; an unknown exception's text stays in the log."""
    message, type_, param, code = str(error), "server_error", None, None
    match error:
        case ServerError():
            type_, param, code = error.type, error.param, error.code
        case PromptTooLongError():
            type_, param, code = "invalid_request_error", "messages", "context_length_exceeded"
        case InputError():
            type_, param = "invalid_request_error", error.param
        case QueueFullError():
            type_, code = "rate_limit_error", "queue_full"
        case NotAcceptingError():
            type_, code = "service_unavailable_error", "service_unavailable"
        case EngineError():
            pass
        case ConflictError():
            type_, code = "conflict_error", "stale_revision"
        case ReadOnlyError():
            type_, code = "permission_error", "store_read_only"
        case NotFoundError():
            type_, code = "invalid_request_error", "not_found"
        case StoreError():
            type_, code = "service_unavailable_error", "store_unavailable"
        case VectorError():
            type_, code = "invalid_request_error", "vectors_invalid"
        case HTTPException():
            type_, message = "invalid_request_error", error.detail
        case _:
            message = "internal error; the log has it under this answer's x-request-id"
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def error_response(error: Exception) -> JSONResponse:
    """The whole answer, with its headers.

    429 and 503 say when to come back, 401 has its challenge, and clients are told not to retry
    what has already cost a generation.
    """
    status = error_status(error)
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        headers.update(error.headers or {})
    if isinstance(error, RateLimitError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    elif status in (429, 503):
        headers["retry-after"] = str(RETRY_AFTER_S)
    if isinstance(error, GenerationFailedError) and error.kind in ("timeout", "engine"):
        headers["x-should-retry"] = "false"  # OpenAI's clients retry 408 and 5xx, twice
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 413:
        headers["connection"] = "close"  # the rest of the body is not read
    return JSONResponse(error_body(error), status_code=status, headers=headers)
