"""All metrics of one replica, and their text for a scrape."""

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from server.metrics.catalogue import RequestFamilies, StateFamilies
from server.metrics.families import Family
from server.metrics.requests import RequestMetrics
from server.metrics.tenants import TenantLabels
from server.record import RequestRecord

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PLAIN = "text/plain; version=0.0.4; charset=utf-8"
_EOF = "# EOF\n"


def process_registry() -> CollectorRegistry:
    """With prometheus_client's metrics of the process and of Python."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class Metrics:
    """Event loop only, where requests end and scrapes are answered.

    registry: of what is exposed beside our own, without the constant label.
    """

    def __init__(self, model_name: str, tenants: TenantLabels, registry: CollectorRegistry) -> None:
        self.state = StateFamilies(model_name)
        self.tenants = tenants
        self._requests = RequestFamilies(model_name)
        self._observer = RequestMetrics(self._requests, tenants)
        self._registry = registry

    @property
    def families(self) -> list[Family]:
        return [*self._requests, *self.state]

    def observe_request(self, record: RequestRecord) -> None:
        """An observer of requests."""
        self._observer.observe(record)

    def observe_store(self, operation: str, seconds: float, has_failed: bool) -> None:
        """An observer of the store's calls."""
        self.state.store_operation.observe(seconds, operation)
        self.state.store_errors.inc(operation, by=has_failed)

    def refresh_tenants(self) -> None:
        """Follow the directory: the series of deleted tenants end, so that none are left behind."""
        for tenant in self.tenants.refresh():
            for family in self.families:
                family.forget("tenant", tenant)

    def text(self, is_openmetrics: bool) -> bytes:
        """Every family that has a series; exemplars are in OpenMetrics only."""
        parts: list[str] = []
        for family in self.families:
            lines = list(family.lines(with_exemplars=is_openmetrics))
            if lines:
                parts += (family.head(is_openmetrics), *lines)
        ours = "".join(parts).encode()
        rest = (openmetrics.generate_latest if is_openmetrics else generate_latest)(self._registry)
        return ours + rest  # whose end is the end of everything
