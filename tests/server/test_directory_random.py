"""What a replica knows of the store after random changes, against a plain model."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from server.control import key_digest
from server.directory import Principal, TenantDirectory
from server.documents import (
    AliasDocument,
    AnyDocument,
    KeysDocument,
    KillDocument,
    PolicyFields,
    TenantDocument,
    Until,
    text_of,
)
from server.errors import AuthenticationError, UnavailableError
from server.policy import Policy
from tests.server.stored import DEFAULT, NOW, changes, record_of

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
            return KeysDocument(keys=tuple(record_of(each, rng.choice(ends)) for each in chosen))
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
