"""What the operators' commands share: a store that may be written, who acts and why, durations.

Does not cover what any of them does (server/control.py) nor how it looks (display.py).
"""

import re
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from server.cli.options import operator_name, settings_with, with_store
from server.control import Author, Control

T = TypeVar("T")

AdminStoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="Store of tenants and policies, with rights to write; by default "
        "DESHIFT_ADMIN_STORE, else DESHIFT_STORE, else deshift.db in the cache directory. A "
        "password is better given in these: others see command lines.",
        metavar="URL",
    ),
]
ReasonOption = Annotated[
    str, typer.Option("--reason", help="Why, in one line; it is kept in the audit.", metavar="TEXT")
]
ByOption = Annotated[
    str | None,
    typer.Option("--by", help="Who, for the audit; by default your login name.", metavar="NAME"),
]
TenantArgument = Annotated[str, typer.Argument(help="The tenant's name.", metavar="TENANT")]
RevisionOption = Annotated[
    int | None,
    typer.Option(
        "--revision",
        help="The revision that you looked at: if it is another one by now, nothing is changed.",
        metavar="N",
    ),
]

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])")


def operate(url: str | None, action: Callable[[Control], Awaitable[T]]) -> T:
    """Open the store, do `action` with it, and close it; raises what `action` raises."""
    settings = settings_with({"admin_store": url})
    return with_store(
        settings.admin_store or settings.store_url, lambda store: action(Control(store))
    )


def author(by: str | None, reason: str) -> Author:
    """Raises InvalidRequestError for an empty reason."""
    return Author(operator_name() if by is None else by, reason, "command")


def duration(text: str) -> float:
    """`90s`, `30m`, `12h` or `7d`, in seconds; a parser of options."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a duration such as 90s, 30m, 12h or 7d")
    return float(found[1]) * _UNITS_S[found[2]]
