"""A tenant's API keys."""

from fastapi import APIRouter, Request

from server.admin.changes import Name, NewKeyBody, ReasonQuery, RevisionQuery, RotateKeyBody
from server.admin.guards import CurrentOperator, author
from server.admin.protocol import Changed, IssuedKey
from server.control import NewKey
from server.services import services_of

router = APIRouter(tags=["keys"])


@router.post("/tenants/{name}/keys", status_code=201)
async def create_key(
    request: Request, operator: CurrentOperator, name: Name, body: NewKeyBody
) -> IssuedKey:
    """The answer holds the key, this once."""
    control = services_of(request).control
    written = author(operator, body.reason)
    return _issued(
        await control.create_key(name, body.id, written, body.expires_in_s, body.revision)
    )


@router.post("/tenants/{name}/keys/{key_id}/rotate", status_code=201)
async def rotate_key(
    request: Request, operator: CurrentOperator, name: Name, key_id: Name, body: RotateKeyBody
) -> IssuedKey:
    """A new key; the old one is good for `overlap_s` more."""
    control = services_of(request).control
    written = author(operator, body.reason)
    return _issued(
        await control.rotate_key(name, key_id, body.new_id, written, body.overlap_s, body.revision)
    )


@router.delete("/tenants/{name}/keys/{key_id}")
async def revoke_key(
    request: Request,
    operator: CurrentOperator,
    name: Name,
    key_id: Name,
    reason: ReasonQuery,
    revision: RevisionQuery = None,
) -> Changed:
    """From now on; a key whose time is over already is no change."""
    control = services_of(request).control
    written = author(operator, reason)
    return Changed(revision=await control.revoke_key(name, key_id, written, revision))


def _issued(new: NewKey) -> IssuedKey:
    return IssuedKey(
        id=new.record.id, key=new.text, expires_at=new.record.expires_at, revision=new.revision
    )
