"""GET /v1/models: the one model that is served."""

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from server.errors import UnknownModelError
from server.replies import Model, ModelList
from server.services import Services, services_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    models = ModelList(data=[_model(services_of(request))])
    return JSONResponse(models.model_dump())


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> Response:
    services = services_of(request)
    check_model(services, name)
    return JSONResponse(_model(services).model_dump())


def check_model(services: Services, name: str) -> None:
    """Raises UnknownModelError, with the name that is served."""
    served = services.model_name
    if name != served:
        raise UnknownModelError(f"the model {name[:200]!r} does not exist; served is {served!r}")


def _model(services: Services) -> Model:
    return Model(
        id=services.model_name,
        created=services.created,
        max_model_len=services.engine.max_model_len,
    )
