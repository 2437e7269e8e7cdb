"""The console: sign-in, vectors, audit, files; the fleet (fleet_page.py) and tenants (tenants.py).

Thin: what a page shows is built by fleet.py, diffs.py and charts.py, what a change does by
server/control.py. Every change is a form with a token and a reason, and ends in a redirect.
"""

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

from server.admin.auth import auth_of, log_in, log_out, operator_of, slow_down
from server.admin.protocol import VectorView
from server.admin.shelf import VectorShelf, alias_views
from server.console import fleet_page, tenants
from server.console.charts import consistency_chart, relative_norm_chart
from server.console.diffs import readable
from server.console.pages import (
    Change,
    ConsolePage,
    done,
    local_path,
    page_number,
    read_change,
    render,
)
from server.documents import NAME_FORM
from server.errors import (
    AuthenticationError,
    InvalidRequestError,
    RateLimitError,
    error_status,
)
from server.services import services_of
from steering.errors import ConflictError

router = APIRouter(route_class=ConsolePage, include_in_schema=False)
AUDIT_SIZE = 30
STATIC = Path(__file__).parent / "static"
FILES = {
    "console.css": "text/css",
    "console.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


@router.get("/static/{name}")
async def static(name: str) -> Response:
    if name not in FILES:
        raise HTTPException(404, "there is no such file")
    return FileResponse(STATIC / name, media_type=FILES[name])


@router.get("/sign-in")
async def show_sign_in(request: Request) -> Response:
    return _sign_in_page(request, local_path(request.query_params.get("next", "/")))


@router.post("/sign-in")
async def sign_in(request: Request) -> Response:
    async with request.form() as form:
        where, key = local_path(str(form.get("next", "/"))), str(form.get("key", ""))
    response = RedirectResponse(where, 303)
    try:
        log_in(request, response, key)
    except (AuthenticationError, RateLimitError) as error:
        await slow_down(error)
        return _sign_in_page(request, where, error_status(error), str(error))
    return response


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    await read_change(request)
    response = RedirectResponse("/sign-in", 303)
    log_out(request, response)
    return response


def _sign_in_page(request: Request, where: str, status: int = 200, error: str = "") -> Response:
    has_keys = auth_of(request).has_keys
    # Without a session no name and no token: this form carries the key itself.
    return render(
        request, "sign_in.html", status, next=where, has_keys=has_keys, error=error, operator=""
    )


@router.get("/vectors")
async def vectors(request: Request) -> Response:
    operator_of(request)
    return await _vectors_page(request, request.query_params.get("set", ""))


@router.post("/vectors/activate")
async def activate(request: Request) -> Response:
    change = await read_change(request)
    vector_id, alias = change.text("set"), change.text("alias")
    field = f"revision.{alias}"
    # An alias that the page did not know is expected not to exist.
    expected = change.number(field) if change.text(field) else 0
    control = services_of(request).control
    try:
        revision = await control.activate(alias, vector_id, change.author, expected)
    except (InvalidRequestError, ConflictError) as error:
        return await _vectors_page(request, vector_id, error_status(error), str(error), change)
    return done(f"/vectors?set={vector_id}", "activated", revision)


async def _vectors_page(
    request: Request,
    wanted: str,
    status: int = 200,
    error: str = "",
    typed: Change | None = None,
) -> Response:
    shelf: VectorShelf = request.app.state.shelf
    sets = (await shelf.views())[::-1]  # the newest first
    chosen = _chosen(sets, wanted)
    values: dict[str, Any] = {"provenance": []}
    if chosen is not None:
        values["provenance"] = _provenance(chosen)
        if chosen.layers:
            values["norm_chart"] = relative_norm_chart(chosen.layers)
            values["consistency_chart"] = consistency_chart(chosen.layers)
    return render(
        request,
        "vectors.html",
        status,
        section="Vectors",
        sets=sets,
        chosen=chosen,
        aliases=await alias_views(services_of(request).control),
        typed_alias=typed.text("alias") if typed else "default",
        typed_reason=typed.text("reason") if typed else "",
        name_form=NAME_FORM,
        error=error,
        **values,
    )


def _chosen(sets: list[VectorView], wanted: str) -> VectorView | None:
    """The one asked for, else one that an alias points to, else the newest."""
    named = [each for each in sets if each.id == wanted]
    active = [each for each in sets if each.aliases]
    return next(iter(named or active or sets), None)


def _provenance(each: VectorView) -> list[tuple[str, str]]:
    manifest = dict(each.manifest)
    model, versions = dict(manifest.pop("model")), dict(manifest.pop("versions"))
    rows = [("id", each.id), ("model", model.pop("model_id"))]
    rows += [("model's " + name, value) for name, value in model.items()]
    rows += [*manifest.items(), ("size", f"{each.size_bytes:,} bytes")]
    rows += [("version of " + name, value) for name, value in versions.items()]
    return [
        (name.replace("_", " "), "none" if value is None else str(value)) for name, value in rows
    ]


@router.get("/audit")
async def audit(request: Request) -> Response:
    operator_of(request)
    query = request.query_params
    only = query.get("tenant", "").strip()[:64]
    before = page_number(query.get("before")) if query.get("before") else None
    control = services_of(request).control
    entries = await control.audit(AUDIT_SIZE + 1, before, only or None)
    history = [readable(entry) for entry in entries[:AUDIT_SIZE]]
    return render(
        request,
        "audit.html",
        section="Audit",
        history=history,
        only=only,
        before=before,
        older=history[-1].entry.revision if len(entries) > AUDIT_SIZE else None,
        here="/audit",
    )


@router.post("/revert")
async def revert(request: Request) -> Response:
    change = await read_change(request)
    control = services_of(request).control
    revision = await control.revert(change.number("revision"), change.author)
    where = local_path(change.text("next"))
    return done(where, "reverted", revision)


for part in (fleet_page, tenants):
    router.include_router(part.router)
