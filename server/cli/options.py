"""What several subcommands share: settings, the store, printing."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from server.config import Settings
from steering.stores import Store, open_store

StoreOption = Annotated[
    str | None,
    typer.Option(
        help="Store of vectors: sqlite:///path or memory://; by default DESHIFT_STORE or "
        "deshift.db in the cache directory.",
        metavar="URL",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

_WIDTH_WITHOUT_TERMINAL = 120


def settings_with(options: Mapping[str, Any]) -> Settings:
    """Settings from the environment; options that were given (not None) win."""
    given = {name: value for name, value in options.items() if value is not None}
    return Settings.from_env(os.environ, given)


@contextmanager
def opened_store(url: str) -> Iterator[Store]:
    store = open_store(url)
    try:
        yield store
    finally:
        store.close()


def console() -> Console:
    """For tables: as wide as the terminal, and wide enough for an id where there is none."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
