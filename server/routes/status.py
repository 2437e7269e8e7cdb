"""GET /health (alive?) and GET /ready (fit to answer?), both open and without secrets."""

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from server.documents import DEFAULT_TENANT
from server.errors import UnavailableError
from server.services import Services, services_of
from steering.stores import without_credentials

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
    """200 when the server is ready (Services.is_ready).

    A lost or foreign store, and another tenant's alias that is broken, are shown and leave it
    ready: what was in force before is in force.
    """
    services = services_of(request)
    engine = services.engine.status()
    is_draining = services.in_flight.is_draining
    is_ready = services.is_ready
    body = {
        "status": "ready" if is_ready else "not ready",
        "model": services.model_name,
        "draining": is_draining,
        "engine": {
            "state": engine.state,
            "detail": engine.detail,
            "waiting": engine.num_waiting,
            "running": engine.num_running,
            "num_layers": services.engine.identity.num_layers,
        },
        "store": _store(services),
        "steering": _steering(services),
    }
    return JSONResponse(body, status_code=200 if is_ready else 503)


def _store(services: Services) -> dict[str, Any]:
    """How this replica stands to its store, of which scheme and host are named."""
    url, status = services.settings.store_url, services.sync.status
    scheme = url.partition("://")[0]
    return {
        "place": without_credentials(url) if "redis" in scheme else scheme,
        "state": status.store,
        "problem": status.problem,
        "revision": status.revision,
        "epoch": status.epoch,
        "age_s": None if status.age_s is None else round(status.age_s, 3),
        # Their texts are for operators: they name tenants.
        "num_unreadable": len(services.directory.problems),
    }


def _steering(services: Services) -> dict[str, Any]:
    """What is in force by default, and whether it can be kept; then every alias in use."""
    vectors, directory = services.vectors, services.directory
    body = {"kill": directory.kill, "vectors": vectors.ids, "problems": vectors.problems}
    try:
        policy = directory.policy(DEFAULT_TENANT, time.time())
    except UnavailableError as error:
        return {"policy": None, "problem": str(error), **body}
    active, alias = vectors.active(policy.vector_alias), policy.vector_alias
    problem = vectors.problem_of(policy) or vectors.problem(alias)
    default = {
        "policy": str(policy),
        "alias": alias,
        "vector": active.id if active else None,
        "problem": problem,
    }
    return {**default, **body}
