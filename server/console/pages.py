"""Requests and answers of the console: templates, forms with their tokens, errors as pages.

Does not cover what a page shows (fleet.py, tenants.py, routes.py).
"""

import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from server.admin.auth import Operator, check_csrf, csrf_token_of, operator_of, slow_down
from server.console.diffs import moment, number
from server.control import Author
from server.errors import AuthenticationError, InvalidRequestError, ServerError, error_status
from steering.errors import SteeringError

MAX_PAGE = 1_000_000

# What is said after a change, by the code in the address: an address can be made by anybody, so it
# chooses a sentence and a number, never words.
MESSAGES = {
    "policy": "Policy saved as revision {revision}.",
    "same": "Nothing was different, so nothing was changed.",
    "created": "Tenant created as revision {revision}. Create its first key below.",
    "deleted": "Tenant deleted in revision {revision}. The audit can bring it back.",
    "revoked": "Key revoked in revision {revision}.",
    "reverted": "Reverted in revision {revision}.",
    "kill": "Kill switch set in revision {revision}.",
    "local-kill": "Kill switch of this replica alone set.",
    "restored": "The store says again what was in force, as revision {revision}.",
    "adopted": "The store's data go on, as revision {revision}.",
    "activated": "Activated in revision {revision}.",
}
HEADINGS = {
    400: "That cannot be done",
    403: "Not allowed",
    404: "Not found",
    409: "Changed in the meantime",
    413: "Too large",
    429: "Not now",
    503: "Not available",
}


@dataclass(frozen=True)
class Change:
    """A form that an operator sent, its token checked."""

    operator: Operator
    fields: Mapping[str, str]
    files: Mapping[str, bytes]

    def text(self, name: str) -> str:
        return self.fields.get(name, "").strip()

    def number(self, name: str) -> int:
        """Of a hidden field. Raises InvalidRequestError."""
        text = self.text(name)
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            raise InvalidRequestError(f"{name} must be a whole number", param=name)
        return int(text)

    @property
    def author(self) -> Author:
        """Raises InvalidRequestError without a reason."""
        return Author(self.operator.name, self.text("reason"), self.operator.via)


async def read_change(request: Request) -> Change:
    """Knows the operator before it reads the body. Raises AuthenticationError, CsrfError."""
    operator = operator_of(request)
    fields, files = {}, {}
    async with request.form() as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files[name] = await value.read()
            else:
                fields[name] = value
    if operator.via == "console":
        check_csrf(request, fields.get("csrf", ""))
    return Change(operator, fields, files)


class ConsolePage(APIRoute):
    """Known errors become pages, and somebody who is not signed in is asked to."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except AuthenticationError:
                if request.method == "GET":
                    return sign_in_first(request)
                return _error_page(
                    request, 401, "Your session is over. Sign in again in another tab."
                )
            except (ServerError, SteeringError, HTTPException) as error:
                await slow_down(error)
                told = error.detail if isinstance(error, HTTPException) else str(error)
                return _error_page(request, error_status(error), told)

        return answer


def render(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page with what each one needs: who is signed in, its token, the message of a change."""
    try:
        operator, token = operator_of(request).name, csrf_token_of(request)
    except ServerError:
        operator, token = "", ""
    shared = {
        "operator": operator,
        "csrf": token,
        "section": "",
        "message": _message(request),
        "error": "",
        "now": time.time(),
        "refreshes": request.method == "GET",
    }
    page = _TEMPLATES.get_template(template).render({**shared, **values})
    return HTMLResponse(page, status)


def done(path: str, code: str, revision: int | None = None) -> RedirectResponse:
    """After a change: a page to look at, which reloading does not send again."""
    query = urlencode({"done": code} | ({} if revision is None else {"revision": revision}))
    return RedirectResponse(f"{path}{'&' if '?' in path else '?'}{query}", 303)


def tenant_path(name: str) -> str:
    return f"/tenants/{quote(name, safe='')}"


def sign_in_first(request: Request) -> RedirectResponse:
    wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"/sign-in?{urlencode({'next': wanted})}", 303)


def local_path(text: str) -> str:
    """Where to go on, if that is a page of ours, else the first page."""
    is_ours = text.startswith("/") and not text.startswith("//") and text.isprintable()
    return text if is_ours and "\\" not in text else "/"


def page_number(text: str | None) -> int:
    """Of an address, so anything else is the first."""
    return min(int(text), MAX_PAGE) if text and text.isascii() and text.isdigit() else 1


def duration(seconds: float | None) -> str:
    """In the largest unit that tells enough, e.g. `0.4 s` or `4 min`; None is never."""
    if seconds is None:
        return "never"
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{hours} h" if hours < 48 else f"{hours // 24} d"


def _message(request: Request) -> str:
    query = request.query_params
    text = MESSAGES.get(query.get("done", ""), "") if request.method == "GET" else ""
    return text.format(revision=page_number(query.get("revision")))


def _error_page(request: Request, status: int, problem: str) -> Response:
    return render(
        request,
        "error.html",
        status,
        heading=HEADINGS.get(status, "That did not work"),
        problem=problem,
        is_change=request.method != "GET",
        is_known=status < 500,  # a store that is lost on the way may have done it all the same
    )


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _templates() -> Environment:
    # default=True: a template's name may end in anything, its values are escaped all the same.
    environment = Environment(
        loader=PackageLoader("server.console", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": duration,
        "moment": moment,
        "iso": _iso,
        "number": number,
    }
    return environment


_TEMPLATES = _templates()
