"""The console without a browser: who may do what, and what comes of wrong or late forms."""

import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from server.console.forms import values_of
from server.console.pages import local_path
from server.control import Author
from server.documents import PolicyFields
from steering.errors import StoreError
from steering.stores.base import Changes, Document
from steering.stores.memory import MemoryStore
from tests.server.admin.conftest import KEY, Admin, opened  # noqa: F401

PAGES = ("/", "/vectors", "/audit", "/new-tenant", "/tenants/acme")
SETUP = Author("setup", "first filling", "setup")


class LostStore(MemoryStore):
    """Can be taken away, and come back empty."""

    is_lost = False

    def empty(self) -> None:
        self.__init__()  # type: ignore[misc]

    async def changes(self, since: int = 0) -> Changes:
        if self.is_lost:
            raise StoreError("connection refused")
        return await super().changes(since)

    async def get(self, keys: Sequence[str]) -> dict[str, Document]:
        if self.is_lost:
            raise StoreError("connection refused")
        return await super().get(keys)


@pytest.fixture
def store() -> LostStore:
    return LostStore()


@pytest.fixture
async def console(opened: Callable[..., Any], store: LostStore) -> AsyncIterator[Admin]:  # noqa: F811
    """Signed in as alice, with the tenant acme."""
    async with opened(store) as client:
        del client.headers["authorization"]
        response = await client.post("/sign-in", data={"key": KEY})
        assert response.status_code == 303 and response.headers["location"] == "/"
        await client.services.control.create_tenant("acme", policy(), SETUP)
        yield client


def policy(**changes: Any) -> PolicyFields:
    return PolicyFields.model_validate({"alpha": 0.5, **changes})


async def form_of(console: Admin, path: str = "/tenants/acme", **changes: str) -> dict[str, str]:
    """A policy form as the page has it: token, revision, the values of `policy`."""
    page = (await console.get(path)).text
    token = re.search(r'name="csrf" value="([0-9a-f]+)"', page)
    revision = re.search(r'name="revision" value="(\d+)"', page)
    assert token is not None
    values = values_of(policy()) | {"csrf": token[1], "reason": "because", "lasts": "permanent"}
    return values | {"revision": revision[1] if revision else "0"} | changes


@pytest.mark.anyio
async def test_pages_ask_strangers_to_sign_in_and_come_back(console: Admin) -> None:
    console.cookies.clear()
    for page in PAGES:
        response = await console.get(page)
        assert response.status_code == 303
        assert response.headers["location"].startswith("/sign-in?next=%2F")


@pytest.mark.anyio
@pytest.mark.parametrize(
    "path",
    [
        "/kill",
        "/new-tenant",
        "/tenants/acme/policy",
        "/tenants/acme/delete",
        "/tenants/acme/keys",
        "/tenants/acme/keys/a/rotate",
        "/tenants/acme/keys/a/revoke",
        "/tenants/acme/preview",
        "/vectors/activate",
        "/store",
        "/revert",
        "/sign-out",
    ],
)
async def test_no_change_without_a_session_nor_without_its_token(console: Admin, path: str) -> None:
    form = await form_of(console, action="reject", sure="yes", alias="x", id="a")
    before = (await console.services.control.state()).revision
    for token in ("", "0" * 64):
        assert (await console.post(path, data=form | {"csrf": token})).status_code == 403
    console.cookies.clear()
    assert (await console.post(path, data=form)).status_code == 401
    assert (await console.services.control.state()).revision == before


@pytest.mark.anyio
async def test_the_cookie_is_for_this_site_and_no_script(console: Admin) -> None:
    cookie = (await console.post("/sign-in", data={"key": KEY})).headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    form = await form_of(console)
    assert (await console.post("/sign-out", data=form)).status_code == 303
    assert (await console.get("/")).status_code == 303


@pytest.mark.anyio
async def test_every_page_forbids_what_is_not_its_own(console: Admin) -> None:
    for page in (*PAGES, "/sign-in", "/tenants/nobody"):
        response = await console.get(page)
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert "unsafe" not in response.headers["content-security-policy"]
        assert " style=" not in response.text and "<script>" not in response.text


@pytest.mark.anyio
async def test_a_wrong_field_keeps_the_form_and_its_revision(console: Admin) -> None:
    form = await form_of(console, alpha="7", concurrency="12")
    await console.services.control.set_policy("acme", policy(alpha=0.6), None, SETUP)
    response = await console.post("/tenants/acme/policy", data=form)
    assert response.status_code == 400
    assert "alpha 7 is over alpha_max 2" in response.text
    assert 'value="12"' in response.text and 'value="because"' in response.text
    # The form is still as stale as it was.
    again = await console.post("/tenants/acme/policy", data=form | {"alpha": "0.7"})
    assert again.status_code == 409


@pytest.mark.anyio
async def test_a_policy_with_an_end_falls_back(console: Admin) -> None:
    form = await form_of(console, alpha="0.9", lasts="1800")
    assert (await console.post("/tenants/acme/policy", data=form)).status_code == 303
    document = (await console.services.control.tenant("acme")).document
    assert document.until is not None and document.until.then.alpha == 0.5
    assert document.policy.alpha == 0.9
    page = (await console.get("/tenants/acme")).text
    assert "then alpha 0.5" in page
    assert (
        await console.post("/tenants/acme/policy", data=form | {"lasts": "7"})
    ).status_code == 400


@pytest.mark.anyio
async def test_saving_while_a_temporary_policy_runs_asks_for_how_long(console: Admin) -> None:
    """The form's first choice would have made all of the temporary policy permanent."""
    form = await form_of(console, alpha="0.9", lasts="1800")
    assert (await console.post("/tenants/acme/policy", data=form)).status_code == 303
    page = (await console.get("/tenants/acme")).text
    assert '<option value="" selected>choose</option>' in page
    revision = (await console.services.control.tenant("acme")).revision
    again = form | {"alpha": "0.8", "lasts": "", "revision": str(revision)}
    response = await console.post("/tenants/acme/policy", data=again)
    assert response.status_code == 400 and "choose for how long" in response.text
    assert (await console.services.control.tenant("acme")).document.policy.alpha == 0.9


@pytest.mark.anyio
async def test_a_form_that_changes_nothing_makes_no_revision(console: Admin) -> None:
    response = await console.post("/tenants/acme/policy", data=await form_of(console))
    assert response.headers["location"] == "/tenants/acme?done=same"


@pytest.mark.anyio
async def test_without_a_reason_nothing_is_changed(console: Admin) -> None:
    form = await form_of(console, alpha="0.6", reason=" ")
    response = await console.post("/tenants/acme/policy", data=form)
    assert response.status_code == 400 and "needs a reason" in response.text
    assert (await console.services.control.tenant("acme")).document.policy.alpha == 0.5


@pytest.mark.anyio
async def test_a_key_is_shown_once_rotated_and_revoked(console: Admin) -> None:
    control = console.services.control
    form = await form_of(console, id="ci", keys_revision="0", lasts="")
    made = await console.post("/tenants/acme/keys", data=form)
    key = re.search(r'value="(dsk-[^"]+)"', made.text)
    assert key is not None
    assert key[1] not in (await console.get("/tenants/acme")).text
    assert (await console.post("/tenants/acme/keys", data=form)).status_code == 409  # reloaded
    form |= await keys_revision(console)
    rotated = await console.post(
        "/tenants/acme/keys/ci/rotate", data=form | {"new_id": "ci-2", "overlap": "3600"}
    )
    assert "dsk-" in rotated.text and key[1] not in rotated.text
    old, new = (await control.tenant("acme")).keys
    assert old.expires_at is not None and new.expires_at is None
    form |= await keys_revision(console)
    gone = await console.post("/tenants/acme/keys/ci-2/revoke", data=form)
    assert gone.headers["location"].startswith("/tenants/acme?done=revoked")
    assert all(each.expires_at is not None for each in (await control.tenant("acme")).keys)


async def keys_revision(console: Admin) -> dict[str, str]:
    """What the forms about keys hold; all of a page hold the same."""
    page = (await console.get("/tenants/acme")).text
    (found,) = set(re.findall(r'name="keys_revision" value="(\d+)"', page))
    return {"keys_revision": found}


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["", "/ci/rotate", "/ci/revoke"])
async def test_a_stale_form_about_keys_changes_nothing(console: Admin, path: str) -> None:
    """They were sent without the revision that the operator had seen."""
    control = console.services.control
    await control.create_key("acme", "ci", SETUP)
    form = await form_of(console, id="two", new_id="two", overlap="0", lasts="")
    form |= await keys_revision(console)
    await control.create_key("acme", "meanwhile", SETUP)
    response = await console.post(f"/tenants/acme/keys{path}", data=form)
    assert response.status_code == 409 and "changed in the meantime" in response.text
    keys = (await control.tenant("acme")).keys
    assert [(key.id, key.expires_at) for key in keys] == [("ci", None), ("meanwhile", None)]


@pytest.mark.anyio
async def test_what_a_lost_store_did_is_not_said_to_be_nothing(
    console: Admin, store: LostStore
) -> None:
    """The page said so although the store may have been lost after the change."""
    form = await form_of(console)
    store.is_lost = True
    response = await console.post("/tenants/acme/policy", data=form)
    assert response.status_code == 503
    assert "Nothing was changed" not in response.text and "is not known" in response.text


@pytest.mark.anyio
async def test_a_tenant_is_made_once_deleted_and_brought_back(console: Admin) -> None:
    control = console.services.control
    form = await form_of(console, "/new-tenant", name="beta")
    made = await console.post("/new-tenant", data=form)
    assert made.headers["location"].startswith("/tenants/beta?done=created")
    taken = await console.post("/new-tenant", data=form)
    assert taken.status_code == 409 and "there is a tenant" in taken.text
    form = await form_of(console, "/tenants/beta")
    deleted = await console.post("/tenants/beta/delete", data=form)
    assert deleted.headers["location"].startswith("/?done=deleted")
    assert (await console.get("/tenants/beta")).status_code == 404
    newest = (await control.state()).revision
    form |= {"revision": str(newest), "next": "/tenants/beta"}
    assert (await console.post("/revert", data=form)).status_code == 303
    assert (await control.tenant("beta")).document.policy == policy()


@pytest.mark.anyio
async def test_a_revert_of_what_was_changed_since_is_refused(console: Admin) -> None:
    control = console.services.control
    first = await control.set_policy("acme", policy(alpha=0.6), None, SETUP)
    await control.set_policy("acme", policy(alpha=0.7), None, SETUP)
    form = await form_of(console, revision=str(first), next="/audit")
    response = await console.post("/revert", data=form)
    assert response.status_code == 409 and "Nothing was changed." in response.text


@pytest.mark.anyio
async def test_the_kill_switch_of_this_replica_works_without_the_store(
    console: Admin, store: LostStore
) -> None:
    form = await form_of(console, action="reject", sure="yes", scope="replica")
    store.is_lost = True
    page = await console.get("/")
    assert page.status_code == 200 and "The store does not answer" in page.text
    assert (await console.post("/kill", data=form)).status_code == 303
    assert console.services.directory.kill == "reject"
    assert "On this replica alone: reject" in (await console.get("/")).text
    response = await console.post("/kill", data=form | {"scope": "fleet"})
    assert response.status_code == 503 and "connection refused" in response.text
    assert (await console.get("/tenants/acme")).status_code == 503


@pytest.mark.anyio
@pytest.mark.parametrize(("choice", "alpha"), [("restore", 0.5), ("adopt", 0.9)])
async def test_an_operator_decides_about_a_store_with_other_data(
    console: Admin, store: LostStore, choice: str, alpha: float
) -> None:
    services = console.services
    await services.sync.look()
    form = await form_of(console, choice=choice)
    told = await console.post("/store", data=form)
    assert told.status_code == 400  # nothing is foreign yet
    store.empty()
    await services.control.create_tenant("acme", policy(alpha=0.9), SETUP)
    await services.sync.look()
    assert "The store holds other data" in (await console.get("/")).text
    assert (await console.post("/store", data=form | {"choice": "both"})).status_code == 400
    response = await console.post("/store", data=form)
    assert response.headers["location"].startswith(f"/?done={choice}")
    await services.sync.look()
    assert services.sync.status.store == "ok"
    assert services.directory.policy("acme", 0.0).alpha == alpha
    assert "The store holds other data" not in (await console.get("/")).text


@pytest.mark.anyio
async def test_many_tenants_are_searched_and_paged(console: Admin) -> None:
    for number in range(60):
        await console.services.control.create_tenant(f"t-{number:02d}", policy(), SETUP)
    first = (await console.get("/")).text
    assert "Page 1 of 2 · 61 tenants" in first and "t-48" in first and "t-49" not in first
    second = (await console.get("/?page=2")).text
    assert "t-49" in second and ">acme<" not in second
    assert "t-07" in (await console.get("/?q=T-0")).text
    assert "No tenant has" in (await console.get("/?q=nobody")).text
    assert (await console.get("/?page=x")).status_code == 200
    oldest = (await console.get("/audit?before=3")).text
    assert 'id="r2"' in oldest and 'id="r3"' not in oldest
    only = (await console.get("/audit?tenant=t-07")).text
    assert only.count("<blockquote>") == 1


@pytest.mark.anyio
async def test_the_kill_switch_wants_to_be_sure(console: Admin) -> None:
    form = await form_of(console, "/", action="unsteered", scope="fleet", reason="kept words")
    response = await console.post("/kill", data=form)
    assert response.status_code == 400 and 'value="kept words"' in response.text
    assert (await console.services.control.state()).kill == "none"


@pytest.mark.anyio
async def test_addresses_choose_only_known_messages(console: Admin) -> None:
    page = (await console.get("/?done=<b>Pay+here</b>&revision=<i>")).text
    assert "Pay" not in page
    assert "revision 1." in (await console.get("/?done=kill&revision=<i>")).text


def test_after_signing_in_nobody_is_sent_elsewhere() -> None:
    for text in ("//evil.example", "https://evil.example", "/\\evil.example", "/a\r\nb", ""):
        assert local_path(text) == "/"
    assert local_path("/audit?tenant=acme") == "/audit?tenant=acme"
