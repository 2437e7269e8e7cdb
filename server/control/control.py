"""What operators do: tenants, policies, keys, aliases, the kill switch, with audit and revert.

The admin API, the console and the commands all come through here, so every change has a reason and
a revision that is checked. Knows a store and no HTTP. Does not put anything in force (sync.py).
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.control.keys import (
    MAX_KEYS,
    NewKey,
    checked,
    ending,
    new_key,
    with_new,
    without_oldest,
)
from server.control.state import StoreState, TenantState, state_of
from server.control.trail import AuditEntry, Author, entry_of, entry_text
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
    kind_of,
    parse,
    text_of,
)
from server.errors import ExistsError, InvalidRequestError, NoSuchTenantError
from steering.errors import ConflictError
from steering.stores.base import ALIAS_PREFIX, Store

MAX_POLICY_S = MAX_OVERLAP_S = 366 * 86400.0
AUDIT_PAGE = 200


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
        return state_of(changes.epoch, changes.revision, changes.documents)

    async def tenant(self, name: str) -> TenantState:
        """Raises NoSuchTenantError."""
        keys = (TENANT_PREFIX + name, KEYS_PREFIX + name)
        documents = await self.store.get(keys)
        state = state_of("", 0, tuple(documents.values()), is_strict=True)
        if name not in state.tenants:
            raise NoSuchTenantError(f"there is no tenant {name[:80]!r}")
        return state.tenants[name]

    async def create_tenant(self, name: str, policy: PolicyFields, author: Author) -> int:
        """Without keys. Returns the revision. Raises ExistsError, InvalidRequestError for a bad
        name.
        """
        checked(name, "tenant")
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
        text, record = new_key(key_id, expires_in_s, self.now())
        revision = await self._set_keys("key.create", held, with_new(held, record), author)
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
        text, record = new_key(new_id, None, self.now())
        keys = with_new(held, record)
        revision = await self._set_keys(
            "key.rotate", held, ending(tenant, keys, key_id, self.now(), overlap_s), author
        )
        return NewKey(text, record, revision)

    async def revoke_key(
        self, tenant: str, key_id: str, author: Author, expected: int | None = None
    ) -> int:
        """From now on; one whose time is over is no change. Raises NoSuchTenantError."""
        held = await self.tenant(tenant)
        _check_revision(f"the list of keys of {tenant!r}", expected, held.keys_revision)
        keys = ending(tenant, held.keys, key_id, self.now())
        return await self._set_keys("key.revoke", held, keys, author)

    async def activate(
        self, alias: str, vector_id: str, author: Author, expected: int | None = None
    ) -> int:
        """Point an alias to a vector set, which is read and verified first.

        Raises NotFoundError for an unknown set, VectorError for a damaged one.
        """
        checked(alias, "alias")
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
                entry = entry_of(record)
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
        entry = entry_of(records[0])
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

    async def _set_keys(
        self, action: str, held: TenantState, keys: tuple[KeyRecord, ...], author: Author
    ) -> int:
        """Only while the tenant exists: its policy's revision is checked, too."""
        keys = without_oldest(keys, self.now())
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
        return await self.store.commit(
            texts, expected, entry_text(action, held, texts, author, more)
        )


async def activate(store: Store, alias: str, vector_id: str, *, by: str, reason: str) -> int:
    """For commands: point an alias to a vector set. Raises what `Control.activate` raises."""
    return await Control(store).activate(alias, vector_id, Author(by, reason, "command"))


def _check_revision(what: str, expected: int | None, actual: int) -> None:
    if expected is not None and expected != actual:
        raise ConflictError(
            f"{what} is at revision {actual}, not {expected}: it was changed in the meantime",
            {what: actual},
        )
