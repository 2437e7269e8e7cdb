"""What operators do: tenants, policies, keys, aliases, the kill switch, with audit and revert.

The admin API, the console and the commands all come through here, so every change has a reason and
a revision that is checked. Knows a store and no HTTP. Does not put anything in force (sync.py).
"""

import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from server.documents import (
    KEYS_PREFIX,
    KILL_KEY,
    TENANT_PREFIX,
    AliasDocument,
    AnyDocument,
    KeyRecord,
    KeysDocument,
    KillAction,
    KillDocument,
    PolicyFields,
    TenantDocument,
    Until,
    check_name,
    kind_of,
    parse,
    plain,
    text_of,
)
from server.errors import DocumentError, ExistsError, InvalidRequestError, NoSuchTenantError
from steering.errors import ConflictError, StoreError
from steering.stores.base import ALIAS_PREFIX, Document, Store

MAX_REASON_LEN = 500
MAX_KEYS = 100  # of one tenant
MAX_POLICY_S = MAX_OVERLAP_S = 366 * 86400.0
KEY_START = "dsk-"
AUDIT_PAGE = 200

Via = Literal["api", "console", "command", "setup"]


@dataclass(frozen=True)
class Author:
    """Who changes something, by which way, and why. Raises InvalidRequestError."""

    by: str
    reason: str
    via: Via

    def __post_init__(self) -> None:
        reason = self.reason.strip()
        if not reason:
            raise InvalidRequestError("a change needs a reason", param="reason")
        if len(reason) > MAX_REASON_LEN or not reason.isprintable():
            raise InvalidRequestError(
                f"the reason must be one line of at most {MAX_REASON_LEN} characters",
                param="reason",
            )
        if not self.by or not self.by.isprintable():
            raise InvalidRequestError("who makes the change must be one line of text")


@dataclass(frozen=True)
class TenantState:
    """A tenant as the store has it. revision: of its policy; keys_revision: of its keys, 0 without
    any; keys whose time is over are listed, too."""

    name: str
    document: TenantDocument
    revision: int
    keys: tuple[KeyRecord, ...] = ()
    keys_revision: int = 0


@dataclass(frozen=True)
class StoreState:
    """Everything that the store says, read at once. unreadable: documents by what is wrong."""

    epoch: str
    revision: int
    tenants: Mapping[str, TenantState]
    aliases: Mapping[str, str]
    kill: KillAction
    kill_revision: int
    unreadable: Mapping[str, str]


@dataclass(frozen=True)
class DocumentChange:
    """A document before and after a commit, as plain JSON values; None: it did not exist."""

    key: str
    before: Any
    after: Any


@dataclass(frozen=True)
class AuditEntry:
    """at: unix seconds. action: what was done, in a word or two, e.g. `policy.set`."""

    revision: int
    at: float
    by: str
    via: str
    reason: str
    action: str
    changes: tuple[DocumentChange, ...]


@dataclass(frozen=True)
class NewKey:
    """`text` is the key itself: shown once, kept nowhere."""

    text: str
    record: KeyRecord
    revision: int


@dataclass(frozen=True)
class Control:
    """Every method raises StoreError when the store cannot be reached, ConflictError when somebody
    else was faster, ReadOnlyError where the credentials may only read, and DocumentError for a
    document that cannot be read.

    `now` gives unix seconds.
    """

    store: Store
    now: Callable[[], float] = field(default=time.time)

    async def state(self) -> StoreState:
        changes = await self.store.changes()
        return _state_of(changes.epoch, changes.revision, changes.documents)

    async def tenant(self, name: str) -> TenantState:
        """Raises NoSuchTenantError."""
        keys = (TENANT_PREFIX + name, KEYS_PREFIX + name)
        documents = await self.store.get(keys)
        state = _state_of("", 0, tuple(documents.values()), is_strict=True)
        if name not in state.tenants:
            raise NoSuchTenantError(f"there is no tenant {name[:80]!r}")
        return state.tenants[name]

    async def create_tenant(self, name: str, policy: PolicyFields, author: Author) -> int:
        """Without keys. Returns the revision. Raises ExistsError, InvalidRequestError for a bad
        name.
        """
        _checked(name, "tenant")
        document = TenantDocument(policy=policy, created_at=self.now())
        writes: dict[str, AnyDocument | None] = {TENANT_PREFIX + name: document}
        expected = {TENANT_PREFIX + name: 0, KEYS_PREFIX + name: 0}
        try:
            return await self._commit("tenant.create", writes, expected, author)
        except ConflictError:
            raise ExistsError(
                f"there is a tenant {name!r} already, or there are its keys"
            ) from None

    async def set_policy(
        self,
        name: str,
        policy: PolicyFields,
        expected: int | None,
        author: Author,
        expires_in_s: float | None = None,
    ) -> int:
        """Change a tenant's policy; returns its revision, the old one when nothing changes.

        expected: the revision that the operator saw; None: whatever it is. expires_in_s: after
        that time the last policy that was set without an end is in force again.
        """
        held = await self.tenant(name)
        _check_revision(f"the policy of {name!r}", expected, held.revision)
        until = None
        if expires_in_s is not None:
            if not 0 < expires_in_s <= MAX_POLICY_S:
                raise InvalidRequestError("a policy may last up to 366 days", param="expires_in_s")
            replaced = held.document.until
            then = held.document.policy if replaced is None else replaced.then
            until = Until(at=self.now() + expires_in_s, then=then)
        document = held.document.model_copy(update={"policy": policy, "until": until})
        if document == held.document:
            return held.revision
        key = TENANT_PREFIX + name
        return await self._commit("policy.set", {key: document}, {key: held.revision}, author)

    async def delete_tenant(self, name: str, expected: int | None, author: Author) -> int:
        """With its keys, and also where its documents cannot be read. Raises NoSuchTenantError."""
        keys = (TENANT_PREFIX + name, KEYS_PREFIX + name)
        held = await self.store.get(keys)
        if not held:
            raise NoSuchTenantError(f"there is no tenant {name[:80]!r}")
        revisions = {key: held[key].revision if key in held else 0 for key in keys}
        _check_revision(f"the policy of {name!r}", expected, revisions[TENANT_PREFIX + name])
        writes: dict[str, AnyDocument | None] = dict.fromkeys(held)
        return await self._commit("tenant.delete", writes, revisions, author)

    async def create_key(
        self,
        tenant: str,
        key_id: str,
        author: Author,
        expires_in_s: float | None = None,
        expected: int | None = None,
    ) -> NewKey:
        """expected: keys_revision, as in `set_policy`. Raises NoSuchTenantError, ExistsError."""
        held = await self.tenant(tenant)
        _check_revision(f"the list of keys of {tenant!r}", expected, held.keys_revision)
        text, record = self._new_key(key_id, expires_in_s)
        revision = await self._set_keys("key.create", held, _with_new(held, record), author)
        return NewKey(text, record, revision)

    async def rotate_key(
        self,
        tenant: str,
        key_id: str,
        new_id: str,
        author: Author,
        overlap_s: float,
        expected: int | None = None,
    ) -> NewKey:
        """A new key; the old one is good for `overlap_s` seconds more. Raises NoSuchTenantError."""
        if not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise InvalidRequestError("the old key may last up to 366 days", param="overlap_s")
        held = await self.tenant(tenant)
        _check_revision(f"the list of keys of {tenant!r}", expected, held.keys_revision)
        text, record = self._new_key(new_id, None)
        keys = _with_new(held, record)
        revision = await self._set_keys(
            "key.rotate", held, self._ending(tenant, keys, key_id, overlap_s), author
        )
        return NewKey(text, record, revision)

    async def revoke_key(
        self, tenant: str, key_id: str, author: Author, expected: int | None = None
    ) -> int:
        """From now on; one whose time is over is no change. Raises NoSuchTenantError."""
        held = await self.tenant(tenant)
        _check_revision(f"the list of keys of {tenant!r}", expected, held.keys_revision)
        keys = self._ending(tenant, held.keys, key_id, 0.0)
        return await self._set_keys("key.revoke", held, keys, author)

    async def activate(
        self, alias: str, vector_id: str, author: Author, expected: int | None = None
    ) -> int:
        """Point an alias to a vector set, which is read and verified first.

        Raises NotFoundError for an unknown set, VectorError for a damaged one.
        """
        _checked(alias, "alias")
        await self.store.get_vectors(vector_id)
        key = ALIAS_PREFIX + alias
        held = (await self.store.get([key])).get(key)
        revision = held.revision if held else 0
        _check_revision(f"the alias {alias!r}", expected, revision)
        document = AliasDocument(vector=vector_id)
        if held is not None and held.value == text_of(document):
            return revision
        return await self._commit("alias.set", {key: document}, {key: revision}, author)

    async def set_kill(
        self, action: KillAction, author: Author, expected: int | None = None
    ) -> int:
        held = (await self.store.get([KILL_KEY])).get(KILL_KEY)
        revision = held.revision if held else 0
        _check_revision("the kill switch", expected, revision)
        document = KillDocument(action=action)
        if held is not None and held.value == text_of(document):
            return revision
        return await self._commit("kill.set", {KILL_KEY: document}, {KILL_KEY: revision}, author)

    async def audit(
        self, limit: int = 50, before: int | None = None, tenant: str | None = None
    ) -> list[AuditEntry]:
        """The newest commits first; with `tenant`, those that changed its policy or keys."""
        wanted = None if tenant is None else {TENANT_PREFIX + tenant, KEYS_PREFIX + tenant}
        found: list[AuditEntry] = []
        while len(found) < limit:
            page = await self.store.audit(AUDIT_PAGE if wanted else limit, before)
            if not page:
                break
            before = page[-1].revision
            for record in page:
                entry = _entry(record.revision, record.at, record.entry)
                if wanted is None or any(change.key in wanted for change in entry.changes):
                    found.append(entry)
        return found[:limit]

    async def revert(self, revision: int, author: Author) -> int:
        """Bring back what a commit replaced, where nobody has changed it since.

        Raises NoSuchTenantError for an unknown commit, ConflictError for what was changed since.
        """
        records = await self.store.audit(1, revision + 1)
        if not records or records[0].revision != revision:
            raise NoSuchTenantError(f"there is no change {revision}")
        entry = _entry(records[0].revision, records[0].at, records[0].entry)
        writes: dict[str, AnyDocument | None] = {}
        expected: dict[str, int] = {}
        for change in entry.changes:
            known = kind_of(change.key)
            if known is None:
                raise InvalidRequestError(f"{change.key!r} cannot be reverted by this version")
            text = None if change.before is None else json.dumps(change.before)
            writes[change.key] = None if text is None else parse(known[0], change.key, text)
            expected[change.key] = 0 if change.after is None else revision
            if text is None and change.key.startswith(TENANT_PREFIX):
                # Left behind, its keys would be those of the next tenant of that name.
                expected.setdefault(KEYS_PREFIX + change.key.removeprefix(TENANT_PREFIX), 0)
        return await self._commit("revert", writes, expected, author, reverts=revision)

    async def adopt(self, writes: Mapping[str, str | None], author: Author) -> int:
        """Let the store's documents succeed those in force; `writes`: Sync.adoption."""
        return await self._commit_texts("store.adopt", writes, {}, author)

    async def restore(
        self,
        writes: Mapping[str, str | None],
        expected: Mapping[str, int],
        vectors: Iterable[bytes],
        author: Author,
    ) -> int:
        """Make the store say again what a replica has in force: Sync.restoration."""
        for data in vectors:
            await self.store.put_vectors(data)
        return await self._commit_texts("store.restore", writes, expected, author)

    def _new_key(self, key_id: str, expires_in_s: float | None) -> tuple[str, KeyRecord]:
        _checked(key_id, "key")
        if expires_in_s is not None and not 0 < expires_in_s < math.inf:
            raise InvalidRequestError("expires_in_s must be a time above 0", param="expires_in_s")
        text = KEY_START + secrets.token_urlsafe(32)
        now = self.now()
        return text, KeyRecord(
            id=key_id,
            digest=key_digest(text),
            created_at=now,
            expires_at=None if expires_in_s is None else now + expires_in_s,
        )

    def _ending(
        self, tenant: str, keys: tuple[KeyRecord, ...], key_id: str, in_s: float
    ) -> tuple[KeyRecord, ...]:
        """The keys, with one that ends in `in_s` seconds if it does not end before."""
        if key_id not in {key.id for key in keys}:
            raise NoSuchTenantError(f"the tenant {tenant!r} has no key {key_id[:80]!r}")
        end = self.now() + in_s
        return tuple(
            key.model_copy(update={"expires_at": end})
            if key.id == key_id and key.is_valid(end)
            else key
            for key in keys
        )

    async def _set_keys(
        self, action: str, held: TenantState, keys: tuple[KeyRecord, ...], author: Author
    ) -> int:
        """Only while the tenant exists: its policy's revision is checked, too."""
        keys = _without_oldest(keys, self.now())
        if len(keys) > MAX_KEYS:
            raise InvalidRequestError(f"a tenant has at most {MAX_KEYS} keys that are valid")
        if keys == held.keys:
            return held.keys_revision
        document = KeysDocument(keys=keys)
        key = KEYS_PREFIX + held.name
        expected = {key: held.keys_revision, TENANT_PREFIX + held.name: held.revision}
        return await self._commit(action, {key: document}, expected, author)

    async def _commit(
        self,
        action: str,
        writes: Mapping[str, AnyDocument | None],
        expected: Mapping[str, int],
        author: Author,
        **more: Any,
    ) -> int:
        texts = {key: None if each is None else text_of(each) for key, each in writes.items()}
        return await self._commit_texts(action, texts, expected, author, **more)

    async def _commit_texts(
        self,
        action: str,
        texts: Mapping[str, str | None],
        expected: Mapping[str, int],
        author: Author,
        **more: Any,
    ) -> int:
        held = await self.store.get(list(texts))
        entry = {
            "by": author.by,
            "via": author.via,
            "reason": author.reason.strip(),
            "action": action,
            "changes": [
                {
                    "key": key,
                    "before": _shown(held[key].value) if key in held else None,
                    "after": _shown(text),
                }
                for key, text in texts.items()
            ],
            **more,
        }
        return await self.store.commit(texts, expected, json.dumps(entry))


async def activate(store: Store, alias: str, vector_id: str, *, by: str, reason: str) -> int:
    """For commands: point an alias to a vector set. Raises what `Control.activate` raises."""
    return await Control(store).activate(alias, vector_id, Author(by, reason, "command"))


def key_digest(text: str) -> str:
    """What is kept of a key. A plain hash will do: keys are random and long."""
    return hashlib.sha256(text.encode()).hexdigest()


def _shown(text: str | None) -> Any:
    """A damaged document, which is being replaced, as it is."""
    try:
        return plain(text)
    except ValueError:
        return text


def _without_oldest(keys: tuple[KeyRecord, ...], now: float) -> tuple[KeyRecord, ...]:
    """Where there are too many, without those whose time was over first."""
    over = sorted((key.expires_at or 0, key.id) for key in keys if not key.is_valid(now))
    dropped = {key_id for _, key_id in over[: max(0, len(keys) - MAX_KEYS)]}
    return tuple(key for key in keys if key.id not in dropped)


def _with_new(held: TenantState, record: KeyRecord) -> tuple[KeyRecord, ...]:
    if record.id in {key.id for key in held.keys}:
        raise ExistsError(f"the tenant {held.name!r} has a key {record.id!r} already")
    return (*held.keys, record)


def _checked(name: str, what: str) -> None:
    try:
        check_name(name)
    except ValueError as error:
        raise InvalidRequestError(f"{what}: {error}", param=what) from None


def _check_revision(what: str, expected: int | None, actual: int) -> None:
    if expected is not None and expected != actual:
        raise ConflictError(
            f"{what} is at revision {actual}, not {expected}: it was changed in the meantime",
            {what: actual},
        )


def _state_of(
    epoch: str, revision: int, documents: tuple[Document, ...], is_strict: bool = False
) -> StoreState:
    """is_strict: a document that cannot be read raises, instead of being listed."""
    tenants: dict[str, TenantState] = {}
    keys: dict[str, tuple[KeysDocument, int]] = {}
    aliases: dict[str, str] = {}
    kill, kill_revision = KillDocument(), 0
    unreadable: dict[str, str] = {}
    for document in documents:
        known = kind_of(document.key)
        if known is None or document.value is None:
            continue
        kind, name = known
        try:
            parsed = parse(kind, document.key, document.value)
        except DocumentError as error:
            if is_strict:
                raise
            unreadable[document.key] = str(error)
            continue
        match parsed:
            case TenantDocument():
                tenants[name] = TenantState(name, parsed, document.revision)
            case KeysDocument():
                keys[name] = parsed, document.revision
            case AliasDocument():
                aliases[name] = parsed.vector
            case KillDocument():
                kill, kill_revision = parsed, document.revision
    for name, (parsed_keys, keys_revision) in keys.items():
        if name in tenants:
            held = tenants[name]
            tenants[name] = TenantState(
                name, held.document, held.revision, parsed_keys.keys, keys_revision
            )
    return StoreState(epoch, revision, tenants, aliases, kill.action, kill_revision, unreadable)


def _entry(revision: int, at: float, text: str) -> AuditEntry:
    """Raises StoreError for a record that is none of ours."""
    try:
        entry = json.loads(text)
        return AuditEntry(
            revision=revision,
            at=at,
            by=entry["by"],
            via=entry["via"],
            reason=entry["reason"],
            action=entry["action"],
            changes=tuple(
                DocumentChange(each["key"], each["before"], each["after"])
                for each in entry["changes"]
            ),
        )
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"the audit record of revision {revision} cannot be read") from None
