"""`deshift serve`: which settings reach the server."""

from pathlib import Path

import pytest

import server.demo.setup
import server.serve
from server.config import Settings
from tests.server.cli.conftest import Deshift


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that the server was started with; none starts."""
    settings: list[Settings] = []
    monkeypatch.setattr(server.serve, "serve", settings.append)
    return settings


def test_without_options_the_environment_decides(
    deshift: Deshift, served: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DESHIFT_ALPHA", "0.25")
    monkeypatch.setenv("DESHIFT_MAX_ROWS", "3")
    assert deshift("serve").exit_code == 0
    (settings,) = served
    assert (settings.alpha, settings.max_rows, settings.port) == (0.25, 3, 8000)


def test_options_override_the_environment_and_zero_is_a_value(
    deshift: Deshift, served: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DESHIFT_ALPHA", "0.25")
    monkeypatch.setenv("DESHIFT_MAX_ROWS", "3")
    assert deshift("serve", "--alpha", "0", "--port", "0").exit_code == 0
    (settings,) = served
    assert (settings.alpha, settings.max_rows, settings.port) == (0.0, 3, 0)


def test_every_option_reaches_its_setting(deshift: Deshift, served: list[Settings]) -> None:
    options: dict[str, str | int | float] = {
        "model": "some/model",
        "revision": "abc",
        "served_model_name": "name",
        "dtype": "float32",
        "device": "cpu",
        "host": "::1",
        "port": 9,
        "max_model_len": 128,
        "max_rows": 2,
        "store": "memory://",
        "vector_alias": "mine",
        "steering_mode": "off",
        "alpha": 0.5,
        "schedule": "single:1",
        "client_override": "strengthen",
    }
    words = [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    result = deshift("serve", *words)
    assert result.exit_code == 0, result.stderr
    assert {name: getattr(served[0], name) for name in options} == options


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--alpha", "-1"), "DESHIFT_ALPHA"),
        (("--schedule", "some"), "DESHIFT_SCHEDULE"),
        (("--client-override", "maybe"), "DESHIFT_CLIENT_OVERRIDE"),
        (("--host", "0.0.0.0"), "DESHIFT_API_KEY"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_and_nothing_is_served(
    deshift: Deshift, served: list[Settings], arguments: tuple[str, ...], said: str
) -> None:
    result = deshift("serve", *arguments)
    assert (result.exit_code, result.stdout, served) == (1, "", [])
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_a_misspelt_option_is_a_usage_error(deshift: Deshift, served: list[Settings]) -> None:
    assert deshift("serve", "--alhpa", "1").exit_code == 2
    assert served == []


@pytest.fixture
def assembled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the demonstration model would be; nothing is downloaded."""
    monkeypatch.setenv("DESHIFT_CACHE", str(tmp_path))
    monkeypatch.setattr(server.demo.setup, "assemble", lambda directory: directory)
    return tmp_path / "demo-model"


@pytest.mark.parametrize("unset", [None, ""])
def test_or_demo_without_a_model_serves_the_demonstration_at_its_own_strength(
    deshift: Deshift,
    served: list[Settings],
    assembled: Path,
    monkeypatch: pytest.MonkeyPatch,
    unset: str | None,
) -> None:
    """Empty is unset: compose files pass a variable on so."""
    if unset is not None:
        monkeypatch.setenv("DESHIFT_MODEL", unset)
    result = deshift("serve", "--or-demo", "--max-rows", "3")
    assert result.exit_code == 0, result.stderr
    chosen = server.demo.setup.recommended()
    (settings,) = served
    assert settings.model == str(assembled)
    assert (settings.alpha, settings.schedule) == (chosen.alpha, chosen.schedule)
    assert (settings.vector_alias, settings.max_rows) == ("demo", 3)


def test_or_demo_leaves_what_was_decided(
    deshift: Deshift, served: list[Settings], assembled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DESHIFT_ALPHA", "0.05")
    assert deshift("serve", "--or-demo", "--vector-alias", "mine").exit_code == 0
    assert deshift("serve", "--or-demo", "--model", "some/model").exit_code == 0
    demonstration, other = served
    assert (demonstration.alpha, demonstration.vector_alias) == (0.05, "mine")
    assert demonstration.model == str(assembled)
    assert (other.model, other.vector_alias) == ("some/model", "default")
