"""GET /metrics: its formats, its bounds, what it says of the replica, and what it never says."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.documents import PolicyFields, TenantDocument, text_of
from server.engine.stats import CacheUse, EngineStats
from server.metrics.metrics import OPENMETRICS, PLAIN
from server.services import Services
from steering.stores import MemoryStore
from steering.stores.base import Changes, Document
from tests.server.admin.conftest import ADMIN_KEYS
from tests.server.conftest import Tenants, make_settings, wait_until
from tests.server.fakes import AUTHOR, FakeEngine, chat_body, make_vectors
from tests.server.metrics.conftest import Scraping

PATH = "/v1/chat/completions"
SERIES_A_TENANT = 106  # as the README says
ClientFor = Callable[..., TestClient]


def services_of(client: TestClient) -> Services:
    services: Services = client.app.state.services  # type: ignore[attr-defined]
    return services


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def chat(client: TestClient, key: str | None = None, **fields: Any) -> int:
    headers = {} if key is None else bearer(key)
    return client.post(PATH, json=chat_body(**fields), headers=headers).status_code


# ---------------------------------------------------------------------------------------- formats


def test_both_formats_say_the_same_and_each_by_its_own_name(
    client: TestClient, scraped: Scraping
) -> None:
    chat(client, images=1)
    ours = {True: scraped(client), False: scraped(client, openmetrics=False)}
    assert ours[True].content_type == OPENMETRICS
    assert ours[False].content_type == PLAIN
    counted = [
        {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in scrape.families.values()
            for sample in family.samples
            if sample.name.startswith("deshift_")
            and "policy_age" not in sample.name
            # The scrape's own surroundings go on between the two.
            and "store_operation" not in sample.name
        }
        for scrape in ours.values()
    ]
    assert counted[0] == counted[1] and len(counted[0]) > 200


def test_a_client_that_names_no_format_gets_the_text_format_and_needs_no_key(
    client_for: ClientFor, scraped: Scraping
) -> None:
    client = client_for(admin_keys=ADMIN_KEYS, api_key="a-key-of-clients")
    assert scraped(client, openmetrics=False).content_type == PLAIN
    assert client.get("/metrics").status_code == 401, "clients have no metrics"
    assert client.get("/metrics", headers=bearer("a-key-of-clients")).status_code == 404


def test_promtool_finds_nothing_to_complain_about(client: TestClient, scraped: Scraping) -> None:
    promtool = which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    for fields in ({}, {"images": 1}, {"n": 99}):
        chat(client, **fields)
    text = scraped(client, openmetrics=False).text
    assert text.count("# TYPE deshift_") > 40
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=text, text=True, capture_output=True
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_every_family_that_is_declared_has_series_once_there_was_traffic(
    client_for: ClientFor, fake_engine: FakeEngine, tenants_of: Callable[..., Tenants],
    scraped: Scraping,
) -> None:  # fmt: skip
    """So that no panel looks at a metric that never comes."""
    client = client_for(steering_mode="sample")
    fake_engine.counters.is_canary_passed = True
    tenants_of(client).create()
    for fields in ({}, {"images": 1}):
        assert chat(client, tenants_of(client).create(f"t{len(fields)}"), **fields) == 200
    metrics = services_of(client).metrics
    without = {each.name for each in metrics.families} - {
        line.split()[2] for line in scraped(client, False).text.splitlines() if "# TYPE" in line
    }
    assert without == {"deshift_steering_shift_projection"}, "nothing was probed"


# ----------------------------------------------------------------------------------------- bounds


def test_a_thousand_unknown_keys_add_no_series(client_for: ClientFor, scraped: Scraping) -> None:
    client = client_for(api_key="a-key-of-clients")
    assert chat(client, "unknown-0") == 401
    before = scraped(client)
    for number in range(1, 1001):
        assert chat(client, f"unknown-{number}") == 401
    after = scraped(client)
    assert after.keys == before.keys
    assert after.value("deshift_requests_total", tenant="other") == 1001
    assert "unknown-" not in after.text


def put_tenants(client: TestClient, *names: str) -> None:
    """What the store holds from now on: these tenants and nothing else."""
    text = text_of(TenantDocument(policy=PolicyFields(mode="sample", alpha=0.5)))
    documents = tuple(Document(f"tenant/{name}", text, 7) for name in names)
    directory = services_of(client).directory
    directory.apply(Changes(directory.epoch, 7, documents), is_whole=True)


def test_many_tenants_have_as_many_series_as_documented_and_no_more(
    client_for: ClientFor, scraped: Scraping
) -> None:
    """250 tenants, each with every mode, outcome and reason that there is."""
    client = client_for(metrics_tenants=200)
    names = [f"tenant-{number:03}" for number in range(250)]
    put_tenants(client, *names)
    families = services_of(client).metrics.families
    by_name = {family.name.removeprefix("deshift_"): family for family in families}
    labels = services_of(client).metrics.tenants
    modes, outcomes = ("off", "dataset", "sample"), "abcdefgh"
    for name in names:
        tenant = labels.label(name)
        for mode in modes:
            for outcome in outcomes:
                by_name["requests_total"].inc(tenant, mode, outcome)  # type: ignore[attr-defined]
        for mode in modes[1:]:
            for each in ("steering_overhead_seconds", "steering_overhead_ratio"):
                by_name[each].observe(0.1, tenant, mode, request_id="r")  # type: ignore[attr-defined]
        for reason in range(7):
            by_name["steering_skipped_total"].inc(tenant, str(reason))  # type: ignore[attr-defined]
        by_name["steering_shift_projection"].observe(0.5, tenant)  # type: ignore[attr-defined]
        for each in ("prompt_tokens_total", "generation_tokens_total"):
            by_name[each].inc(tenant)  # type: ignore[attr-defined]
    scrape = scraped(client)
    tenants = {line.split('tenant="')[1].split('"')[0] for line in scrape.keys if "tenant=" in line}
    assert tenants == {*names[:200], "default", "other"}
    of_one = [line for line in scrape.keys if 'tenant="tenant-007"' in line]
    assert len(of_one) == SERIES_A_TENANT
    assert len([line for line in scrape.keys if "tenant=" in line]) <= 202 * SERIES_A_TENANT
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    assert f"at most {SERIES_A_TENANT} series" in " ".join(readme.split())


def test_the_series_of_a_deleted_tenant_end_and_other_never_falls(
    client_for: ClientFor, tenants_of: Callable[..., Tenants], scraped: Scraping
) -> None:
    client = client_for(metrics_tenants=1)
    tenants = tenants_of(client)
    first, second = tenants.create("first"), tenants.create("second")
    for key in (first, second, second):
        assert chat(client, key, images=1) == 200
    scrape = scraped(client)
    assert scrape.value("deshift_requests_total", tenant="first") == 1
    assert scrape.value("deshift_requests_total", tenant="other") == 2
    tenants.do(lambda control: control.delete_tenant("first", None, AUTHOR))
    scrape = scraped(client)
    assert 'tenant="first"' not in scrape.text
    assert scrape.value("deshift_requests_total", tenant="other") == 2
    assert scrape.value("deshift_steering_alpha", tenant="second") == 0.5, "it takes the place"
    assert chat(client, second) == 200
    scrape = scraped(client)
    assert scrape.value("deshift_requests_total", tenant="other") == 2
    assert scrape.value("deshift_requests_total", tenant="second") == 1


# ---------------------------------------------------------------------------------------- secrets


def test_no_key_prompt_answer_or_unknown_name_is_exposed(
    client_for: ClientFor, tenants_of: Callable[..., Tenants], scraped: Scraping
) -> None:
    client = client_for(api_key="KEY-of-the-settings", admin_keys=ADMIN_KEYS)
    key = tenants_of(client).create()
    chat(client, key, text="PROMPT", images=1)
    chat(client, "KEY-of-the-settings", text="PROMPT")
    chat(client, "KEY-of-nobody", text="PROMPT")
    client.post(PATH, json=chat_body("PROMPT") | {"model": "NOMODEL"}, headers=bearer(key))
    client.get("/NOWHERE", headers=bearer(key))
    text = scraped(client).text
    admin_key = ADMIN_KEYS.split(",")[0].split(":")[1]
    for secret in (
        *("PROMPT", "Hello", "KEY", "NOMODEL", "NOWHERE", "base64", "iVBOR", key, admin_key),
    ):
        assert secret not in text, secret
    assert 'tenant="acme"' in text, "what is configured is named"


def test_odd_characters_in_names_cannot_forge_a_line(
    client_for: ClientFor, tenants_of: Callable[..., Tenants], scraped: Scraping
) -> None:
    odd = 'm" \\ \ndeshift_forged 1\n{x="y"} <b>é'
    client = client_for(served_model_name=odd)
    forged = 'x"} 1\ndeshift_forged 1'
    text = text_of(TenantDocument(policy=PolicyFields()))
    tenants_of(client).write(f"tenant/{forged}", text)
    services = services_of(client)
    wait_until(lambda: bool(services.directory.problems))
    for openmetrics in (True, False):
        scrape = scraped(client, openmetrics)
        assert not scrape.series("deshift_forged")
        ((labels, _),) = scrape.series("deshift_engine_up")
        assert labels == {"model_name": odd}
        assert scrape.value("deshift_documents_unreadable") == 1, "a name that is none"


# ------------------------------------------------------------------------------------ the replica


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
        scrape = scraped(client)
    assert scrape.value("deshift_canary_passed") == 1
    assert scrape.value("deshift_inter_token_latency_seconds_count") == 4
    assert scrape.value("deshift_inter_token_latency_seconds_sum") == pytest.approx(0.12)
    assert scrape.value("deshift_engine_step_seconds_sum", kind="mixed") == 0.2
    assert scrape.value("deshift_engine_step_seconds_count", kind="decode") == 0
    assert scrape.value("deshift_vision_encode_seconds_count") == 1
    assert scrape.value("deshift_engine_prefill_tokens_total", prompt="probe") == 3
    assert scrape.value("deshift_engine_failures_total", kind="hooks") == 2
    assert scrape.value("deshift_engine_failures_total", kind="steps") == 0
    for prompt, hits, misses in (("own", 10, 20), ("shift", 50, 60)):
        assert scrape.value("deshift_prefix_cache_hit_tokens_total", prompt=prompt) == hits
        assert scrape.value("deshift_prefix_cache_miss_tokens_total", prompt=prompt) == misses
    assert scrape.value("deshift_vision_cache_hit_tokens_total") == 7
    assert scrape.value("deshift_vision_cache_miss_tokens_total") == 8
    for cache, held, limit in (("prefix", 300, 4000), ("vision", 9, 11)):
        assert scrape.value("deshift_cache_bytes", cache=cache) == held
        assert scrape.value("deshift_cache_limit_bytes", cache=cache) == limit
