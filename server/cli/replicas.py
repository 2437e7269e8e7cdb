"""`deshift replicas`: what each replica of the fleet last said of itself."""

import json
from typing import Any

from rich.text import Text

from server.cli.control import AdminStoreOption, operate
from server.cli.display import cell, lasting, table
from server.cli.options import JsonOption, console, print_json
from server.control import Control
from steering.stores.base import Changes

_SHORT_ID_LEN = 8


def replicas(store: AdminStoreOption = None, as_json: JsonOption = False) -> None:
    """Show what each replica has in force: revision, kill switch, vectors, problems.

    behind: commits of the store that it does not have yet; age: of what it last read of the store.
    """

    async def read(control: Control) -> tuple[Changes, dict[str, str]]:
        return await control.store.changes(), await control.store.replicas()

    newest, texts = operate(store, read)
    fleet = {name: _status(texts[name]) for name in sorted(texts)}
    if as_json:
        told = [
            {**status, "replica": name, "behind": _behind(status, newest)}
            for name, status in fleet.items()
        ]
        print_json({"revision": newest.revision, "epoch": newest.epoch, "replicas": told})
        return
    if not fleet:
        console().print("no replica has told this store of itself lately")
        return
    rows = table("replica", "revision", "behind", "age", "store", "kill", "vectors")
    rows.columns[-2].no_wrap = True
    for name, status in fleet.items():
        rows.add_row(cell(name), *_row(status, newest))
    printer = console()
    printer.print(rows)
    printer.print(f"the store is at revision {newest.revision}")
    for name, status in fleet.items():
        for problem in _problems(status):
            printer.print(cell(f"{name}: {problem}", "red"))


def _status(text: str) -> dict[str, Any]:
    """A heartbeat of another version may be anything."""
    try:
        status = json.loads(text)
    except ValueError:
        status = None
    return status if isinstance(status, dict) else {"problems": ["its status cannot be read"]}


def _behind(status: dict[str, Any], newest: Changes) -> int | str | None:
    """Commits that the replica does not have; None where it does not say."""
    revision = status.get("revision")
    if not isinstance(revision, int):
        return None
    if status.get("epoch", newest.epoch) != newest.epoch:
        return "other data"
    return max(0, newest.revision - revision)


def _row(status: dict[str, Any], newest: Changes) -> list[Text]:
    behind = _behind(status, newest)
    age = status.get("age_s")
    return [
        cell(_or_unknown(status.get("revision"))),
        cell(_or_unknown(behind), "" if behind in (0, None) else "yellow"),
        cell(lasting(age) if isinstance(age, int | float) else "?"),
        cell(_or_unknown(status.get("store")), "" if status.get("store") == "ok" else "yellow"),
        cell(_kill(status), "" if _kill(status) in ("none", "?") else "bold red"),
        cell(_vectors(status.get("vectors"))),
    ]


def _problems(status: dict[str, Any]) -> list[str]:
    several = status.get("problems") or []
    found = [str(each) for each in several] if isinstance(several, list) else [str(several)]
    number, one = status.get("num_problems"), status.get("problem")
    if isinstance(number, int) and number > len(found):
        found.append(f"and {number - len(found)} more")
    return [str(one), *found] if one else found


def _kill(status: dict[str, Any]) -> str:
    """The replica's own switch is named beside the store's."""
    everywhere, own = _or_unknown(status.get("kill")), status.get("local_kill")
    return everywhere if own in (None, "none") else f"{everywhere}\nhere: {own}"


def _vectors(vectors: Any) -> str:
    if not isinstance(vectors, dict):
        return "?"
    return "\n".join(f"{alias} {str(id_)[:_SHORT_ID_LEN]}" for alias, id_ in vectors.items())


def _or_unknown(value: object) -> str:
    return "?" if value is None else str(value)
