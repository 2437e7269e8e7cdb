"""The first page: the kill switch, replicas, tenants, and a store that holds other data.

It is for bad days, so it answers without the store, too.
"""

import time
from dataclasses import replace
from typing import get_args

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.admin.auth import operator_of
from server.admin.routes.kill import set_own_kill
from server.console.fleet import FleetView, read_fleet, tenant_page, with_ages
from server.console.pages import Change, ConsolePage, done, page_number, read_change, render
from server.control import StoreState
from server.documents import KillAction
from server.errors import InvalidRequestError, error_status
from server.services import services_of
from steering.errors import ConflictError, StoreError

router = APIRouter(route_class=ConsolePage, include_in_schema=False)
PAGE_SIZE = 50  # tenants
KILL_CHOICES = (
    ("none", "Off.", "Every tenant's policy decides."),
    ("unsteered", "Steer nobody.", "Requests are answered without steering, and say so."),
    ("reject", "Refuse pictures.", "Every request with a picture gets an error."),
)


@router.get("/")
async def fleet(request: Request) -> Response:
    operator_of(request)
    return await _fleet_page(request)


@router.post("/kill")
async def set_kill(request: Request) -> Response:
    change = await read_change(request)
    services = services_of(request)
    try:
        action = _kill_action(change)
        if change.text("scope") == "replica":
            set_own_kill(services, action, change.author)
            return done("/", "local-kill")
        revision = await services.control.set_kill(action, change.author, change.number("revision"))
    except (InvalidRequestError, ConflictError, StoreError) as error:
        return await _fleet_page(request, error_status(error), str(error), change)
    return done("/", "kill", revision)


@router.post("/store")
async def settle_store(request: Request) -> Response:
    """While the store holds other data than are in force: which of both goes on."""
    change = await read_change(request)
    services = services_of(request)
    author, choice = change.author, change.text("choice")
    if choice == "restore":
        lost = await services.sync.restoration()
        revision = await services.control.restore(lost.writes, lost.expected, lost.vectors, author)
        return done("/", "restored", revision)
    if choice == "adopt":
        revision = await services.control.adopt(services.sync.adoption(), author)
        return done("/", "adopted", revision)
    raise InvalidRequestError("choose which data go on", param="choice")


def _kill_action(change: Change) -> KillAction:
    action = change.text("action")
    for known in get_args(KillAction):
        if action == known:
            if change.text("sure") != "yes":
                raise InvalidRequestError("tick the box that says you want this", param="sure")
            return known
    raise InvalidRequestError("choose what the kill switch does", param="action")


async def _fleet_page(
    request: Request, status: int = 200, error: str = "", typed: Change | None = None
) -> Response:
    """Without the store there is still this replica's own kill switch, so this never raises."""
    services, query = services_of(request), request.query_params
    now = time.time()
    state, view, page, problem = StoreState("", 0, {}, {}, "none", 0, {}), FleetView([]), None, ""
    try:
        state, view = await read_fleet(services.control)
        page = tenant_page(
            state,
            view.replicas,
            now,
            query.get("q", "")[:64],
            page_number(query.get("page")),
            PAGE_SIZE,
        )
        page = replace(page, rows=await with_ages(services.control, page.rows))
    except StoreError as lost:
        problem = str(lost)
    return render(
        request,
        "fleet.html",
        status,
        section="Fleet",
        state=state,
        fleet=view,
        page=page,
        problem=problem,
        sync=services.sync.status,
        local_kill=services.directory.local_kill,
        kill_choices=KILL_CHOICES,
        kill_typed=typed.text("action") if typed else "",
        kill_reason=typed.text("reason") if typed else "",
        kill_scope=typed.text("scope") if typed else "",
        error=error,
        now=now,
    )
