"""Scrapes as Prometheus makes them: of the admin listener, read by its client library's parsers."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_plain
from starlette.testclient import TestClient

from server.admin.app import create_admin_app
from server.services import Services

ACCEPT = {True: "application/openmetrics-text; version=1.0.0", False: "text/plain"}


@dataclass(frozen=True)
class Scrape:
    content_type: str
    text: str
    families: dict[str, Metric]

    def series(self, name: str, **labels: str) -> list[tuple[dict[str, str], float]]:
        """Samples of this name that have these labels, with all of their labels."""
        return [
            (sample.labels, sample.value)
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def value(self, name: str, **labels: str) -> float | None:
        """The sum over such samples; None where there is none."""
        found = [value for _, value in self.series(name, **labels)]
        return sum(found) if found else None

    @property
    def keys(self) -> set[str]:
        """Of our own series: name and labels, as they stand in the text."""
        lines = self.text.splitlines()
        return {line.split("} ")[0] for line in lines if line.startswith("deshift_")}


Scraping = Callable[..., Scrape]


def scrape_of(services: Services, openmetrics: bool = True) -> Scrape:
    app = create_admin_app(services)
    client = TestClient(app, "http://127.0.0.1:8001")
    response = client.get("/metrics", headers={"accept": ACCEPT[openmetrics]})
    assert response.status_code == 200
    read = read_openmetrics if openmetrics else read_plain
    families = {family.name: family for family in read(response.text)}
    return Scrape(response.headers["content-type"], response.text, families)


@pytest.fixture
def scraped() -> Scraping:
    """Scrape the server behind a started client of the public listener."""

    def scrape(client: TestClient, openmetrics: bool = True) -> Scrape:
        return scrape_of(client.app.state.services, openmetrics)  # type: ignore[attr-defined]

    return scrape
