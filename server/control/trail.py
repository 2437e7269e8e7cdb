"""Who changed what, when and why: the entries of the store's audit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from server.documents import plain
from server.errors import InvalidRequestError
from steering.errors import StoreError
from steering.stores.base import AuditRecord, Document

MAX_REASON_LEN = 500

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


def entry_text(
    action: str,
    held: Mapping[str, Document],
    texts: Mapping[str, str | None],
    author: Author,
    more: Mapping[str, Any],
) -> str:
    """The audit's own text of a commit that writes `texts` in place of what is held."""
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
    return json.dumps(entry)


def entry_of(record: AuditRecord) -> AuditEntry:
    """Raises StoreError for a record that is none of ours."""
    try:
        entry = json.loads(record.entry)
        return AuditEntry(
            revision=record.revision,
            at=record.at,
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
        raise StoreError(f"the audit record of revision {record.revision} cannot be read") from None


def _shown(text: str | None) -> Any:
    """A damaged document, which is being replaced, as it is."""
    try:
        return plain(text)
    except ValueError:
        return text
