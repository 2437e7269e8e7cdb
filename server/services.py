"""What the handlers may use: one typed object, built by app.py."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from starlette.requests import Request

from server.config import Settings
from server.engine.api import Engine
from server.errors import UnavailableError
from server.generation import EventBridge
from server.media import MediaLimits
from server.policy import Policy
from server.vectors import VectorCatalogue


class InFlight:
    """Requests that are being answered, and whether new ones are still taken. Event loop only."""

    def __init__(self) -> None:
        self.count = 0
        self.is_draining = False


@dataclass(frozen=True)
class Services:
    settings: Settings
    policy: Policy
    engine: Engine
    vectors: VectorCatalogue
    media_limits: MediaLimits
    created: int  # wall time, for /v1/models
    pool: ThreadPoolExecutor  # decodes images and runs processors
    in_flight: InFlight = field(default_factory=InFlight)
    bridge: EventBridge = field(default_factory=EventBridge)

    @property
    def model_name(self) -> str:
        """The name that requests use."""
        return self.settings.served_model_name or self.engine.identity.model_id

    def refuse_while_draining(self) -> None:
        if self.in_flight.is_draining:
            raise UnavailableError("the server is shutting down; ask another replica")


def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services
