"""The fleet: what every replica says of itself."""

from fastapi import APIRouter, Request

from server.admin.protocol import ReplicaList
from server.admin.show import replica_views
from server.services import services_of

router = APIRouter(tags=["fleet"])


@router.get("/replicas")
async def list_replicas(request: Request) -> ReplicaList:
    """Those whose heartbeat has not run out."""
    store = services_of(request).control.store
    revision = (await store.changes()).revision
    replicas = replica_views(await store.replicas(), revision)
    return ReplicaList(replicas=replicas, revision=revision)
