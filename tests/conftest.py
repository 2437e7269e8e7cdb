"""Fixtures that both packages' tests share: tiny models and an environment without settings."""

import os
from collections.abc import Iterator

import pytest

from tests.tiny_models import TinyModel, build_tiny_llava, build_tiny_qwen2_vl


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No DESHIFT_ variable of the caller's reaches a test, and no hub is asked."""
    for name in [name for name in os.environ if name.startswith("DESHIFT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield


@pytest.fixture(scope="session")
def tiny_llava() -> TinyModel:
    return build_tiny_llava()


@pytest.fixture(scope="session")
def tiny_qwen2_vl() -> TinyModel:
    return build_tiny_qwen2_vl()


@pytest.fixture(scope="session", params=["llava", "qwen2_vl"])
def tiny_model(request: pytest.FixtureRequest) -> TinyModel:
    """Every supported family in turn; the conformance suite runs on it."""
    return request.getfixturevalue(f"tiny_{request.param}")
