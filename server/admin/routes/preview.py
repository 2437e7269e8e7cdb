"""POST /preview."""

from fastapi import APIRouter, Request

from server.admin.guards import CurrentOperator
from server.admin.preview import PreviewAnswers, PreviewBody, PreviewDesk

router = APIRouter(tags=["preview"])


@router.post("/preview")
async def preview(request: Request, _: CurrentOperator, body: PreviewBody) -> PreviewAnswers:
    """The same prompt at up to four alphas, under a tenant's policy or any other.

    Neither the tenant's limits and rollout nor the kill switch apply. Not stored, not logged. A 429
    while another preview runs.
    """
    desk: PreviewDesk = request.app.state.preview
    return await desk.preview(body, request.receive)
