"""Where vector sets and documents are kept: one protocol; in memory, a SQLite file or Redis."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from steering.errors import StoreError
from steering.stores.base import Store, VectorRecord
from steering.stores.memory import MemoryStore
from steering.stores.redis import RedisStore
from steering.stores.redis_url import without_credentials
from steering.stores.sqlite import SqliteStore

__all__ = [
    "MemoryStore",
    "RedisStore",
    "SqliteStore",
    "Store",
    "VectorRecord",
    "open_store",
    "opened_store",
    "without_credentials",
]

_REDIS_SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel")


def open_store(url: str) -> Store:
    """Open `memory://`, `sqlite:///relative` / `sqlite:////absolute`, or Redis (redis_url.py has
    the forms); with Redis, no connection is made yet.

    Raises StoreError for another scheme, a Redis URL that cannot be read, or a file that cannot
    be opened. No message holds a password.
    """
    scheme, separator, rest = url.partition("://")
    if url == "memory://":
        return MemoryStore()
    if scheme == "sqlite" and rest.startswith("/") and len(rest) > 1:
        return SqliteStore(Path(rest[1:]).expanduser())
    if separator and scheme in _REDIS_SCHEMES:
        return RedisStore(url)
    raise StoreError(
        f"store {without_credentials(url)!r} is not one of: sqlite:///path/to/file "
        "(sqlite:////absolute/path), redis://user:password@host:port/db (rediss:// for TLS), "
        "redis+sentinel://host:port,host2:port/service, memory://"
    )


@asynccontextmanager
async def opened_store(url: str) -> AsyncIterator[Store]:
    """A store that is closed at the end. Raises as `open_store` does."""
    store = open_store(url)
    try:
        yield store
    finally:
        await store.close()
