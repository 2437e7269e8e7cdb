"""The kill switch: the fleet's, in the store, and this replica's own, which needs no store."""

import asyncio
import logging

from fastapi import APIRouter, Request

from server.admin.changes import KillPut
from server.admin.guards import CurrentOperator, author
from server.admin.protocol import FleetKill, KillView
from server.control import Author
from server.documents import KillAction
from server.errors import InvalidRequestError
from server.services import Services, services_of
from steering.errors import StoreError

log = logging.getLogger("deshift.admin")
router = APIRouter(tags=["kill switch"])
STORE_S = 1.0  # for the store to say how the fleet's switch stands; a command waits for 5 s in all


@router.get("/kill")
async def show_kill(request: Request) -> KillView:
    return await kill_view(services_of(request))


@router.put("/kill")
async def put_kill(request: Request, operator: CurrentOperator, body: KillPut) -> KillView:
    """Overrides every tenant's policy without losing it; `none` gives them back."""
    services = services_of(request)
    written = author(operator, body.reason)
    if body.scope == "fleet":
        await services.control.set_kill(body.action, written, body.revision)
    elif body.revision is not None:
        raise InvalidRequestError("a replica's own switch has no revision", param="revision")
    else:
        set_own_kill(services, body.action, written)
    return await kill_view(services)


def set_own_kill(services: Services, action: KillAction, author: Author) -> None:
    """Of this replica alone; needs no store, so the log has it instead of the audit."""
    services.directory.local_kill = action
    told = "kill switch of this replica: %s, by %s via %s: %a"
    log.warning(told, action, author.by, author.via, author.reason)


async def kill_view(services: Services) -> KillView:
    """Never raises or waits long for want of the store: the switch is for bad days."""
    replica = services.directory.local_kill
    try:
        async with asyncio.timeout(STORE_S):
            state = await services.control.state()
    except TimeoutError:
        problem = f"the store did not answer within {STORE_S:g} s"
        return KillView(fleet=None, replica=replica, problem=problem)
    except StoreError as error:
        return KillView(fleet=None, replica=replica, problem=str(error))
    fleet = FleetKill(action=state.kill, revision=state.kill_revision)
    return KillView(fleet=fleet, replica=replica)
