"""Whose request it is: tenants' keys, the settings' key, no key; and each tenant's limits."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.control import Control, key_digest
from server.documents import PolicyFields
from server.engine.types import Failed, TextEvent
from server.services import Services
from steering.errors import StoreError
from steering.stores import MemoryStore
from steering.stores.base import Changes
from tests.server.conftest import Tenants, live_server, make_settings, wait_until
from tests.server.fakes import AUTHOR, FakeEngine, chat_body, plays

PATH = "/v1/chat/completions"
API_KEY = "the-settings-key"
ADMIN_KEY = "0123456789abcdef-admin"
TENANTS_FORM = "dsk-" + "x" * 43  # of no tenant


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


def ask(client: TestClient, key: str | None, **fields: Any) -> httpx.Response:
    return client.post(PATH, json=chat_body(**fields), headers=bearer(key))


def outcome(response: httpx.Response) -> tuple[int, str | None]:
    error = response.json().get("error")
    return response.status_code, error and error["code"]


REFUSED = (401, "invalid_api_key")
SERVED = (200, None)
NOT_YET = (503, "store_unavailable")

# --------------------------------------------------------------------------------------------- keys


def test_a_tenants_key_brings_its_policy_and_its_cache(
    client: TestClient, tenants: Tenants, fake_engine: FakeEngine
) -> None:
    keys = {name: tenants.create(name, alpha=alpha) for name, alpha in (("a", 0.1), ("b", 0.2))}
    for name, alpha in (("a", 0.1), ("b", 0.2), ("a", 0.1)):
        response = ask(client, keys[name], images=1)
        assert f"alpha={alpha}" in response.headers["x-deshift-steering"]
        assert fake_engine.requests[-1].namespace == name


def test_a_thousand_unknown_keys_leave_nothing_behind(client: TestClient, tenants: Tenants) -> None:
    """What is counted per key grows with whoever knocks: limits, and metrics' labels."""
    key = tenants.create("acme", mode="off", requests_per_minute=5, concurrency=2)
    assert outcome(ask(client, key)) == SERVED
    limits = client.app.state.services.limits  # type: ignore[attr-defined]
    counted = list(limits._limiter.storage.events)
    for number in range(1000):
        assert outcome(ask(client, f"{TENANTS_FORM}{number}")) == REFUSED
    assert list(limits._limiter.storage.events) == counted and len(counted) == 1
    assert not limits._running


def test_from_the_first_tenants_key_on_everybody_needs_one(
    client: TestClient, tenants: Tenants
) -> None:
    assert outcome(ask(client, None)) == SERVED
    key = tenants.create()
    for wrong in (None, "none", key[:-1], key + "x", TENANTS_FORM, "acme", "first"):
        assert outcome(ask(client, wrong)) == REFUSED
        assert client.get("/v1/models", headers=bearer(wrong)).status_code == 401
        assert client.get("/health", headers=bearer(wrong)).status_code == 200
    assert outcome(ask(client, key)) == SERVED
    assert client.get("/v1/models", headers=bearer(key)).status_code == 200


def test_a_revoked_key_and_a_deleted_tenant_are_refused_at_once(
    client: TestClient, tenants: Tenants
) -> None:
    first = tenants.create()
    second = tenants.do(
        lambda control: control.rotate_key("acme", "first", "second", AUTHOR, overlap_s=60)
    ).text
    assert [outcome(ask(client, key)) for key in (first, second)] == [SERVED, SERVED]
    tenants.do(lambda control: control.revoke_key("acme", "first", AUTHOR))
    assert [outcome(ask(client, key)) for key in (first, second)] == [REFUSED, SERVED]
    tenants.do(lambda control: control.delete_tenant("acme", None, AUTHOR))
    assert outcome(ask(client, second)) == REFUSED


def test_the_settings_key_is_the_default_tenants_beside_tenants_keys(
    client_for: Callable[..., TestClient],
    tenants_of: Callable[[TestClient], Tenants],
    fake_engine: FakeEngine,
) -> None:
    client = client_for(api_key=API_KEY, admin_keys=f"ann:{ADMIN_KEY}")
    key = tenants_of(client).create(alpha=0.1)
    for good, tenant in ((API_KEY, "default"), (key, "acme")):
        assert outcome(ask(client, good)) == SERVED
        assert fake_engine.requests[-1].namespace == tenant
    for wrong in (None, ADMIN_KEY, f"ann:{ADMIN_KEY}", TENANTS_FORM, "none"):
        assert outcome(ask(client, wrong)) == REFUSED


def test_where_no_key_is_needed_any_will_do_but_not_a_tenants_or_an_operators(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    """OpenAI's clients cannot leave the key out. A tenant's key that is not known any more must
    not lead to another tenant's policy, and an operator's key has no business here."""
    client = client_for(admin_keys=f"ann:{ADMIN_KEY},bob:{ADMIN_KEY[::-1]}")
    for harmless in (None, "none", "sk-123", "é"):
        headers = {} if harmless is None else {"authorization": f"Bearer {harmless}".encode()}
        assert client.post(PATH, json=chat_body(), headers=headers).status_code == 200
        assert fake_engine.requests[-1].namespace == "default"
    for wrong in (TENANTS_FORM, ADMIN_KEY, ADMIN_KEY[::-1]):
        assert outcome(ask(client, wrong)) == REFUSED


def test_a_tenant_whose_policy_was_never_read_gets_503_not_another_policy(
    client: TestClient, tenants: Tenants, fake_engine: FakeEngine
) -> None:
    key = tenants.create()
    tenants.write("tenant/acme", None)
    tenants.write("tenant/acme", "{")
    response = ask(client, key, images=1)
    assert outcome(response) == (503, "policy_unavailable")
    assert "retry-after" in response.headers and not fake_engine.requests


# ---------------------------------------------------------------------------- before the first read


class LostStore(MemoryStore):
    """One that cannot be read until it is found."""

    is_lost = True

    async def changes(self, since: int = 0) -> Changes:
        if self.is_lost:
            raise StoreError("lost")
        return await super().changes(since)


@pytest.fixture
def lost_for(fake_engine: FakeEngine) -> Iterator[Callable[..., TestClient]]:
    """A client of a server that has not been able to read its store."""
    opened: list[TestClient] = []

    def make(store: LostStore | None = None, **changes: Any) -> TestClient:
        app = create_app(make_settings(**changes), engine=fake_engine, store=store or LostStore())
        opened.append(TestClient(app, "http://127.0.0.1").__enter__())
        return opened[-1]

    yield make
    for client in opened:
        client.__exit__(None, None, None)


def test_before_the_store_is_read_keys_that_only_it_knows_are_503_not_401(
    lost_for: Callable[..., TestClient],
) -> None:
    with_key, without = lost_for(api_key=API_KEY), lost_for()
    assert outcome(ask(with_key, API_KEY)) == SERVED
    assert outcome(ask(with_key, None)) == REFUSED
    assert outcome(ask(with_key, "sk-123")) == NOT_YET
    assert outcome(ask(without, None)) == outcome(ask(without, "none")) == SERVED
    for client in (with_key, without):
        response = ask(client, TENANTS_FORM)
        assert outcome(response) == NOT_YET and "retry-after" in response.headers


def test_before_the_store_is_read_the_settings_policy_holds_and_fails_closed(
    lost_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    response = ask(lost_for(), None, images=1)
    assert outcome(response) == (503, "vectors_unavailable")
    assert not fake_engine.requests


def test_a_server_may_refuse_everybody_until_its_store_is_read(
    lost_for: Callable[..., TestClient],
) -> None:
    store = LostStore()
    client = lost_for(store, cold_start="refuse", api_key=API_KEY, sync_interval_s=0.02)
    for key in (API_KEY, None, TENANTS_FORM):
        assert outcome(ask(client, key)) == NOT_YET
        assert client.get("/v1/models", headers=bearer(key)).status_code == 503
    assert client.get("/health").status_code == 200
    services: Services = client.app.state.services  # type: ignore[attr-defined]
    store.is_lost = False
    wait_until(lambda: services.directory.is_synced)
    assert outcome(ask(client, API_KEY)) == SERVED
    assert outcome(ask(client, TENANTS_FORM)) == REFUSED


# --------------------------------------------------------------------------------------------- log


def test_the_log_of_a_run_names_tenants_and_key_ids_and_holds_no_key(
    client_for: Callable[..., TestClient],
    tenants_of: Callable[[TestClient], Tenants],
    fake_engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    client = client_for(api_key=API_KEY, admin_keys=f"ann:{ADMIN_KEY}")
    key = tenants_of(client).create(requests_per_minute=3)
    told = []
    for each in (key, API_KEY, None, TENANTS_FORM, ADMIN_KEY, "guess"):
        told.append(ask(client, each, text="PROMPT", images=1))
    told.append(ask(client, key, steering={"alpha": 0}, images=1))
    fake_engine.prepare_error = RuntimeError("boom")
    told.append(ask(client, key))
    told.append(ask(client, key))
    assert [each.status_code for each in told] == [200, 200, 401, 401, 401, 401, 403, 500, 429]
    lines = [r.getMessage() for r in caplog.records if r.name == "deshift.requests"]
    assert "tenant=acme key=first method=POST" in lines[0]
    assert "tenant=default key=settings" in lines[1]
    assert all("tenant=- key=- " in line for line in lines[2:6])
    for secret in (
        key,
        key_digest(key),
        API_KEY,
        TENANTS_FORM,
        ADMIN_KEY,
        "guess",
        "PROMPT",
        "iVBOR",
    ):
        assert secret not in caplog.text
        assert not any(secret in each.text for each in told)


# ------------------------------------------------------------------------------------------ limits


def test_a_tenant_over_its_rate_gets_429_with_the_time_and_others_go_on(
    client: TestClient, tenants: Tenants, fake_engine: FakeEngine
) -> None:
    key, other = tenants.create(requests_per_minute=2), tenants.create("other")
    assert [ask(client, key).status_code for _ in range(3)] == [200, 200, 429]
    response = client.post(PATH, content=b"never read", headers=bearer(key))
    assert outcome(response) == (429, "rate_limit_exceeded")
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert 58 <= int(response.headers["retry-after"]) <= 60
    assert client.get("/v1/models", headers=bearer(key)).status_code == 200
    assert ask(client, other).status_code == 200
    assert len(fake_engine.requests) == 3
    tenants.set_policy(requests_per_minute=None)
    assert ask(client, key).status_code == 200, "the change holds for the next request"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tenant_runs_no_more_than_its_limit_at_once(
    client: TestClient, tenants: Tenants, fake_engine: FakeEngine, stream: bool
) -> None:
    key, other = tenants.create(concurrency=1), tenants.create("other")
    gate = threading.Event()
    fake_engine.script = plays(TextEvent(0, "x"), gate, Failed("engine", "broken"))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client, key, stream=stream)
        wait_until(lambda: fake_engine.num_running == 1)
        response = ask(client, key)
        gate.set()
        first.result()
    assert outcome(response) == (429, "rate_limit_exceeded")
    assert response.headers["retry-after"] == "1"
    assert ask(client, key).status_code == 500, "the engine's failure, not the limit's"
    assert ask(client, other).status_code == 500
    fake_engine.prepare_error = RuntimeError("boom")
    assert [ask(client, key).status_code for _ in range(2)] == [500, 500]
    assert client.post(PATH, content=b"{", headers=bearer(key)).status_code == 400
    limits = client.app.state.services.limits  # type: ignore[attr-defined]
    assert limits.num_running("acme") == 0


def test_a_client_that_leaves_gives_its_place_to_the_next(
    fake_engine: FakeEngine, store: MemoryStore
) -> None:
    async def make_tenant() -> str:
        control = Control(store)
        await control.create_tenant("acme", PolicyFields(concurrency=1), AUTHOR)
        return (await control.create_key("acme", "first", AUTHOR)).text

    headers = bearer(asyncio.run(make_tenant()))
    fake_engine.script = plays(TextEvent(0, "x"), threading.Event())  # and then for ever
    with live_server(fake_engine, store) as live:
        for _ in range(2):
            body = chat_body(stream=True)
            with httpx.stream("POST", live.url + PATH, json=body, headers=headers) as response:
                assert response.status_code == 200
                assert httpx.post(live.url + PATH, json=body, headers=headers).status_code == 429
            wait_until(lambda: live.services.limits.num_running("acme") == 0)
