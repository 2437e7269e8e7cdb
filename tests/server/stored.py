"""Documents of tenants and keys, as a store's changes bring them to a replica."""

from typing import Any

from server.control import key_digest
from server.directory import TenantDirectory
from server.documents import KeyRecord, KeysDocument, PolicyFields, TenantDocument, Until, text_of
from steering.stores.base import Changes, Document

DEFAULT = PolicyFields(alpha=0.5, vector_alias="of-settings")
NOW = 1_000_000.0


def tenant_text(alpha: float = 0.8, until: Until | None = None, **fields: Any) -> str:
    return text_of(TenantDocument(policy=PolicyFields(alpha=alpha, **fields), until=until))


def keys_text(*keys: str, expires_at: float | None = None) -> str:
    return text_of(KeysDocument(keys=tuple(record_of(key, expires_at) for key in keys)))


def record_of(key: str, expires_at: float | None = None) -> KeyRecord:
    return KeyRecord(id=f"id-{key}", digest=key_digest(key), created_at=NOW, expires_at=expires_at)


def changes(*documents: tuple[str, str | None], revision: int = 1, epoch: str = "e") -> Changes:
    return Changes(
        epoch, revision, tuple(Document(key, value, revision) for key, value in documents)
    )


def directory_of(*documents: tuple[str, str | None]) -> TenantDirectory:
    directory = TenantDirectory(DEFAULT)
    directory.apply(changes(*documents), is_whole=True)
    return directory
