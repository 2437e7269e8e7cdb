"""How the operators' commands show values: times, durations, documents before and after.

What a store holds comes from outside: it is shown as plain text, never as markup or as control
sequences of a terminal.
"""

import time
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from server.control import DocumentChange
from server.documents import KEYS_PREFIX, KILL_KEY
from steering.stores.base import ALIAS_PREFIX

_SHORT_ID_LEN = 12
_ID_LEN = 64
# What a document that does not exist stands for; a tenant's stands for nothing.
_EMPTY: dict[str, Any] = {
    KEYS_PREFIX: {"keys": []},
    KILL_KEY: {"action": "none"},
    ALIAS_PREFIX: {"vector": None},
}


def cell(value: object, style: str = "") -> Text:
    """A table's cell, or a line."""
    text = str(value)
    return Text("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text), style)


def table(*headings: str) -> Table:
    """Of cells that wrap rather than lose their ends, under headings that do not."""
    made = Table()
    for heading in headings:
        made.add_column(heading, overflow="fold", min_width=len(heading))
    return made


def moment(at: float) -> str:
    """Unix seconds, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(at))


def lasting(seconds: float) -> str:
    """In the largest unit that leaves more than one of it: `90 s`, `45 min`, `2.5 h`, `7 d`."""
    for unit, size_s in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.3g} {unit}"
    return f"{seconds:.3g} s"


def shown(value: Any, name: str = "") -> str:
    """A document's value in a few characters; `name` is its field's."""
    match value:
        case None:
            return "none"
        case {"at": float(at) | int(at)}:
            return moment(at)
        case float() | int() if name == "at" or name.endswith("_at"):
            return moment(value)
        case float():
            return f"{value:g}"
        case str() if len(value) == _ID_LEN:
            return value[:_SHORT_ID_LEN]
    return str(value)


def change_lines(change: DocumentChange) -> list[str]:
    """What a commit did to a document, one line for each value."""
    prefix = change.key.partition("/")[0] + "/" if "/" in change.key else change.key
    empty = _EMPTY.get(prefix)
    before, after = (empty if each is None else each for each in (change.before, change.after))
    if before is None or after is None:
        return [f"{change.key}: {'created' if before is None else 'deleted'}"]
    if not isinstance(before, dict) or not isinstance(after, dict):  # it was damaged
        return [f"{change.key}: replaced"]
    lines = differences(before, after) or ["written again"]
    return [f"{change.key}: {line}" for line in lines]


def differences(before: Any, after: Any, place: str = "") -> list[str]:
    """`place before -> after` for every value that differs; lists of things with ids by id."""
    before, after = _by_id(before), _by_id(after)
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        name = place.rpartition(".")[2]
        same = before == after
        return [] if same else [f"{place} {shown(before, name)} -> {shown(after, name)}"]
    lines: list[str] = []
    for name in dict.fromkeys([*before, *after]):
        inner = f"{place}.{name}" if place else str(name)
        inner = inner.removeprefix("policy.").removeprefix("keys.")
        if name not in before or name not in after:
            lines.append(f"{inner} {'added' if name in after else 'removed'}")
        else:
            lines.extend(differences(before[name], after[name], inner))
    return lines


def _by_id(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(each, dict) and "id" in each for each in value):
        return {str(each["id"]): each for each in value}
    return value
