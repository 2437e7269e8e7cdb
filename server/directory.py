"""What this replica knows of the store's documents: keys, policies, aliases, the kill switch.

Kept in memory, so that admission asks nobody. Does not read the store (sync.py), write it
(control.py) nor decide about requests (policy.py).
"""

import hmac
import time
from collections import Counter
from collections.abc import KeysView
from dataclasses import dataclass

from server.control import key_digest
from server.documents import (
    DEFAULT_TENANT,
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
    check_name,
    kind_of,
    parse,
)
from server.errors import AuthenticationError, DocumentError, UnavailableError
from server.policy import Policy
from steering.stores.base import ALIAS_PREFIX, Changes, Document

_STRICTNESS: tuple[KillAction, ...] = ("none", "unsteered", "reject")


@dataclass(frozen=True)
class Principal:
    """Who asks: the tenant of a request, and the id of its key; "" without a key."""

    tenant: str
    key_id: str


@dataclass(frozen=True)
class _Policies:
    """A tenant's policy, and what it falls back to from `until` (unix seconds) on.

    applied_at: when this replica put them in force, unix seconds; None for those of the settings.
    """

    first: Policy
    until: float | None = None
    then: Policy | None = None
    applied_at: float | None = None

    @classmethod
    def of(cls, tenant: str, document: TenantDocument, revision: int) -> "_Policies":
        first, now = Policy.of(document.policy, revision, tenant), time.time()
        if document.until is None:
            return cls(first, applied_at=now)
        then = Policy.of(document.until.then, revision, tenant)
        return cls(first, document.until.at, then, now)

    def at(self, now: float) -> Policy:
        is_over = self.until is not None and now >= self.until
        return self.then if is_over and self.then is not None else self.first

    @property
    def aliases(self) -> set[str]:
        both = (self.first, self.then)
        return {each.vector_alias for each in both if each is not None and each.may_use_vectors}


@dataclass(frozen=True)
class _HeldKey:
    principal: Principal
    record: KeyRecord


class TenantDirectory:
    """Used by the event loop only, and changed in place.

    A document that cannot be read leaves its last good version in force, and `problems` says why,
    by the document's key. default: the policy of requests without a tenant's key, unless the store
    has a document tenant/default.
    """

    def __init__(self, default: PolicyFields) -> None:
        self.is_synced = False  # whether the store has ever been read
        self.revision = 0
        self.epoch = ""
        self.problems: dict[str, str] = {}
        self.aliases: dict[str, str] = {}  # name to vector id
        self.store_kill: KillAction = "none"
        self.local_kill: KillAction = "none"  # this replica's own, for when the store is down
        self._default = _Policies(Policy.of(default, 0))
        self._policies: dict[str, _Policies] = {}
        self._keys: dict[str, _HeldKey] = {}  # by digest
        self._keys_of: dict[str, tuple[KeyRecord, ...]] = {}
        self._documents: set[str] = set()  # the keys of those that exist, good or not
        self._num_key_documents = 0
        self._alias_users = Counter(self._default.aliases)

    @property
    def tenants(self) -> KeysView[str]:
        """Those with a policy from the store."""
        return self._policies.keys()

    @property
    def num_tenants(self) -> int:
        return len(self._policies)

    @property
    def requires_key(self) -> bool:
        """From the first tenant with a document of keys on, whatever it says."""
        return self._num_key_documents > 0

    @property
    def kill(self) -> KillAction:
        """The stricter of the store's and this replica's own."""
        return max(self.store_kill, self.local_kill, key=_STRICTNESS.index)

    @property
    def aliases_in_use(self) -> frozenset[str]:
        """The aliases whose vectors some request may be steered by."""
        return frozenset(self._alias_users)

    def authenticate(self, key: str, now: float) -> Principal | None:
        """Whose key it is, at `now` (unix seconds); None for one that is not valid."""
        digest = key_digest(key)
        held = self._keys.get(digest)
        if held is None or not hmac.compare_digest(held.record.digest, digest):
            return None
        tenant = held.principal.tenant
        is_known = tenant == DEFAULT_TENANT or TENANT_PREFIX + tenant in self._documents
        return held.principal if is_known and held.record.is_valid(now) else None

    def policy(self, tenant: str, now: float) -> Policy:
        """The policy in force at `now` (unix seconds).

        Raises UnavailableError for a tenant whose document could never be read, and
        AuthenticationError for one that has just been deleted.
        """
        held = self._policies.get(tenant)
        if held is not None:
            return held.at(now)
        if TENANT_PREFIX + tenant in self._documents:
            raise UnavailableError(
                f"the policy of the tenant {tenant!r} cannot be read; its operators can see why",
                code="policy_unavailable",
            )
        if tenant == DEFAULT_TENANT:
            return self._default.at(now)
        raise AuthenticationError("the tenant of this API key does not exist any more")

    def applied_at(self, tenant: str) -> float | None:
        """When the tenant's document took effect here, unix seconds; None without one."""
        held = self._policies.get(tenant)
        return None if held is None else held.applied_at

    def apply(self, changes: Changes, is_whole: bool = False) -> None:
        """Take over what was committed, in time that depends on the changed documents alone.

        is_whole: `changes` is everything that there is; what is not in it is forgotten, and of
        another epoch's documents even the last good versions.
        """
        if is_whole:
            is_same = changes.epoch == self.epoch
            there = {each.key for each in changes.documents if is_same}
            for key in self._documents - there:
                self._apply(Document(key, None, changes.revision))
        self.epoch, self.revision, self.is_synced = changes.epoch, changes.revision, True
        for document in changes.documents:
            self._apply(document)

    def _apply(self, document: Document) -> None:
        key, known = document.key, kind_of(document.key)
        if known is None:
            return  # of a later version
        kind, name = known
        self.problems.pop(key, None)
        self._count(key, exists=document.value is not None)
        if document.value is None:
            self._forget(key, name)
            return
        try:
            if key != KILL_KEY:
                check_name(name)
            self._hold(name, parse(kind, key, document.value), document.revision)
        except (DocumentError, ValueError) as error:
            self.problems[key] = str(error)

    def _count(self, key: str, exists: bool) -> None:
        if key.startswith(KEYS_PREFIX):
            self._num_key_documents += exists - (key in self._documents)
        if exists:
            self._documents.add(key)
        else:
            self._documents.discard(key)

    def _hold(self, name: str, document: AnyDocument, revision: int) -> None:
        match document:
            case TenantDocument():
                self._set_policies(name, _Policies.of(name, document, revision))
            case KeysDocument():
                self._set_keys(name, document.keys)
            case AliasDocument():
                self.aliases[name] = document.vector
            case KillDocument():
                self.store_kill = document.action

    def _forget(self, key: str, name: str) -> None:
        if key == KILL_KEY:
            self.store_kill = "none"
        elif key.startswith(TENANT_PREFIX):
            self._set_policies(name, None)
        elif key.startswith(KEYS_PREFIX):
            self._set_keys(name, ())
        elif key.startswith(ALIAS_PREFIX):
            self.aliases.pop(name, None)

    def _set_policies(self, tenant: str, policies: _Policies | None) -> None:
        before = self._policies.pop(tenant, None)
        if before is not None:
            for alias in before.aliases:
                self._alias_users[alias] -= 1
                if not self._alias_users[alias]:
                    del self._alias_users[alias]
        if policies is not None:
            self._policies[tenant] = policies
            self._alias_users.update(policies.aliases)

    def _set_keys(self, tenant: str, records: tuple[KeyRecord, ...]) -> None:
        for record in self._keys_of.pop(tenant, ()):
            held = self._keys.get(record.digest)
            if held is not None and held.principal.tenant == tenant:
                del self._keys[record.digest]
        if records:
            self._keys_of[tenant] = records
        for record in records:
            self._keys[record.digest] = _HeldKey(Principal(tenant, record.id), record)
