"""GET /metrics: its formats, its bounds, what it says of the replica, and what it never says."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.documents import PolicyFields, TenantDocument, text_of
from server.metrics.metrics import OPENMETRICS, PLAIN
from server.services import Services
from steering.stores.base import Changes, Document
from tests.server.admin.conftest import ADMIN_KEYS
from tests.server.conftest import Tenants, wait_until
from tests.server.fakes import AUTHOR, FakeEngine, chat_body
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
