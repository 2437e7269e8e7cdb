"""Requests through the real application, and what their metrics say of them."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from server.engine.types import (
    ChoiceFinished,
    EngineEvent,
    Failed,
    FailureKind,
    Finished,
    InputError,
    NotAcceptingError,
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
    PAIR_S,
    SAMPLE_DOSE,
    SHIFT_S,
    TIMINGS,
    FakeEngine,
    chat_body,
    plays,
    says,
)
from tests.server.metrics.conftest import Scraping, scrape_of
from tests.server.test_serve import send

PATH = "/v1/chat/completions"
KEY = "a-key-of-clients"
ClientFor = Callable[..., TestClient]


def finishing(**changes: Any) -> tuple[EngineEvent, ...]:
    """The events of an answer of one token."""
    return (
        TextEvent(0, "x"),
        ChoiceFinished(0, "stop"),
        Finished(prompt_tokens=7, completion_tokens=1, timings=TIMINGS, **changes),
    )


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

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("in the middle")

    client = TestClient(RequestContext(app, InFlight(), (records.append,)))
    assert client.post(PATH).status_code == 200
    assert outcome_of(records[0]) == "error" and "in the middle" in caplog.text


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


# --------------------------------------------------------------------------------------- steering


def test_what_steering_took_is_what_the_answers_say(
    client_for: ClientFor, scraped: Scraping
) -> None:
    """One definition, at dataset and sample level, streamed and whole."""
    client = client_for(client_override="any")
    told: dict[str, float] = {"dataset": 0.0, "sample": 0.0}
    for mode in told:
        for stream in (False, True):
            body = chat_body(images=1, steering={"mode": mode}, stream=stream)
            response = client.post(PATH, json=body)
            told[mode] += _overhead_ms(response) / 1000
    scrape = scraped(client)
    for mode, seconds in told.items():
        of_mode = {"mode": mode, "tenant": "default"}
        assert scrape.value("deshift_steering_overhead_seconds_count", **of_mode) == 2
        exported = scrape.value("deshift_steering_overhead_seconds_sum", **of_mode)
        assert exported == pytest.approx(seconds, abs=2e-6), "answers round to microseconds"
        stages = scrape.value("deshift_steering_stage_seconds_sum", mode=mode)
        assert stages == pytest.approx(exported)
    assert scrape.value("deshift_steering_overhead_seconds_count", mode="off") is None


def _overhead_ms(response: Any) -> float:
    if response.headers["content-type"].startswith("application/json"):
        return float(response.json()["steering"]["overhead_ms"])
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return float(json.loads(lines[-2])["steering"]["overhead_ms"])


def test_the_stages_of_the_sample_level_are_told_apart(
    client_for: ClientFor, scraped: Scraping
) -> None:
    client = client_for(steering_mode="sample")
    assert client.post(PATH, json=chat_body(images=1)).status_code == 200
    scrape = scraped(client)
    stages = {
        labels["stage"]: value
        for labels, value in scrape.series("deshift_steering_stage_seconds_sum", mode="sample")
    }
    assert stages.keys() == {"shift", "inject", "store", "admission"}
    assert stages["shift"] == SHIFT_S and stages["inject"] == TIMINGS.inject_s
    assert stages["admission"] > PAIR_S, "making the two prompts is in it"
    assert scrape.value("deshift_steering_relative_dose_sum", mode="sample") == SAMPLE_DOSE
    prepare = scrape.value("deshift_prompt_prepare_seconds_sum")
    assert prepare is not None and prepare > 0


def test_making_the_two_prompts_is_no_part_of_preparing_the_requests_own(
    client_for: ClientFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[RequestRecord] = []
    monkeypatch.setattr("server.app.log_request", records.append)
    client = client_for(steering_mode="sample")
    client.post(PATH, json=chat_body(images=1))
    client.post(PATH, json=chat_body())
    steered, plain = records
    assert steered.stages["pair"] == PAIR_S
    assert steered.stages["prepare"] > 0, "what is left of the whole"
    assert "pair" not in plain.stages


def test_the_share_is_of_the_whole_time_as_the_client_saw_it(
    client: TestClient, scraped: Scraping
) -> None:
    client.post(PATH, json=chat_body(images=1))
    scrape = scraped(client)
    overhead = scrape.value("deshift_steering_overhead_seconds_sum")
    whole = scrape.value("deshift_e2e_request_latency_seconds_sum")
    assert overhead is not None and whole is not None
    ratio = scrape.value("deshift_steering_overhead_ratio_sum", tenant="default", mode="dataset")
    assert ratio == pytest.approx(overhead / whole)


def test_what_was_not_steered_says_why_and_has_no_overhead(
    client_for: ClientFor, fake_engine: FakeEngine, scraped: Scraping
) -> None:
    client = client_for(on_error="serve-unsteered", client_override="any")
    fake_engine.script = says("x", shift_failure="not finite")
    bodies = [
        chat_body(),
        chat_body(images=1, steering={"mode": "off"}),
        chat_body(images=1, steering={"alpha": 0}),
        chat_body(images=1, steering={"mode": "sample"}),
    ]
    for body in bodies:
        assert client.post(PATH, json=body).status_code == 200
    scrape = scraped(client)
    reasons = {
        labels["reason"]: value for labels, value in scrape.series("deshift_steering_skipped_total")
    }
    assert reasons == {"text-only": 1, "disabled": 1, "alpha-zero": 1, "shift-failed": 1}
    modes = {labels["mode"] for labels, _ in scrape.series("deshift_requests_total")}
    assert modes == {"off"}, "what was applied in the end"
    assert not scrape.series("deshift_steering_overhead_seconds_count")
    assert not scrape.series("deshift_steering_relative_dose_count")


def test_times_tokens_and_projections_come_from_the_engine(
    client: TestClient, fake_engine: FakeEngine, scraped: Scraping
) -> None:
    for projection in (None, 0.7, -0.3):
        fake_engine.script = plays(*finishing(projection=projection))
        assert client.post(PATH, json=chat_body(images=1)).status_code == 200
    scrape = scraped(client)
    assert scrape.value("deshift_prompt_tokens_total", tenant="default") == 21
    assert scrape.value("deshift_generation_tokens_total", tenant="default") == 3
    name = "deshift_request_queue_time_seconds_sum"
    assert scrape.value(name) == pytest.approx(3 * TIMINGS.queue_s)
    name = "deshift_request_prefill_time_seconds_sum"
    assert scrape.value(name, mode="dataset") == pytest.approx(3 * TIMINGS.prefill_s)
    ttft = scrape.value("deshift_time_to_first_token_seconds_sum", mode="dataset")
    assert ttft is not None and ttft > 3 * TIMINGS.time_to_first_token_s, "and the way to it"
    assert scrape.value("deshift_image_decode_seconds_count") == 3
    name = "deshift_steering_shift_projection"
    assert scrape.value(f"{name}_count", tenant="default") == 2, "where it was probed"
    assert scrape.value(f"{name}_sum") == 0.7, "below 0 counts as 0"
    assert scrape.value(f"{name}_bucket", le="0.0") == 1


def test_a_text_request_has_no_time_of_decoding_pictures(
    client: TestClient, scraped: Scraping
) -> None:
    client.post(PATH, json=chat_body())
    scrape = scraped(client)
    assert scrape.value("deshift_image_decode_seconds_count") is None
    assert scrape.value("deshift_prompt_prepare_seconds_count") == 1


def test_exemplars_name_the_request(client: TestClient, scraped: Scraping) -> None:
    client.post(PATH, json=chat_body(images=1), headers={"x-request-id": "the-one"})
    scrape = scraped(client)
    for name in (
        *("deshift_time_to_first_token_seconds", "deshift_e2e_request_latency_seconds"),
        "deshift_steering_overhead_seconds",
    ):
        found = [s.exemplar for s in scrape.families[name].samples if s.exemplar]
        assert [each.labels for each in found] == [{"request_id": "the-one"}], name
    assert "the-one" not in scraped(client, openmetrics=False).text
