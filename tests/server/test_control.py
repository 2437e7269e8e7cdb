"""What operators do: reasons, revisions, keys shown once, audit and revert."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from server.control import MAX_KEYS, Author, Control, TenantState, key_digest
from server.documents import KeysDocument, PolicyFields, TenantDocument, Until, text_of
from server.errors import (
    DocumentError,
    ExistsError,
    InvalidRequestError,
    NoSuchTenantError,
)
from steering.errors import ConflictError, NotFoundError, StoreError
from steering.stores import MemoryStore
from steering.stores.base import Changes, Document
from tests.server.fakes import AUTHOR, make_vectors, publish

pytestmark = pytest.mark.anyio
FIRST, SECOND, THIRD = (PolicyFields(alpha=alpha) for alpha in (0.1, 0.2, 0.3))
UNKNOWN_SET = "f" * 64


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """A control on an empty store, with a clock that stands."""

    clock: Clock = field(default_factory=Clock)
    store: MemoryStore = field(default_factory=MemoryStore)

    def __post_init__(self) -> None:
        self.control = Control(self.store, now=self.clock)

    async def write(self, key: str, text: str | None) -> int:
        """A document as it should not be."""
        return await self.store.commit({key: text}, {}, "{}")


@pytest.fixture
async def bench() -> Bench:
    """With the tenant acme, at revision 1."""
    bench = Bench()
    assert await bench.control.create_tenant("acme", FIRST, AUTHOR) == 1
    return bench


async def policy_of(control: Control, name: str = "acme") -> PolicyFields:
    return (await control.tenant(name)).document.policy


# ----------------------------------------------------------------------------------------- authors


@pytest.mark.parametrize("reason", ["", "  ", "\n", "a\nb", "a\x1b[1m", "a\u202eb", "x" * 501])
def test_a_change_needs_a_reason_of_one_line(reason: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Author("ann", reason, "api")
    assert caught.value.param == "reason"


@pytest.mark.parametrize("by", ["", "a\nb"])
def test_a_change_needs_somebody(by: str) -> None:
    with pytest.raises(InvalidRequestError):
        Author(by, "because", "api")


# ----------------------------------------------------------------------------------------- tenants


async def test_a_tenant_is_made_once(bench: Bench) -> None:
    state = await bench.control.tenant("acme")
    assert state == TenantState("acme", TenantDocument(policy=FIRST, created_at=1000.0), revision=1)
    with pytest.raises(ExistsError, match="acme"):
        await bench.control.create_tenant("acme", SECOND, AUTHOR)
    assert await policy_of(bench.control) == FIRST
    assert len(await bench.control.audit()) == 1


@pytest.mark.parametrize("name", ["", "a b", "<script>", "a\r\nb", "a" * 65, "-a", "../a", "é"])
async def test_names_are_names(bench: Bench, name: str) -> None:
    with pytest.raises(InvalidRequestError):
        await bench.control.create_tenant(name, FIRST, AUTHOR)
    with pytest.raises(InvalidRequestError):
        await bench.control.create_key("acme", name, AUTHOR)
    with pytest.raises(InvalidRequestError):
        await bench.control.activate(name, UNKNOWN_SET, AUTHOR)
    assert (await bench.store.changes()).revision == 1


async def test_what_does_not_exist_is_said_so(bench: Bench) -> None:
    control = bench.control
    for attempt in (
        control.tenant("none"),
        control.set_policy("none", FIRST, None, AUTHOR),
        control.delete_tenant("none", None, AUTHOR),
        control.create_key("none", "k", AUTHOR),
        control.revoke_key("acme", "none", AUTHOR),
        control.rotate_key("acme", "none", "new", AUTHOR, 0.0),
        control.revert(2, AUTHOR),
        control.revert(0, AUTHOR),
    ):
        with pytest.raises(NoSuchTenantError):
            await attempt
    assert (await bench.store.changes()).revision == 1


async def test_a_stale_revision_is_a_conflict_and_none_is_whatever_it_is(bench: Bench) -> None:
    control = bench.control
    assert await control.set_policy("acme", SECOND, 1, AUTHOR) == 2
    for attempt in (
        control.set_policy("acme", THIRD, 1, AUTHOR),
        control.delete_tenant("acme", 1, AUTHOR),
        control.create_key("acme", "k", AUTHOR, expected=1),
        control.set_kill("reject", AUTHOR, expected=1),
    ):
        with pytest.raises(ConflictError):
            await attempt
    assert await policy_of(control) == SECOND
    assert await control.set_policy("acme", THIRD, None, AUTHOR) == 3


async def test_of_two_writers_at_once_one_has_a_conflict(bench: Bench) -> None:
    """Both read revision 1; the second commits between the first's reading and its commit."""

    class Interrupted(MemoryStore):
        async def changes(self, since: int = 0) -> Changes:
            return await bench.store.changes(since)

        async def get(self, keys: Sequence[str]) -> dict[str, Document]:
            return await bench.store.get(keys)

        async def commit(self, *commit: Any) -> int:
            await bench.control.set_policy("acme", SECOND, 1, AUTHOR)
            return await bench.store.commit(*commit)

    with pytest.raises(ConflictError):
        await Control(Interrupted(), bench.clock).set_policy("acme", THIRD, 1, AUTHOR)
    assert await policy_of(bench.control) == SECOND


async def test_setting_what_is_set_is_no_change(bench: Bench) -> None:
    control = bench.control
    vector_id = await publish(bench.store)
    await control.set_kill("reject", AUTHOR)
    before = (await bench.store.changes()).revision
    assert await control.set_policy("acme", FIRST, None, AUTHOR) == 1
    assert await control.activate("default", vector_id, AUTHOR) == 2
    assert await control.set_kill("reject", AUTHOR) == 3
    assert (await bench.store.changes()).revision == before == 3


async def test_a_policy_with_an_end_falls_back_to_the_last_one_without(bench: Bench) -> None:
    """A second one before the first ended fell back to the first, and that had no end then."""
    control, clock = bench.control, bench.clock
    await control.set_policy("acme", SECOND, None, AUTHOR, expires_in_s=60)
    clock.now += 30
    await control.set_policy("acme", THIRD, None, AUTHOR, expires_in_s=60)
    document = (await control.tenant("acme")).document
    assert document.until == Until(at=1090.0, then=FIRST)
    assert document.in_force(1089.9) == THIRD and document.in_force(1090.0) == FIRST
    clock.now = 2000.0
    await control.set_policy("acme", SECOND, None, AUTHOR, expires_in_s=1)
    assert (await control.tenant("acme")).document.until == Until(at=2001.0, then=FIRST)
    await control.set_policy("acme", SECOND, None, AUTHOR)
    assert (await control.tenant("acme")).document.until is None, "now it is for good"


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 367 * 86400.0])
async def test_times_are_times(bench: Bench, seconds: float) -> None:
    """NaN and infinity are null in JSON: a key that was to end would have been good for ever."""
    control = bench.control
    await control.create_key("acme", "old", AUTHOR)
    with pytest.raises(InvalidRequestError):
        await control.set_policy("acme", SECOND, None, AUTHOR, expires_in_s=seconds)
    if seconds != 367 * 86400.0:
        with pytest.raises(InvalidRequestError):
            await control.create_key("acme", "new", AUTHOR, expires_in_s=seconds)
    if seconds != 0.0:
        with pytest.raises(InvalidRequestError):
            await control.rotate_key("acme", "old", "new", AUTHOR, seconds)
    assert (await bench.store.changes()).revision == 2


# -------------------------------------------------------------------------------------------- keys


async def test_a_key_is_shown_once_and_kept_as_its_digest(bench: Bench) -> None:
    keys = [await bench.control.create_key("acme", name, AUTHOR) for name in ("a", "b")]
    assert len({key.text for key in keys}) == 2
    assert all(key.text.startswith("dsk-") and len(key.text) == 47 for key in keys)
    state = await bench.control.tenant("acme")
    assert [key.digest for key in state.keys] == [key_digest(key.text) for key in keys]
    assert (state.revision, state.keys_revision) == (1, 3), "the policy's revision is its own"
    everything = [each.value or "" for each in (await bench.store.changes()).documents]
    everything += [each.entry for each in await bench.store.audit(10)]
    assert not any(key.text in text for key in keys for text in everything)
    with pytest.raises(ExistsError):
        await bench.control.create_key("acme", "a", AUTHOR)


async def test_rotation_leaves_the_old_key_some_time_and_never_more_than_it_had(
    bench: Bench,
) -> None:
    control = bench.control
    await control.create_key("acme", "old", AUTHOR)
    await control.create_key("acme", "short", AUTHOR, expires_in_s=10)
    await control.rotate_key("acme", "old", "new", AUTHOR, overlap_s=60)
    await control.rotate_key("acme", "short", "newer", AUTHOR, overlap_s=60)
    ends = {key.id: key.expires_at for key in (await control.tenant("acme")).keys}
    assert ends == {"old": 1060.0, "short": 1010.0, "new": None, "newer": None}
    bench.clock.now = 1100.0
    await control.rotate_key("acme", "old", "newest", AUTHOR, overlap_s=60)
    ends = {key.id: key.expires_at for key in (await control.tenant("acme")).keys}
    assert ends["old"] == 1060.0, "what has ended stays so"


async def test_a_revoked_key_is_over_at_once_and_once(bench: Bench) -> None:
    await bench.control.create_key("acme", "k", AUTHOR)
    revision = await bench.control.revoke_key("acme", "k", AUTHOR)
    (key,) = (await bench.control.tenant("acme")).keys
    assert not key.is_valid(bench.clock.now)
    bench.clock.now += 5
    assert await bench.control.revoke_key("acme", "k", AUTHOR) == revision


async def test_keys_that_are_over_make_room_and_valid_ones_do_not(bench: Bench) -> None:
    """After a hundred rotations a tenant could get no key any more."""
    control = bench.control
    await control.create_key("acme", "k0", AUTHOR)
    for number in range(1, MAX_KEYS + 10):
        bench.clock.now += 1
        await control.rotate_key("acme", f"k{number - 1}", f"k{number}", AUTHOR, 0.0)
    keys = (await control.tenant("acme")).keys
    assert [key.id for key in keys] == [f"k{number}" for number in range(10, MAX_KEYS + 10)]
    assert [key.id for key in keys if key.is_valid(bench.clock.now)] == [f"k{MAX_KEYS + 9}"]
    for number in range(MAX_KEYS - 1):
        await control.create_key("acme", f"valid{number}", AUTHOR)
    with pytest.raises(InvalidRequestError, match="100 keys"):
        await control.create_key("acme", "too-many", AUTHOR)


# -------------------------------------------------------------------------------- aliases, damage


async def test_an_alias_points_to_a_set_that_was_read(bench: Bench) -> None:
    with pytest.raises(NotFoundError):
        await bench.control.activate("default", UNKNOWN_SET, AUTHOR)
    vector_id = await bench.store.put_vectors(make_vectors().to_bytes())
    await bench.control.activate("default", vector_id, AUTHOR, expected=0)
    assert (await bench.control.state()).aliases == {"default": vector_id}
    other = await bench.store.put_vectors(make_vectors(0.25).to_bytes())
    with pytest.raises(ConflictError):
        await bench.control.activate("default", other, AUTHOR, expected=0)


async def test_a_damaged_tenant_is_listed_refused_and_can_be_deleted(bench: Bench) -> None:
    """Nothing could be done about it by any way but the store's own."""
    control = bench.control
    await control.create_key("acme", "k", AUTHOR)
    await bench.write("tenant/acme", "{")
    await bench.write("kill", "garbage")
    state = await control.state()
    assert set(state.unreadable) == {"tenant/acme", "kill"} and not state.tenants
    for attempt in (control.tenant("acme"), control.set_policy("acme", FIRST, None, AUTHOR)):
        with pytest.raises(DocumentError, match="tenant/acme"):
            await attempt
    await control.set_kill("none", AUTHOR)
    await control.delete_tenant("acme", None, AUTHOR)
    assert not (await control.state()).unreadable
    await control.create_tenant("acme", SECOND, AUTHOR)
    assert (await control.tenant("acme")).keys == ()


async def test_a_new_tenant_never_gets_keys_that_were_left_behind(bench: Bench) -> None:
    await bench.write("keys/ghost", text_of(KeysDocument()))
    with pytest.raises(ExistsError, match="keys"):
        await bench.control.create_tenant("ghost", FIRST, AUTHOR)
    await bench.control.delete_tenant("ghost", None, AUTHOR)
    await bench.control.create_tenant("ghost", FIRST, AUTHOR)


# ----------------------------------------------------------------------------------- audit, revert


async def test_audit_says_who_when_what_why_before_and_after(bench: Bench) -> None:
    author = Author("bob", "  too strict  ", "console")
    await bench.control.set_policy("acme", SECOND, None, author)
    newest, oldest = await bench.control.audit()
    assert (newest.revision, newest.by, newest.via, newest.reason, newest.action) == (
        2, "bob", "console", "too strict", "policy.set",
    )  # fmt: skip
    (change,) = newest.changes
    assert change.key == "tenant/acme"
    assert (change.before["policy"]["alpha"], change.after["policy"]["alpha"]) == (0.1, 0.2)
    assert oldest.action == "tenant.create" and oldest.changes[0].before is None
    assert newest.at >= oldest.at > 1_700_000_000, "the store's own wall time"


async def test_audit_of_a_tenant_finds_it_among_others_page_by_page(bench: Bench) -> None:
    await bench.control.create_key("acme", "k", AUTHOR)
    await bench.control.create_tenant("busy", FIRST, AUTHOR)
    for number in range(450):
        await bench.control.set_policy("busy", (FIRST, SECOND)[number % 2], None, AUTHOR)
    revisions = [entry.revision for entry in await bench.control.audit(tenant="acme")]
    assert revisions == [2, 1]
    page = await bench.control.audit(3, before=100)
    assert [entry.revision for entry in page] == [99, 98, 97]
    assert len(await bench.control.audit(250, tenant="busy")) == 250


async def test_an_audit_record_of_somebody_else_is_named_not_a_crash(bench: Bench) -> None:
    await bench.write("other", "x")
    with pytest.raises(StoreError, match="revision 2"):
        await bench.control.audit()


async def test_every_kind_of_change_can_be_taken_back(bench: Bench) -> None:
    control = bench.control
    vector_id = await publish(bench.store)
    other = await bench.store.put_vectors(make_vectors(0.25).to_bytes())
    await control.create_key("acme", "k", AUTHOR)

    async def documents() -> dict[str, str | None]:
        found = (await bench.store.changes()).documents
        return {each.key: each.value for each in found if each.value is not None}

    for change in (
        lambda: control.set_policy("acme", SECOND, None, AUTHOR, expires_in_s=5),
        lambda: control.revoke_key("acme", "k", AUTHOR),
        lambda: control.activate("default", other, AUTHOR),
        lambda: control.activate("new", vector_id, AUTHOR),
        lambda: control.set_kill("reject", AUTHOR),
        lambda: control.delete_tenant("acme", None, AUTHOR),
        lambda: control.create_tenant("temporary", THIRD, AUTHOR),
    ):
        before = await documents()
        revision = await change()
        assert await documents() != before
        reverted = await control.revert(revision, AUTHOR)
        assert await documents() == before
        entry = (await control.audit(1))[0]
        assert (entry.revision, entry.action) == (reverted, "revert")
        record = json.loads((await bench.store.audit(1))[0].entry)
        assert record["reverts"] == revision
        again = await control.revert(reverted, AUTHOR)
        assert await documents() != before, "a revert can be taken back as well"
        await control.revert(again, AUTHOR)


async def test_what_was_changed_since_is_not_reverted(bench: Bench) -> None:
    control = bench.control
    second = await control.set_policy("acme", SECOND, None, AUTHOR)
    await control.set_policy("acme", THIRD, None, AUTHOR)
    with pytest.raises(ConflictError):
        await control.revert(second, AUTHOR)
    assert await policy_of(control) == THIRD
    await control.delete_tenant("acme", None, AUTHOR)
    with pytest.raises(ConflictError):
        await control.revert(second, AUTHOR)


async def test_making_a_tenant_is_not_reverted_under_its_keys(bench: Bench) -> None:
    """They stayed, without a tenant, and were those of the next one of that name."""
    await bench.control.create_key("acme", "k", AUTHOR)
    with pytest.raises(ConflictError, match="keys/acme"):
        await bench.control.revert(1, AUTHOR)
    assert len((await bench.control.tenant("acme")).keys) == 1


async def test_a_revoked_key_is_good_for_nothing_by_any_clock(bench: Bench) -> None:
    """It ended at the operator's time of day: a replica whose clock was behind still took it."""
    control = bench.control
    made = await control.create_key("acme", "k", AUTHOR)
    await control.rotate_key("acme", "k", "k-2", AUTHOR, overlap_s=0.0)
    await control.revoke_key("acme", "k-2", AUTHOR)
    keys = (await control.tenant("acme")).keys
    assert [key.is_valid(made.record.created_at - 3600) for key in keys] == [False, False]
