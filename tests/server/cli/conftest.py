"""A checkpoint, a few anchors and the command in this process, with its own store."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli.main import app
from tests.tiny_models import build_tiny_llava

Deshift = Callable[..., Result]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava().save(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture
def anchors(tmp_path: Path) -> Path:
    rows = [
        {"label": label, "text": f"{label} {number}"}
        for number in range(2)
        for label in ("harmful", "harmless")
    ]
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def deshift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deshift:
    """Run the command with its cache, and so its store, in `tmp_path`."""
    monkeypatch.setenv("DESHIFT_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run
