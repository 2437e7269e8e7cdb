"""What finished requests took, and what of it was steering, through the real application."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.engine.types import (
    ChoiceFinished,
    EngineEvent,
    EngineInputs,
    Finished,
    TextEvent,
)
from steering.stores import MemoryStore
from tests.server.conftest import make_settings
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
from tests.server.metrics.conftest import Scraping

PATH = "/v1/chat/completions"
ClientFor = Callable[..., TestClient]


def finishing(**changes: Any) -> tuple[EngineEvent, ...]:
    """The events of an answer of one token."""
    return (
        TextEvent(0, "x"),
        ChoiceFinished(0, "stop"),
        Finished(prompt_tokens=7, completion_tokens=1, timings=TIMINGS, **changes),
    )


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


def test_what_a_gate_reads_is_in_the_stages_as_it_is_in_the_whole(
    client: TestClient, fake_engine: FakeEngine, scraped: Scraping
) -> None:
    """At dataset level the stages came to less than the overhead that they are said to be."""
    timings = replace(TIMINGS, shift_s=0.25)
    fake_engine.script = plays(
        TextEvent(0, "x"), ChoiceFinished(0, "stop"), Finished(7, 1, timings)
    )
    assert client.post(PATH, json=chat_body(images=1)).status_code == 200
    scrape = scraped(client)
    stage = {"mode": "dataset", "stage": "shift"}
    assert scrape.value("deshift_steering_stage_seconds_sum", **stage) == 0.25
    whole = scrape.value("deshift_steering_overhead_seconds_sum", mode="dataset")
    assert scrape.value("deshift_steering_stage_seconds_sum") == pytest.approx(whole)


class SlowPairEngine(FakeEngine):
    """Says that making the two prompts took far longer than it did."""

    def prepare(self, *arguments: Any) -> EngineInputs:
        inputs = super().prepare(*arguments)
        return replace(inputs, pair_s=0.0 if inputs.pair is None else 100.0)


def test_making_the_two_prompts_is_no_part_of_preparing_the_requests_own(
    store: MemoryStore, scraped: Scraping
) -> None:
    settings = make_settings(steering_mode="sample")
    with TestClient(create_app(settings, engine=SlowPairEngine(), store=store)) as client:
        client.headers["host"] = "localhost"
        for images in (0, 1):
            assert client.post(PATH, json=chat_body(images=images)).status_code == 200
        scrape = scraped(client, openmetrics=False)
    prepare = scrape.value("deshift_prompt_prepare_seconds_sum")
    assert prepare is not None and -100 < prepare < -50, "what is left of the whole"
    name = "deshift_steering_stage_seconds_sum"
    admission = scrape.value(name, mode="sample", stage="admission")
    assert admission is not None and 100 < admission < 150


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
