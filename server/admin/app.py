"""The operators' listener: the admin API, the console, and the open status pages.

Does not cover sockets (server/serve.py) nor what a change does (server/control.py).
"""

from functools import cache

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from server.admin.auth import AdminAuth
from server.admin.guards import OperatorsOnly, SecurityHeaders
from server.admin.preview import PreviewDesk
from server.admin.protocol import Problem
from server.admin.routes import (
    audit,
    in_force,
    keys,
    kill,
    preview,
    replicas,
    store,
    tenants,
    vectors,
)
from server.admin.shelf import VectorShelf
from server.config import PREFIX, is_loopback
from server.console.routes import router as console
from server.engine.types import EngineError
from server.errors import (
    InvalidRequestError,
    ServerError,
    error_body,
    error_response,
    error_status,
)
from server.logs import log_request
from server.middleware import BodyLimit, LoopbackHost, RequestContext
from server.routes import metrics, status
from server.services import BodyBudget, InFlight, Services
from steering.errors import ConflictError, SteeringError

API = "/admin/v1"
_ERRORS = (ServerError, EngineError, SteeringError)
_PROBLEMS: dict[int | str, str] = {
    400: "Something in the request is wrong; nothing was changed.",
    401: "No admin key, or a wrong one.",
    403: "No admin keys are set, or the store's credentials may only read.",
    404: "There is no such thing.",
    409: "Somebody else was faster, or the name is taken; nothing was changed.",
    429: "Too many wrong keys, or no room now.",
    503: "The store does not answer, or what it holds is damaged.",
    "default": "Any other error.",  # without it the framework describes a 422 that never comes
}


def create_admin_app(services: Services) -> FastAPI:
    """Build the listener's application. It has no lifespan: whoever runs the public one, which
    starts what `services` holds, runs this beside it.
    """
    app = FastAPI(
        title="Deshift admin API",
        description="Tenants, policies, keys, vector sets and the kill switch of a fleet. Every "
        "change has a reason and a revision, stands in the audit, and can be reverted.",
        version="1",
        openapi_url=f"{API}/openapi.json",
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
        redirect_slashes=False,
        routes=list(_routes()),
    )
    app.state.services = services
    app.state.auth = AdminAuth.from_settings(services.settings)
    app.state.shelf = VectorShelf(services.control)
    app.state.preview = PreviewDesk(services)
    for kind in (*_ERRORS, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(  # innermost
        BodyLimit,
        max_bytes=services.settings.max_body_bytes,
        # Not the clients': the kill switch must not wait until they have room for its few bytes.
        budget=BodyBudget(services.settings.max_buffered_bytes),
    )
    app.add_middleware(OperatorsOnly)
    if is_loopback(services.settings.admin_host):
        app.add_middleware(LoopbackHost, setting=f"{PREFIX}ADMIN_HOST")
    app.add_middleware(  # operators are no load
        RequestContext, in_flight=InFlight(), observers=(log_request,)
    )
    app.add_middleware(SecurityHeaders)
    return app


@cache
def _routes() -> tuple[BaseRoute, ...]:
    """The same for every application, and made once a process: with all the answers that each of
    them documents they take FastAPI 60 ms."""
    api = APIRouter(
        prefix=API,
        responses={
            code: {"model": Problem, "description": text} for code, text in _PROBLEMS.items()
        },
    )
    for module in (tenants, in_force, keys, vectors, kill, audit, replicas, store, preview):
        api.include_router(module.router)
    every = APIRouter()
    every.include_router(api)
    for module in (status, metrics):
        every.include_router(module.router, include_in_schema=False)
    every.include_router(console)
    return tuple(every.routes)


async def _answer_error(_: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        return error_response(_invalid(error))
    if isinstance(error, HTTPException) and isinstance(error.__cause__, _ERRORS):
        return error_response(error.__cause__)  # raised while the framework read the body
    if isinstance(error, ConflictError):
        body: dict[str, dict[str, str | int | None]] = {"error": {**error_body(error)["error"]}}
        body["error"]["revision"] = max(error.revisions.values(), default=0)
        return JSONResponse(body, status_code=error_status(error))
    return error_response(error)


def _invalid(error: RequestValidationError) -> InvalidRequestError:
    """Names the field; never shows the value."""
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        return InvalidRequestError("the body is not JSON", code="invalid_json")
    place, *path = (str(step) for step in problem["loc"])
    # Unknown fields stand in the path as they came: half characters, or kilobytes, too.
    param = ascii(".".join(path) or place)[1:-1][:80]
    message = problem["msg"].removeprefix("Value error, ")
    return InvalidRequestError(f"{param}: {message}", param=param)
