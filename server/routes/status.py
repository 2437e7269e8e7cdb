"""GET /health (alive?) and GET /ready (fit to answer?), both open and without secrets."""

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from server.services import services_of

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the process and its engine thread live; a restart is the cure otherwise."""
    status = services_of(request).engine.status()
    is_alive = status.state not in ("failed", "stopped")
    body = {"status": "alive" if is_alive else "dead", "engine": status.state}
    return JSONResponse(body, status_code=200 if is_alive else 503)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 when the engine passed its canary, vectors in force are valid and nothing drains."""
    services = services_of(request)
    engine = services.engine.status()
    vectors = services.vectors.active
    is_draining = services.in_flight.is_draining
    is_ready = engine.state == "ready" and services.vectors.is_ready and not is_draining
    body = {
        "status": "ready" if is_ready else "not ready",
        "model": services.model_name,
        "draining": is_draining,
        "engine": {
            "state": engine.state,
            "detail": engine.detail,
            "waiting": engine.num_waiting,
            "running": engine.num_running,
        },
        "steering": {
            "policy": str(services.policy),
            "alias": services.policy.vector_alias,
            "vector": vectors.id if vectors else None,
            "problem": services.vectors.problem,
        },
    }
    return JSONResponse(body, status_code=200 if is_ready else 503)
