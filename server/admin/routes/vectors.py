"""Vector sets with their provenance, and the aliases that point to them."""

from fastapi import APIRouter, Request

from server.admin.changes import AliasPut, Name
from server.admin.guards import CurrentOperator, author
from server.admin.protocol import AliasList, Changed, VectorList
from server.admin.shelf import VectorShelf, alias_views
from server.services import services_of

router = APIRouter(tags=["vectors"])


@router.get("/vectors")
async def list_vectors(request: Request) -> VectorList:
    """Oldest first."""
    shelf: VectorShelf = request.app.state.shelf
    return VectorList(vectors=await shelf.views())


@router.get("/aliases")
async def list_aliases(request: Request) -> AliasList:
    return AliasList(aliases=await alias_views(services_of(request).control))


@router.put("/aliases/{alias}")
async def put_alias(
    request: Request,
    operator: CurrentOperator,
    alias: Name,
    body: AliasPut,
) -> Changed:
    """Point an alias to a set, which is read and verified first."""
    control = services_of(request).control
    written = author(operator, body.reason)
    return Changed(revision=await control.activate(alias, body.vector, written, body.revision))
