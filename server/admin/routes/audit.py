"""What was changed, by whom and why; and changing it back."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request

from server.admin.changes import MAX_REVISION, NAME_PATTERN, ReasonBody
from server.admin.guards import CurrentOperator, author
from server.admin.protocol import AuditPage, Changed
from server.admin.show import audit_view
from server.services import services_of

router = APIRouter(tags=["audit"])
MAX_PAGE = 500


@router.get("/audit")
async def list_changes(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    before: Annotated[int | None, Query(ge=1, le=MAX_REVISION)] = None,
    tenant: Annotated[str | None, Query(pattern=NAME_PATTERN)] = None,
) -> AuditPage:
    """Newest first; with `tenant`, those of its policy and keys."""
    entries = await services_of(request).control.audit(limit, before, tenant)
    return AuditPage(
        entries=[audit_view(entry) for entry in entries],
        next=entries[-1].revision if len(entries) == limit and entries[-1].revision > 1 else None,
    )


@router.post("/audit/{revision}/revert")
async def revert(
    request: Request,
    operator: CurrentOperator,
    revision: Annotated[int, Path(ge=1, le=MAX_REVISION)],
    body: ReasonBody,
) -> Changed:
    """Bring back what that change replaced; a 409 where somebody has changed it since."""
    control = services_of(request).control
    return Changed(revision=await control.revert(revision, author(operator, body.reason)))
