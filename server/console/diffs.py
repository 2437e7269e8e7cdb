"""What a commit changed, as lines a person can read. Pure.

An audit record holds whole documents before and after; here are the fields that differ.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from server.control import AuditEntry, DocumentChange
from server.documents import KEYS_PREFIX, KILL_KEY, TENANT_PREFIX, PolicyFields
from steering.stores.base import ALIAS_PREFIX

ACTIONS = {
    "tenant.create": "created the tenant",
    "tenant.delete": "deleted the tenant",
    "policy.set": "changed the policy",
    "key.create": "created a key",
    "key.rotate": "rotated a key",
    "key.revoke": "revoked a key",
    "alias.set": "activated a vector set",
    "kill.set": "set the kill switch",
    "revert": "reverted a change",
    "store.adopt": "let the store's data go on",
    "store.restore": "restored what was in force",
}


@dataclass(frozen=True)
class Line:
    """One field of a document before and after; "" where there is none."""

    field: str
    before: str
    after: str


@dataclass(frozen=True)
class Subject:
    """What a document is about: `tenant`, `keys`, `alias`, `kill` or `document`, and its name."""

    kind: str
    name: str


@dataclass(frozen=True)
class ReadableChange:
    subject: Subject
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class ReadableEntry:
    """An audit entry for a page. action: in words."""

    entry: AuditEntry
    action: str
    changes: tuple[ReadableChange, ...]


def readable(entry: AuditEntry) -> ReadableEntry:
    changes = tuple(
        ReadableChange(subject_of(change.key), tuple(_lines(change))) for change in entry.changes
    )
    return ReadableEntry(entry, ACTIONS.get(entry.action, entry.action), changes)


def subject_of(key: str) -> Subject:
    if key == KILL_KEY:
        return Subject("kill", "kill switch")
    for prefix, kind in ((TENANT_PREFIX, "tenant"), (KEYS_PREFIX, "keys"), (ALIAS_PREFIX, "alias")):
        if key.startswith(prefix):
            return Subject(kind, key.removeprefix(prefix))
    return Subject("document", key)


def _lines(change: DocumentChange) -> Iterator[Line]:
    before, after = _fields(change.key, change.before), _fields(change.key, change.after)
    exists = change.before is not None, change.after is not None
    if exists == (False, True):
        before = _defaults(change.key)
    elif exists == (True, False):
        after = _defaults(change.key)
    for name in [*after, *(name for name in before if name not in after)]:
        old, new = before.get(name, ""), after.get(name, "")
        if old != new:
            yield Line(name, old if exists[0] else "", new if exists[1] else "")


def _fields(key: str, document: Any) -> dict[str, str]:
    """A document's fields as text, by name."""
    if document is None:
        return {}
    kind = subject_of(key).kind
    found: dict[str, str] = {}
    if not isinstance(document, Mapping):
        return {"value": str(document)}
    if kind == "tenant":
        found |= _policy(document.get("policy") or {})
        until = document.get("until")
        if until:
            found["ends"] = moment(until["at"])
            later = _policy(until["then"])
            now = _policy(document.get("policy") or {})
            differing = [f"{name} {text}" for name, text in later.items() if now.get(name) != text]
            found["then"] = ", ".join(differing) or "the same"
        return found
    if kind == "keys":
        for each in document.get("keys") or ():
            end = each.get("expires_at")
            found[f"key {each['id']}"] = "valid" if end is None else f"ends {moment(end)}"
        return found
    return found | {name: _text(value) for name, value in document.items()}


def _defaults(key: str) -> dict[str, str]:
    """What a new document is compared with: only departures from the defaults are worth a line."""
    if subject_of(key).kind != "tenant":
        return {}
    fields = _policy(PolicyFields.model_validate({}).model_dump(mode="json"))
    return {name: text for name, text in fields.items() if name not in ("mode", "alpha")}


def _policy(policy: Mapping[str, Any]) -> dict[str, str]:
    return {name.replace("_", " "): _text(value) for name, value in policy.items()}


def _text(value: Any) -> str:
    if value is None:
        return "no limit"
    if isinstance(value, float):
        return number(value)
    text = str(value)
    return text[:12] if len(text) == 64 else text  # a digest


def number(value: float) -> str:
    """As short as it can be without losing a digit: 0.6, 2, 1e-05."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def moment(at: float) -> str:
    """Unix seconds as UTC, to the second."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
