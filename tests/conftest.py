"""Fixtures that both packages' tests share: tiny models, Redis, a clean environment."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.redis_server import RedisServer

if TYPE_CHECKING:  # it takes seconds, also of a process that only shares the tests out
    from tests.tiny_models import TinyModel

# Tiny models are no faster with several threads, and files of tests run beside each other.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start

# Modules beside the tests whose asserts show what they compared, as those of the tests do.
pytest.register_assert_rewrite(
    *(f"tests.server.engine.{name}" for name in ("beyond", "prefixes", "under_test"))
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No DESHIFT_ variable of the caller's reaches a test, and no hub is asked."""
    for name in [name for name in os.environ if name.startswith("DESHIFT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield


@pytest.fixture
def anyio_backend() -> str:
    """For tests with `@pytest.mark.anyio`."""
    return "asyncio"


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """Empty, and shared by the whole run: not to be stopped or paused."""
    shared_redis.flush()
    return shared_redis


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """This test's own, running; it may be killed, paused and started again."""
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def tiny_llava() -> "TinyModel":
    return _built("llava")


@pytest.fixture(scope="session")
def tiny_qwen2_vl() -> "TinyModel":
    return _built("qwen2_vl")


@pytest.fixture(scope="session")
def tiny_gemma3() -> "TinyModel":
    return _built("gemma3")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tiny_model" in metafunc.fixturenames:
        from tests.tiny_models import BUILDERS

        metafunc.parametrize("tiny_model", BUILDERS, indirect=True, scope="session")


@pytest.fixture(scope="session")
def tiny_model(request: pytest.FixtureRequest) -> "TinyModel":
    """Every supported family in turn, by pytest_generate_tests."""
    return _built(request.param)


@pytest.fixture(scope="session")
def unlisted_model() -> "TinyModel":
    """A family that is not listed; it may serve when it passes the check at start."""
    from tests.tiny_models import build_tiny_unlisted

    return build_tiny_unlisted()


@cache
def _built(name: str) -> "TinyModel":
    from tests.tiny_models import BUILDERS

    return BUILDERS[name]()
