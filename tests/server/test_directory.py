"""What a replica knows of the store: keys, policies, the kill switch, what cannot be read."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from server.control import Control
from server.directory import Principal, TenantDirectory
from server.documents import AliasDocument, KillDocument, PolicyFields, Until, text_of
from server.errors import AuthenticationError, UnavailableError
from server.policy import Policy
from steering.stores import MemoryStore
from steering.stores.base import Changes
from tests.server.fakes import AUTHOR
from tests.server.stored import DEFAULT, NOW, changes, directory_of, keys_text, tenant_text

# ---------------------------------------------------------------------------------- keys, policies


def test_the_moment_a_policy_took_effect_is_that_of_its_own_document() -> None:
    before = time.time()
    directory = directory_of(("tenant/acme", tenant_text(0.8)))
    first = directory.applied_at("acme")
    assert first is not None and before <= first <= time.time()
    assert directory.applied_at("default") is None  # the settings' policy
    directory.apply(changes(("tenant/other", tenant_text(0.1)), revision=2))
    assert directory.applied_at("acme") == first
    directory.apply(changes(("tenant/acme", tenant_text(0.4)), revision=3))
    second = directory.applied_at("acme")
    assert second is not None and second > first


@pytest.mark.anyio
async def test_what_an_operator_makes_is_found() -> None:
    store = MemoryStore()
    control = Control(store, now=lambda: NOW)
    revision = await control.create_tenant("acme", PolicyFields(alpha=0.7), AUTHOR)
    key = await control.create_key("acme", "first", AUTHOR, expires_in_s=60)
    directory = TenantDirectory(DEFAULT)
    directory.apply(await store.changes(), is_whole=True)
    assert directory.authenticate(key.text, NOW + 59) == Principal("acme", "first")
    assert directory.authenticate(key.text, NOW + 60) is None, "its time is over"
    assert directory.authenticate(key.text[:-1], NOW) is None
    policy = directory.policy("acme", NOW)
    assert (policy.tenant, policy.alpha, policy.revision) == ("acme", 0.7, revision)
    assert (directory.revision, directory.epoch) == (2, (await store.changes()).epoch)
    assert directory.num_tenants == 1 and directory.requires_key


def test_before_anything_is_read_there_is_the_default_policy_and_no_key() -> None:
    directory = TenantDirectory(DEFAULT)
    assert directory.policy("default", NOW) == Policy.of(DEFAULT, 0)
    assert (directory.is_synced, directory.requires_key, directory.num_tenants) == (False, False, 0)
    directory.apply(Changes("", 0, ()), is_whole=True)
    assert directory.is_synced, "an empty store has been read, too"


def test_the_stores_default_tenant_takes_the_place_of_the_settings() -> None:
    directory = directory_of(("tenant/default", tenant_text(0.9)))
    assert (directory.policy("default", NOW).alpha, directory.policy("default", NOW).revision) == (
        0.9,
        1,
    )
    directory.apply(changes(("tenant/default", None), revision=2))
    assert directory.policy("default", NOW) == Policy.of(DEFAULT, 0)


def test_a_policy_that_expires_falls_back_by_itself_within_its_revision() -> None:
    until = Until(at=NOW + 60, then=PolicyFields(alpha=0.2, vector_alias="then"))
    directory = directory_of(("tenant/acme", tenant_text(1.5, until)))
    assert directory.policy("acme", NOW + 59.9).alpha == 1.5
    after = directory.policy("acme", NOW + 60)
    assert (after.alpha, after.vector_alias, after.revision) == (0.2, "then", 1)
    assert directory.aliases_in_use == {"of-settings", "default", "then"}


def test_a_deleted_tenant_is_gone_at_once() -> None:
    """Its policy is no longer known; that must not become somebody else's policy."""
    directory = directory_of(("tenant/acme", tenant_text()), ("keys/acme", keys_text("k")))
    directory.apply(changes(("tenant/acme", None), revision=2))
    assert directory.authenticate("k", NOW) is None
    with pytest.raises(AuthenticationError):
        directory.policy("acme", NOW)
    assert directory.requires_key, "the keys are still there"
    directory.apply(changes(("keys/acme", None), revision=3))
    assert not directory.requires_key


def test_revoking_the_last_key_does_not_open_the_server() -> None:
    directory = directory_of(("tenant/acme", tenant_text()), ("keys/acme", keys_text()))
    assert directory.requires_key


def test_keys_of_the_default_tenant_need_no_document_of_it() -> None:
    directory = directory_of(("keys/default", keys_text("k")))
    assert directory.authenticate("k", NOW) == Principal("default", "id-k")
    assert directory.policy("default", NOW).revision == 0


# ----------------------------------------------------------------------------- unreadable documents

BAD = ["", "{", "[]", "null", '{"policy": {"alpha": -1}}', '{"policy": {"alfa": 1}}', "\x00"]


@pytest.mark.parametrize("bad", BAD)
def test_a_document_that_cannot_be_read_leaves_the_last_good_one_in_force(bad: str) -> None:
    directory = directory_of(
        ("tenant/acme", tenant_text(0.8)), ("keys/acme", keys_text("k")),
        ("kill", text_of(KillDocument(action="unsteered"))), ("alias/a", alias_text("a")),
    )  # fmt: skip
    names = ("tenant/acme", "keys/acme", "kill", "alias/a")
    directory.apply(changes(*((name, bad) for name in names), revision=2))
    assert set(directory.problems) == set(names)
    assert all(name in problem for name, problem in directory.problems.items())
    assert (directory.policy("acme", NOW).alpha, directory.policy("acme", NOW).revision) == (0.8, 1)
    assert directory.authenticate("k", NOW) == Principal("acme", "id-k")
    assert (directory.kill, directory.aliases) == ("unsteered", {"a": "a" * 64})
    directory.apply(changes(("tenant/acme", tenant_text(0.3)), ("kill", None), revision=3))
    assert set(directory.problems) == {"keys/acme", "alias/a"}
    assert (directory.policy("acme", NOW).alpha, directory.kill) == (0.3, "none")


def alias_text(digit: str) -> str:
    return text_of(AliasDocument(vector=digit * 64))


def test_a_tenant_whose_policy_was_never_read_is_refused_not_given_another() -> None:
    directory = directory_of(("tenant/acme", "{"), ("keys/acme", keys_text("k")))
    assert directory.authenticate("k", NOW) == Principal("acme", "id-k")
    with pytest.raises(UnavailableError, match="acme") as caught:
        directory.policy("acme", NOW)
    assert caught.value.code == "policy_unavailable"
    directory = directory_of(("tenant/default", "{"))
    with pytest.raises(UnavailableError):
        directory.policy("default", NOW)


@pytest.mark.parametrize("name", ["", "a b", "<script>", "a\nb", "a" * 65, "-a", "../x", "é"])
@pytest.mark.parametrize("kind", ["tenant", "keys", "alias"])
def test_a_name_that_could_break_a_log_or_a_page_is_a_problem_not_a_tenant(
    name: str, kind: str
) -> None:
    text = {"tenant": tenant_text(), "keys": keys_text("k"), "alias": alias_text("a")}[kind]
    directory = directory_of((f"{kind}/{name}", text), (f"tenant/{name}", tenant_text()))
    assert f"{kind}/{name}" in directory.problems
    assert directory.num_tenants == 0 and not directory.aliases
    assert directory.authenticate("k", NOW) is None


def test_documents_of_a_later_version_are_left_alone() -> None:
    directory = directory_of(("quota/acme", "?"), ("tenant/acme", tenant_text()))
    assert not directory.problems and directory.num_tenants == 1


def test_what_other_data_cannot_say_the_old_data_do_not_say_for_them() -> None:
    """A store that was replaced: last good versions of another epoch are not versions of it."""
    directory = directory_of(("tenant/acme", tenant_text()), ("keys/acme", keys_text("k")))
    new = changes(("tenant/acme", "{"), ("keys/acme", "{"), epoch="other")
    directory.apply(new, is_whole=True)
    assert directory.authenticate("k", NOW) is None
    with pytest.raises(UnavailableError):
        directory.policy("acme", NOW)


# -------------------------------------------------------------------------------------- kill switch


@pytest.mark.parametrize(
    ("stored", "local", "in_force"),
    [
        ("none", "none", "none"),
        ("unsteered", "none", "unsteered"),
        ("none", "unsteered", "unsteered"),
        ("unsteered", "reject", "reject"),
        ("reject", "unsteered", "reject"),
        ("reject", "none", "reject"),
    ],
)
def test_the_stricter_kill_switch_counts(stored: Any, local: Any, in_force: str) -> None:
    directory = directory_of(("kill", text_of(KillDocument(action=stored))))
    directory.local_kill = local
    assert directory.kill == in_force
    directory.apply(Changes("e", 2, ()))
    assert directory.local_kill == local, "the store does not undo what was done on the replica"


# ------------------------------------------------------------------------------------------ effort


def num_calls(work: Callable[[], object]) -> int:
    """How many functions `work` calls, of Python's and of C's."""
    count = 0

    def note(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_a_change_costs_the_same_whatever_the_number_of_tenants() -> None:
    def effort(num_tenants: int) -> list[int]:
        documents = []
        for number in range(num_tenants):
            documents.append((f"tenant/t{number}", tenant_text(vector_alias=f"v{number}")))
            documents.append((f"keys/t{number}", keys_text(f"key{number}")))
        directory = directory_of(*documents)
        untouched = directory.policy("t1", NOW)
        news = [
            changes(("tenant/t0", tenant_text(0.1, vector_alias="other")), revision=2),
            changes(("keys/t0", keys_text("key0", "another")), revision=3),
            changes(("tenant/t0", None), ("keys/t0", None), revision=4),
        ]
        efforts = [num_calls(lambda each=each: directory.apply(each)) for each in news]  # type: ignore[misc]
        assert directory.policy("t1", NOW) is untouched
        return [*efforts, num_calls(lambda: directory.authenticate("key1", NOW))]

    effort(2)  # what is done only once in a process
    assert effort(2) == effort(1000)


def test_problems_are_plain_json_for_the_status_pages() -> None:
    directory = directory_of(("tenant/acme", '{"policy": {"alpha": 9}}'))
    assert json.loads(json.dumps(directory.problems))["tenant/acme"].startswith("the document")
