"""What the store says, as operators see it: every tenant, alias and the kill switch at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.documents import (
    AliasDocument,
    KeyRecord,
    KeysDocument,
    KillAction,
    KillDocument,
    TenantDocument,
    kind_of,
    parse,
)
from server.errors import DocumentError
from steering.stores.base import Document


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


def state_of(
    epoch: str, revision: int, documents: Sequence[Document], is_strict: bool = False
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
            if kind is KillDocument:  # so that it can be replaced by who has seen it
                kill_revision = document.revision
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
