"""GET /metrics, for Prometheus: open, on the operators' listener only."""

from fastapi import APIRouter, Request, Response

from server.metrics.metrics import OPENMETRICS, PLAIN
from server.metrics.state import read_state
from server.services import services_of

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """OpenMetrics, with exemplars, for whoever accepts it, else Prometheus' text format."""
    services = services_of(request)
    read_state(services)
    is_openmetrics = "application/openmetrics-text" in request.headers.get("accept", "")
    media_type = OPENMETRICS if is_openmetrics else PLAIN
    return Response(services.metrics.text(is_openmetrics), media_type=media_type)
