"""Outcomes of requests through the real application."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from server.engine.types import (
    Failed,
    FailureKind,
    InputError,
    NotAcceptingError,
    PairError,
    QueueFullError,
    TextEvent,
)
from server.metrics.requests import outcome_of
from server.middleware import RequestContext
from server.record import RequestRecord
from server.services import InFlight
from steering.stores import MemoryStore
from tests.server.conftest import Tenants, live_server, wait_until
from tests.server.fakes import (
    FakeEngine,
    chat_body,
    plays,
)
from tests.server.metrics.conftest import Scraping, scrape_of
from tests.server.test_serve import send

PATH = "/v1/chat/completions"
KEY = "a-key-of-clients"
ClientFor = Callable[..., TestClient]


def only(found: list[tuple[dict[str, str], float]]) -> dict[str, str]:
    """The labels of the one series, which counted once."""
    ((labels, value),) = found
    assert value == 1
    return labels


# --------------------------------------------------------------------------------------- outcomes


@pytest.mark.parametrize(
    ("refusal", "status", "outcome"),
    [
        (InputError("no such template"), 400, "invalid"),
        (QueueFullError("full"), 429, "limited"),
        (NotAcceptingError("draining"), 503, "unavailable"),
    ],
)
def test_what_the_engine_refuses(
    client: TestClient,
    fake_engine: FakeEngine,
    scraped: Scraping,
    refusal: Any,
    status: int,
    outcome: str,
) -> None:
    fake_engine.refusal = refusal
    assert client.post(PATH, json=chat_body()).status_code == status
    assert only(scraped(client).series("deshift_requests_total")) == {
        "model_name": "tiny",
        "tenant": "default",
        "mode": "off",
        "outcome": outcome,
    }


@pytest.mark.parametrize(
    ("kind", "status", "outcome"),
    [("timeout", 408, "timeout"), ("draining", 503, "unavailable"), ("engine", 500, "error")],
)
def test_an_answer_that_fails_before_it_begins(
    client: TestClient,
    fake_engine: FakeEngine,
    scraped: Scraping,
    kind: FailureKind,
    status: int,
    outcome: str,
) -> None:
    fake_engine.script = plays(Failed(kind, "why"))
    assert client.post(PATH, json=chat_body(images=1)).status_code == status
    scrape = scraped(client)
    labels = only(scrape.series("deshift_requests_total"))
    assert (labels["outcome"], labels["mode"]) == (outcome, "dataset"), "what was to be applied"
    assert scrape.value("deshift_e2e_request_latency_seconds_count") is None, "it did not finish"


@pytest.mark.parametrize(("kind", "outcome"), [("engine", "error"), ("timeout", "timeout")])
def test_a_stream_that_breaks_after_its_head_is_no_success(
    client: TestClient,
    fake_engine: FakeEngine,
    scraped: Scraping,
    kind: FailureKind,
    outcome: str,
) -> None:
    fake_engine.script = plays(TextEvent(0, "Hel"), Failed(kind, "why"))
    response = client.post(PATH, json=chat_body(stream=True))
    assert response.status_code == 200 and "error" in response.text
    assert only(scraped(client).series("deshift_requests_total"))["outcome"] == outcome


def test_what_is_refused_before_the_engine_hears_of_it(
    client_for: ClientFor, fake_engine: FakeEngine, scraped: Scraping
) -> None:
    client = client_for(api_key=KEY, max_body_bytes=2048)
    key = {"authorization": f"Bearer {KEY}"}

    def post(status: int, outcome: str, before: dict[str, float], **request: Any) -> None:
        assert client.post(PATH, **{"headers": key} | request).status_code == status
        series = scraped(client).series("deshift_requests_total")
        found = {f"{labels['tenant']} {labels['outcome']}": value for labels, value in series}
        before[outcome] = before.get(outcome, 0) + 1
        assert found == before

    counted: dict[str, float] = {}
    post(200, "default success", counted, json=chat_body())
    post(400, "default invalid", counted, content=b"{")
    post(403, "default unauthorized", counted, json=chat_body(images=1, steering={"mode": "off"}))
    post(404, "default invalid", counted, json=chat_body() | {"model": "another"})
    post(413, "default invalid", counted, json=chat_body("x" * 3000))
    post(401, "other unauthorized", counted, json=chat_body(), headers={})
    fake_engine.prepare_error = RuntimeError("a mistake of ours")
    post(500, "default error", counted, json=chat_body())
    assert client.get("/v1/models", headers=key).status_code == 200
    assert client.get(PATH, headers=key).status_code == 405
    total = scraped(client).value("deshift_requests_total")
    assert total == 7, "other paths and methods do not count"


def test_a_tenants_limit_and_its_kill_count_as_its_own(
    client: TestClient, tenants: Tenants, scraped: Scraping
) -> None:
    key = {"authorization": f"Bearer {tenants.create(requests_per_minute=1)}"}
    statuses = [client.post(PATH, json=chat_body(), headers=key).status_code for _ in range(2)]
    assert statuses == [200, 429]
    series = scraped(client).series("deshift_requests_total", tenant="acme")
    assert sorted(labels["outcome"] for labels, _ in series) == ["limited", "success"]


def test_a_mistake_of_ours_after_the_head_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """Its status is 200, and nobody noted a failure."""
    records: list[RequestRecord] = []

    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("in the middle")

    client = TestClient(RequestContext(app, InFlight(), (records.append,)))
    assert client.post(PATH).status_code == 200
    assert outcome_of(records[0]) == "error" and "in the middle" in caplog.text


def test_an_observer_that_fails_breaks_neither_the_answer_nor_other_observers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What it raised went out to the client's connection, and no metric counted the request."""
    records: list[RequestRecord] = []

    def fails(record: RequestRecord) -> None:
        raise RuntimeError(f"cannot tell of {record.status}")

    app, in_flight = PlainTextResponse("all of it"), InFlight()
    client = TestClient(RequestContext(app, in_flight, (fails, records.append)))
    assert client.post(PATH).text == "all of it"
    assert outcome_of(records[0]) == "success" and in_flight.count == 0
    assert "cannot tell of 200" in caplog.text and records[0].request_id in caplog.text


@pytest.mark.anyio
async def test_a_stream_that_the_server_ends_when_it_stops_is_no_success() -> None:
    """Its status is 200: the head was sent long ago."""
    records: list[RequestRecord] = []
    begun = asyncio.Event()

    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        begun.set()
        await asyncio.Event().wait()

    async def nothing(*_: Any) -> Any:
        return None

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
    context = RequestContext(app, InFlight(), (records.append,))
    answering = asyncio.create_task(context(scope, nothing, nothing))
    await begun.wait()
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert records[0].failure == "draining" and outcome_of(records[0]) == "error"


def test_what_is_not_steered_after_all_counts_so_however_it_ends(
    client_for: ClientFor, fake_engine: FakeEngine, scraped: Scraping
) -> None:
    """A pair that cannot be made changes the plan before the engine is asked."""
    client = client_for(steering_mode="sample", on_error="serve-unsteered")
    fake_engine.pair_error = PairError("no pair")
    fake_engine.script = plays(Failed("engine", "why"))
    assert client.post(PATH, json=chat_body(images=1)).status_code == 500
    assert only(scraped(client).series("deshift_requests_total"))["mode"] == "off"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_cancelled_and_leaves_no_gauge_up(
    fake_engine: FakeEngine, store: MemoryStore, stream: bool
) -> None:
    fake_engine.script = plays(TextEvent(0, "Hel"), threading.Event())  # and then for ever
    with live_server(fake_engine, store) as live:
        connection = send(live, chat_body(stream=stream, images=1))
        wait_until(lambda: fake_engine.num_running == 1)
        during = scrape_of(live.services)
        assert during.value("deshift_http_requests_in_flight") == 1
        assert during.value("deshift_num_requests_running") == 1
        connection.close()
        wait_until(lambda: live.services.in_flight.count == 0 and fake_engine.num_running == 0)
        after = scrape_of(live.services)
    assert only(after.series("deshift_requests_total"))["outcome"] == "cancelled"
    assert after.value("deshift_http_requests_in_flight") == 0
    assert after.value("deshift_num_requests_running") == 0
    assert after.value("deshift_steering_overhead_seconds_count") is None, "it did not finish"


def test_no_failure_leaves_the_gauge_of_requests_in_flight_up(
    client_for: ClientFor, fake_engine: FakeEngine, scraped: Scraping
) -> None:
    client = client_for(max_body_bytes=2048)
    statuses = [client.post(PATH, json=chat_body("x" * 3000)).status_code]
    for script in (
        plays(Failed("engine", "why")),
        plays(TextEvent(0, "x"), Failed("engine", "why")),
    ):
        fake_engine.script = script
        statuses.append(client.post(PATH, json=chat_body(stream=True)).status_code)
    fake_engine.prepare_error = RuntimeError("a mistake of ours")
    statuses.append(client.post(PATH, json=chat_body()).status_code)
    assert statuses == [413, 500, 200, 500]
    assert scraped(client).value("deshift_http_requests_in_flight") == 0
