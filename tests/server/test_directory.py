"""What a replica knows of the store: whatever changes came in whatever order, as a plain model."""

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from server.control import Control, key_digest
from server.directory import Principal, TenantDirectory
from server.documents import (
    AliasDocument,
    AnyDocument,
    KeyRecord,
    KeysDocument,
    KillDocument,
    PolicyFields,
    TenantDocument,
    Until,
    text_of,
)
from server.errors import AuthenticationError, UnavailableError
from server.policy import Policy
from steering.stores import MemoryStore
from steering.stores.base import Changes, Document
from tests.server.fakes import AUTHOR

DEFAULT = PolicyFields(alpha=0.5, vector_alias="of-settings")
NOW = 1_000_000.0


def tenant_text(alpha: float = 0.8, until: Until | None = None, **fields: Any) -> str:
    return text_of(TenantDocument(policy=PolicyFields(alpha=alpha, **fields), until=until))


def keys_text(*keys: str, expires_at: float | None = None) -> str:
    return text_of(KeysDocument(keys=tuple(_record(key, expires_at) for key in keys)))


def _record(key: str, expires_at: float | None = None) -> KeyRecord:
    return KeyRecord(id=f"id-{key}", digest=key_digest(key), created_at=NOW, expires_at=expires_at)


def changes(*documents: tuple[str, str | None], revision: int = 1, epoch: str = "e") -> Changes:
    return Changes(
        epoch, revision, tuple(Document(key, value, revision) for key, value in documents)
    )


def directory_of(*documents: tuple[str, str | None]) -> TenantDirectory:
    directory = TenantDirectory(DEFAULT)
    directory.apply(changes(*documents), is_whole=True)
    return directory


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


# --------------------------------------------------------------------------- against a plain model

TENANTS = ("default", "a", "b", "c")
KEYS = {tenant: [f"{tenant}-{number}" for number in range(3)] for tenant in TENANTS}


@dataclass
class Model:
    """Keeps every document's last good version, and searches all of them for every question."""

    good: dict[str, tuple[AnyDocument, int]] = field(default_factory=dict)
    there: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)

    def write(self, key: str, document: AnyDocument | None, is_bad: bool, revision: int) -> None:
        self.bad.discard(key)
        if is_bad:
            self.bad.add(key)
        elif document is not None:
            self.good[key] = document, revision
        if document is None and not is_bad:
            self.good.pop(key, None)
            self.there.discard(key)
        else:
            self.there.add(key)

    def owner(self, key: str, now: float) -> str | None:
        for name, (document, _) in self.good.items():
            tenant = name.removeprefix("keys/")
            if isinstance(document, KeysDocument) and (
                tenant == "default" or f"tenant/{tenant}" in self.there
            ):
                for record in document.keys:
                    if record.digest == key_digest(key) and record.is_valid(now):
                        return tenant
        return None

    def policy(self, tenant: str, now: float) -> Policy | str:
        if f"tenant/{tenant}" in self.good:
            document, revision = self.good[f"tenant/{tenant}"]
            assert isinstance(document, TenantDocument)
            return Policy.of(document.in_force(now), revision, tenant)
        if f"tenant/{tenant}" in self.there:
            return "UnavailableError"
        return Policy.of(DEFAULT, 0) if tenant == "default" else "AuthenticationError"

    def aliases_in_use(self) -> set[str]:
        fields = [DEFAULT]
        for document, _ in self.good.values():
            if isinstance(document, TenantDocument):
                fields.append(document.policy)
                fields.extend([document.until.then] if document.until else [])
        return {f.vector_alias for f in fields if f.mode == "dataset" or f.client_override == "any"}


def random_document(key: str, rng: random.Random) -> AnyDocument | None:
    if rng.random() < 0.2:
        return None
    kind, _, name = key.partition("/")
    match kind:
        case "tenant":
            until = Until(at=NOW + rng.choice([-1, 1]), then=random_policy(rng))
            return TenantDocument(policy=random_policy(rng), until=rng.choice([None, until]))
        case "keys":
            chosen = rng.sample(KEYS[name], rng.randrange(4))
            ends = [None, NOW - 1, NOW + 1]
            return KeysDocument(keys=tuple(_record(each, rng.choice(ends)) for each in chosen))
        case "alias":
            return AliasDocument(vector=rng.choice("abc") * 64)
    return KillDocument(action=rng.choice(["none", "unsteered", "reject"]))


def random_policy(rng: random.Random) -> PolicyFields:
    return PolicyFields(
        mode=rng.choice(["off", "dataset", "sample"]),
        alpha=rng.choice([0.0, 0.5, 1.0]),
        vector_alias=rng.choice(["x", "y", "of-settings"]),
        client_override=rng.choice(["none", "strengthen", "any"]),
    )


@pytest.mark.parametrize("seed", range(20))
def test_random_changes_leave_what_a_plain_model_holds(seed: int) -> None:
    rng = random.Random(seed)
    model, directory = Model(), TenantDirectory(DEFAULT)
    keys = [f"{kind}/{name}" for kind in ("tenant", "keys") for name in TENANTS]
    keys += ["alias/x", "alias/y", "kill"]
    for revision in range(1, 60):
        is_whole = rng.random() < 0.1
        chosen = keys if is_whole else rng.sample(keys, rng.randrange(1, 4))
        if is_whole:
            chosen = rng.sample(chosen, rng.randrange(len(chosen)))
            for key in model.there - set(chosen):
                model.write(key, None, False, revision)
        documents = []
        for key in chosen:
            document, is_bad = random_document(key, rng), rng.random() < 0.2
            model.write(key, document, is_bad, revision)
            text = "{" if is_bad else text_of(document) if document is not None else None
            documents.append((key, text))
        directory.apply(changes(*documents, revision=revision), is_whole)
        check(directory, model)


def check(directory: TenantDirectory, model: Model) -> None:
    for now in (NOW - 2, NOW, NOW + 2):
        for tenant in TENANTS:
            assert outcome(lambda: directory.policy(tenant, now)) == model.policy(tenant, now)  # noqa: B023
            for key in KEYS[tenant]:
                found = directory.authenticate(key, now)
                owner = model.owner(key, now)
                assert found == (None if owner is None else Principal(owner, f"id-{key}"))
    assert set(directory.problems) == model.bad
    assert directory.aliases_in_use == model.aliases_in_use()
    assert directory.requires_key == any(key.startswith("keys/") for key in model.there)
    good = {key: document for key, (document, _) in model.good.items()}
    assert directory.num_tenants == sum(key.startswith("tenant/") for key in good)
    expected = {k.removeprefix("alias/"): d.vector for k, d in good.items() if k[:6] == "alias/"}
    assert directory.aliases == expected
    assert directory.kill == getattr(good.get("kill"), "action", "none")


def outcome(ask: Callable[[], Policy]) -> Policy | str:
    try:
        return ask()
    except (UnavailableError, AuthenticationError) as error:
        return type(error).__name__


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
