"""Where vector sets and their aliases are kept: one protocol, `memory://` and `sqlite:///`."""

from pathlib import Path

from steering.errors import StoreError
from steering.stores.base import Store, VectorRecord
from steering.stores.memory import MemoryStore
from steering.stores.sqlite import SqliteStore

__all__ = ["MemoryStore", "SqliteStore", "Store", "VectorRecord", "open_store"]


def open_store(url: str) -> Store:
    """Open `memory://` or `sqlite:///relative` / `sqlite:////absolute`.

    Raises StoreError for another scheme or a file that cannot be opened.
    """
    if url == "memory://":
        return MemoryStore()
    if url.startswith("sqlite:///") and len(url) > len("sqlite:///"):
        return SqliteStore(Path(url.removeprefix("sqlite:///")).expanduser())
    raise StoreError(
        f"store {url!r} is not one of: sqlite:///path/to/file (sqlite:////absolute/path), memory://"
    )
