"""When the store comes back with other data than are in force: what an operator may do about it.

Until then no replica takes anything of it up (server/succession.py).
"""

from fastapi import APIRouter, Request

from server.admin.changes import ReasonBody
from server.admin.guards import CurrentOperator, author
from server.admin.protocol import Changed, StoreView
from server.services import Services, services_of

router = APIRouter(prefix="/store", tags=["store"])


@router.get("")
async def show_store(request: Request) -> StoreView:
    """How this replica stands to the store; answers without it, too."""
    return store_view(services_of(request))


@router.post("/adopt")
async def adopt(request: Request, operator: CurrentOperator, body: ReasonBody) -> Changed:
    """Let the store's documents take the place of those in force, on the whole fleet.

    A 400 while the store is not a foreign one.
    """
    services = services_of(request)
    written = author(operator, body.reason)
    return Changed(revision=await services.control.adopt(services.sync.adoption(), written))


@router.post("/restore")
async def restore(request: Request, operator: CurrentOperator, body: ReasonBody) -> Changed:
    """Make the store say again what this replica has in force, with its vector sets.

    A 400 while the store is not a foreign one, a 409 when it changes meanwhile.
    """
    services = services_of(request)
    written = author(operator, body.reason)
    lost = await services.sync.restoration()
    revision = await services.control.restore(lost.writes, lost.expected, lost.vectors, written)
    return Changed(revision=revision)


def store_view(services: Services) -> StoreView:
    status = services.sync.status
    return StoreView(
        state=status.store,
        problem=status.problem,
        revision=status.revision,
        epoch=status.epoch,
        age_s=status.age_s,
    )
