"""What several subcommands share: settings, the store, printing."""

import asyncio
import getpass
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from server.config import Settings
from steering.stores import Store, opened_store

T = TypeVar("T")

StoreOption = Annotated[
    str | None,
    typer.Option(
        help="Store: sqlite:///path, redis://user:password@host:port/db (rediss:// for TLS) or "
        "redis+sentinel://host,host2/service; by default DESHIFT_STORE or deshift.db in the cache "
        "directory. A password is better given in DESHIFT_STORE: others see command lines.",
        metavar="URL",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

_WIDTH_WITHOUT_TERMINAL = 120


def settings_with(options: Mapping[str, Any]) -> Settings:
    """Settings from the environment; options that were given (not None) win."""
    given = {name: value for name, value in options.items() if value is not None}
    return Settings.from_env(os.environ, given)


def pairs(
    values: Sequence[str] | None, option: str, error: type[Exception] = typer.BadParameter
) -> list[tuple[str, str]]:
    """NAME=VALUE, several times. Raises `error`."""
    parts = [value.partition("=") for value in values or ()]
    for name, equals, value in parts:
        if not (name and equals and value):
            raise error(f"{option} {name!r}: write NAME=VALUE")
    return [(name, value) for name, _, value in parts]


def with_store(url: str, work: Callable[[Store], Awaitable[T]]) -> T:
    """Do something with a store, in an event loop of its own, and close it."""

    async def run() -> T:
        async with opened_store(url) as store:
            return await work(store)

    return asyncio.run(run())


def operator_name() -> str:
    """Who runs the command, for the audit: the name of the user, or its number without one."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not be in its /etc/passwd
        return f"uid {os.getuid()}"


def console(width: int = _WIDTH_WITHOUT_TERMINAL) -> Console:
    """For tables: as wide as the terminal, and wide enough for an id where there is none."""
    return Console(width=None if sys.stdout.isatty() else width)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
