"""Every kind of store in turn, opened once or several times on the same data."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from steering.errors import StoreError
from steering.stores import RedisStore, Store, open_store
from tests.redis_server import PASSWORDS

Open = Callable[[str], RedisStore]


class Opener:
    """Opens a store's data again and again, as several processes would."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._opened: list[Store] = []

    def __call__(self) -> Store:
        if self._url == "memory://" and self._opened:
            return self._opened[0]  # nobody else can reach this process's memory
        self._opened.append(open_store(self._url))
        return self._opened[-1]

    async def close(self) -> None:
        for store in self._opened:
            await store.close()


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def opener(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Opener]:
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").url()
    else:
        url = {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/a/b/store.db"}[request.param]
    opener = Opener(url)
    yield opener
    await opener.close()


@pytest.fixture
def store(opener: Opener) -> Store:
    return opener()


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Open a store by its URL; it is closed at the end."""
    stores: list[RedisStore] = []

    def open_(url: str) -> RedisStore:
        stores.append(RedisStore(url))
        return stores[-1]

    yield open_
    for store in stores:
        await store.close()


async def failure(what: Awaitable[object], within_s: float = 2.6) -> StoreError:
    """The StoreError that something ends in, soon enough."""
    started = time.monotonic()
    with pytest.raises(StoreError) as caught:
        await what
    assert time.monotonic() - started < within_s
    for password in PASSWORDS.values():
        assert password not in str(caught.value)
    return caught.value
