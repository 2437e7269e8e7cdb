"""What a scrape says of the replica: policies in force, store, vectors, engine."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.documents import PolicyFields, TenantDocument, text_of
from server.engine.stats import CacheUse, EngineStats
from server.services import Services
from steering.stores import MemoryStore
from steering.stores.base import Changes, Document
from tests.server.conftest import Tenants, make_settings, wait_until
from tests.server.fakes import AUTHOR, FakeEngine, make_vectors
from tests.server.metrics.conftest import Scraping

ClientFor = Callable[..., TestClient]


def services_of(client: TestClient) -> Services:
    services: Services = client.app.state.services  # type: ignore[attr-defined]
    return services


def test_alpha_set_by_an_operator_reads_so_once_it_is_in_force(
    client: TestClient, tenants: Tenants, scraped: Scraping
) -> None:
    tenants.create("acme", alpha=0.5)
    revision = tenants.set_policy("acme", alpha=0.37, schedule="incremental")
    scrape = scraped(client)
    assert scrape.value("deshift_steering_alpha", tenant="acme") == 0.37
    assert scrape.value("deshift_policy_revision", tenant="acme") == revision
    ((labels, value),) = scrape.series("deshift_policy_info", tenant="acme")
    assert value == 1 and labels == {
        "model_name": "tiny",
        "tenant": "acme",
        "mode": "dataset",
        "method": "subtract",
        "schedule": "incremental",
    }
    assert scrape.value("deshift_steering_alpha", tenant="default") == 0.5, "the settings'"
    assert scrape.value("deshift_policy_revision", tenant="default") == 0
    assert scrape.value("deshift_tenants") == 1


@pytest.mark.parametrize("action", ["unsteered", "reject"])
def test_alpha_in_force_is_zero_when_killed_off_or_over(
    client: TestClient, tenants: Tenants, scraped: Scraping, action: Any
) -> None:
    tenants.create("off", mode="off")
    assert scraped(client).value("deshift_steering_alpha", tenant="off") == 0
    assert scraped(client).value("deshift_kill_switch") == 0
    tenants.create("acme")
    tenants.do(lambda control: control.set_kill(action, AUTHOR))
    scrape = scraped(client)
    assert scrape.value("deshift_steering_alpha") == 0
    assert scrape.value("deshift_kill_switch", action=action) == 1
    assert scrape.value("deshift_kill_switch") == 1, "the other one is 0"


def test_a_policy_that_has_run_out_is_not_what_is_in_force(
    client: TestClient, scraped: Scraping
) -> None:
    policy = {
        "policy": PolicyFields(alpha=0.9),
        "until": {"at": 1.0, "then": PolicyFields(alpha=0)},
    }
    directory = services_of(client).directory
    document = Document("tenant/acme", text_of(TenantDocument.model_validate(policy)), 7)
    directory.apply(Changes(directory.epoch, 7, (document,)))
    assert scraped(client).value("deshift_steering_alpha", tenant="acme") == 0


def test_the_store_and_its_calls(client: TestClient, scraped: Scraping) -> None:
    services = services_of(client)
    wait_until(lambda: services.vectors.ids != {})
    scrape = scraped(client)
    assert scrape.value("deshift_store_up") == 1 and scrape.value("deshift_store_foreign") == 0
    assert scrape.value("deshift_store_revision") == 1
    age = scrape.value("deshift_policy_age_seconds")
    assert age is not None and age >= 0
    for operation in ("read", "heartbeat", "vectors"):
        count = scrape.value("deshift_store_operation_seconds_count", operation=operation)
        assert count is not None and count >= 1, operation
        assert scrape.value("deshift_store_errors_total", operation=operation) == 0
    ((labels, value),) = scrape.series("deshift_vectors_info")
    assert value == 1
    assert (labels["alias"], labels["vector_id"]) == ("default", make_vectors().id)
    assert scrape.value("deshift_vectors_problem", alias="default") == 0


def test_an_alias_without_vectors_is_a_problem_and_the_replica_not_ready(
    client_for: ClientFor, scraped: Scraping
) -> None:
    client = client_for(vector_alias="missing")
    assert client.get("/ready").status_code == 503
    scrape = scraped(client)
    assert scrape.value("deshift_ready") == 0
    assert scrape.value("deshift_vectors_problem", alias="missing") == 1
    assert not scrape.series("deshift_vectors_info")


def test_readiness_is_what_the_status_page_says(
    client: TestClient, fake_engine: FakeEngine, scraped: Scraping
) -> None:
    services = services_of(client)
    wait_until(lambda: client.get("/ready").status_code == 200)
    scrape = scraped(client)
    names = ("ready", "engine_up", "draining")
    assert [scrape.value(f"deshift_{name}") for name in names] == [1, 1, 0]
    services.in_flight.is_draining = True
    assert client.get("/ready").status_code == 503
    scrape = scraped(client)
    assert [scrape.value(f"deshift_{name}") for name in names] == [0, 1, 1]
    fake_engine.state = "failed"
    assert scraped(client).value("deshift_engine_up") == 0


def test_the_replica_says_who_it_is(client_for: ClientFor, scraped: Scraping) -> None:
    client = client_for(replica="rack-1", device="cpu", max_rows=3, max_queue=5)
    scrape = scraped(client)
    ((labels, value),) = scrape.series("deshift_replica_info")
    assert value == 1 and labels.pop("version")
    assert labels == {
        "model_name": "tiny",
        "replica": "rack-1",
        "model": "tiny",
        "device": "cpu",
        "dtype": "float32",
    }
    assert scrape.value("deshift_max_rows") == 3 and scrape.value("deshift_max_queue") == 5
    assert scrape.value("process_resident_memory_bytes")


class CountingEngine(FakeEngine):
    def stats(self) -> EngineStats:
        return self.counters.snapshot(
            {"own": CacheUse(10, 20, 300, 4000), "shift": CacheUse(50, 60)}, CacheUse(7, 8, 9, 11)
        )


def test_what_the_engine_has_counted_is_read_at_each_scrape(
    store: MemoryStore, scraped: Scraping
) -> None:
    engine = CountingEngine()
    with TestClient(create_app(make_settings(), engine=engine, store=store)) as client:
        assert scraped(client).value("deshift_canary_passed") is None, "it has not run"
        engine.counters.is_canary_passed = True
        engine.counters.inter_token_s.observe(0.03, times=4)
        engine.counters.step_s["mixed"].observe(0.2)
        engine.counters.vision_encode_s.observe(0.5)
        engine.counters.prefill_tokens["probe"] += 3
        engine.counters.failures["hooks"] += 2
        engine.counters.generated_tokens += 6
        scrape = scraped(client)
    assert scrape.value("deshift_canary_passed") == 1
    assert scrape.value("deshift_inter_token_latency_seconds_count") == 4
    assert scrape.value("deshift_inter_token_latency_seconds_sum") == pytest.approx(0.12)
    assert scrape.value("deshift_engine_step_seconds_sum", kind="mixed") == 0.2
    assert scrape.value("deshift_engine_step_seconds_count", kind="decode") == 0
    assert scrape.value("deshift_vision_encode_seconds_count") == 1
    assert scrape.value("deshift_engine_prefill_tokens_total", prompt="probe") == 3
    assert scrape.value("deshift_engine_failures_total", kind="hooks") == 2
    assert scrape.value("deshift_engine_generated_tokens_total") == 6
    assert scrape.value("deshift_engine_failures_total", kind="steps") == 0
    for prompt, hits, misses in (("own", 10, 20), ("shift", 50, 60)):
        assert scrape.value("deshift_prefix_cache_hit_tokens_total", prompt=prompt) == hits
        assert scrape.value("deshift_prefix_cache_miss_tokens_total", prompt=prompt) == misses
    assert scrape.value("deshift_vision_cache_hit_tokens_total") == 7
    assert scrape.value("deshift_vision_cache_miss_tokens_total") == 8
    for cache, held, limit in (("prefix", 300, 4000), ("vision", 9, 11)):
        assert scrape.value("deshift_cache_bytes", cache=cache) == held
        assert scrape.value("deshift_cache_limit_bytes", cache=cache) == limit
