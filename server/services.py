"""What the handlers may use: one typed object, built by app.py."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from starlette.requests import Request

from server.config import Settings
from server.control import Control
from server.directory import TenantDirectory
from server.documents import DEFAULT_TENANT
from server.engine.api import Engine
from server.engine.types import QueueFullError
from server.errors import UnavailableError
from server.generation import EventBridge
from server.heartbeat import Heartbeat
from server.limits import TenantLimits
from server.media import MediaLimits
from server.metrics.metrics import Metrics
from server.sync import Sync
from server.vectors import VectorCatalogue
from steering.stores.base import Store


class InFlight:
    """Requests that are being answered, and whether new ones are still taken. Event loop only."""

    def __init__(self) -> None:
        self.count = 0
        self.is_draining = False


class BodyBudget:
    """Bytes of request bodies that are held at this moment, over all requests. Event loop only."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0


class BodyShare:
    """What one request holds of the budget: it grows with the body and is given back once."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._num_bytes = 0

    def grow_to(self, num_bytes: int) -> None:
        """Raises QueueFullError when the budget has no room."""
        more = num_bytes - self._num_bytes
        if more <= 0:
            return
        if self._budget.held + more > self._budget.max_bytes:
            raise QueueFullError(
                f"the bodies of other requests fill the {self._budget.max_bytes} bytes that are "
                "kept for them; try again later"
            )
        self._budget.held += more
        self._num_bytes = num_bytes

    def release(self) -> None:
        self._budget.held -= self._num_bytes
        self._num_bytes = 0


@dataclass(frozen=True)
class Services:
    settings: Settings
    engine: Engine
    store: Store  # what this replica reads
    control: Control  # what its operators change, with rights of its own
    directory: TenantDirectory
    vectors: VectorCatalogue
    sync: Sync
    heartbeat: Heartbeat
    media_limits: MediaLimits
    created: int  # wall time, for /v1/models
    pool: ThreadPoolExecutor  # decodes images and runs processors
    bodies: BodyBudget
    metrics: Metrics
    limits: TenantLimits = field(default_factory=TenantLimits)
    in_flight: InFlight = field(default_factory=InFlight)
    bridge: EventBridge = field(default_factory=EventBridge)

    @property
    def model_name(self) -> str:
        """The name that requests use."""
        return self.settings.served_model_name or self.engine.identity.model_id

    @property
    def is_ready(self) -> bool:
        """Whether the engine passed its canary, nothing drains, and the default policy is known and
        can be kept."""
        if self.in_flight.is_draining or self.engine.status().state != "ready":
            return False
        if self.settings.cold_start == "refuse" and not self.directory.is_synced:
            return False
        try:
            policy = self.directory.policy(DEFAULT_TENANT, time.time())
        except UnavailableError:
            return False
        return self.vectors.is_ready_for(policy)

    def refuse_while_draining(self) -> None:
        if self.in_flight.is_draining:
            raise UnavailableError("the server is shutting down; ask another replica")


def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services
