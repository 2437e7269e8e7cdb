"""Settings: what is read from the environment, what is refused, and that its name is said."""

from pathlib import Path
from typing import Any

import pydantic
import pytest

from server.config import Settings
from server.errors import ConfigError


def test_defaults_are_a_loopback_server_that_steers_and_lets_a_newcomer_try_alpha() -> None:
    settings = Settings.from_env({})
    assert (settings.host, settings.port, settings.steering_mode) == ("127.0.0.1", 8000, "dataset")
    assert settings.client_override_in_force == "any"
    assert (settings.on_error, settings.corruption) == ("reject", "blank")
    assert (settings.prefix_cache_bytes, settings.vision_cache_bytes) == (2**29, 2**26)
    assert settings.decoder == "auto"


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_the_environment_is_read_by_name_and_flags_win() -> None:
    environ = {"DESHIFT_PORT": "9000", "DESHIFT_ALPHA": "0.25", "DESHIFT_CACHE": "/x", "PATH": "/"}
    settings = Settings.from_env(environ, {"alpha": 0.5})
    assert (settings.port, settings.alpha) == (9000, 0.5)
    assert settings.store_url == "sqlite:////x/deshift.db"


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"DESHIFT_PORT": "eighty"}, ["DESHIFT_PORT", "eighty"]),
        ({"DESHIFT_PORT": "70000"}, ["DESHIFT_PORT", "65535"]),
        ({"DESHIFT_ALPHA": "nan"}, ["DESHIFT_ALPHA"]),
        ({"DESHIFT_ALPHA": "3"}, ["DESHIFT_ALPHA 3", "DESHIFT_ALPHA_MAX 2"]),
        ({"DESHIFT_SCHEDULE": "range:5-2"}, ["DESHIFT_SCHEDULE", "range:5-2"]),
        ({"DESHIFT_CLIENT_OVERRIDE": "all"}, ["DESHIFT_CLIENT_OVERRIDE", "strengthen"]),
        ({"DESHIFT_CORRUPTION": "black"}, ["DESHIFT_CORRUPTION", "mean-colour"]),
        ({"DESHIFT_ON_ERROR": "ignore"}, ["DESHIFT_ON_ERROR", "serve-unsteered"]),
        ({"DESHIFT_DECODER": "fast"}, ["DESHIFT_DECODER", "fused"]),
        ({"DESHIFT_PREFIX_CACHE_BYTES": "-1"}, ["DESHIFT_PREFIX_CACHE_BYTES", "-1"]),
        ({"DESHIFT_APLHA": "1"}, ["DESHIFT_APLHA", "did you mean DESHIFT_ALPHA?"]),
        ({"DESHIFT_API_KEY": ""}, ["DESHIFT_API_KEY"]),
        ({"DESHIFT_API_KEY": "käse"}, ["DESHIFT_API_KEY", "ASCII"]),
    ],
)
def test_a_malformed_value_names_its_variable(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env(environ)
    for word in words:
        assert word in str(caught.value)


def test_a_refused_key_is_not_repeated_in_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({"DESHIFT_API_KEY": "my secret"})
    assert "secret" not in str(caught.value)


def test_one_key_for_clients_and_operators_is_refused() -> None:
    """It was taken, and every client could turn steering off."""
    key = "operators-secret-0"
    with pytest.raises(ConfigError, match="DESHIFT_API_KEY.*DESHIFT_ADMIN_KEYS") as caught:
        Settings(api_key=key, admin_keys=f"bo:{key}-more,ann:{key}")
    assert key not in str(caught.value)
    assert Settings(api_key=key, admin_keys=f"bo:{key}-more").api_key is not None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_without_a_key_only_loopback_is_listened_on(host: str) -> None:
    with pytest.raises(ConfigError, match="DESHIFT_API_KEY"):
        Settings(host=host)
    assert Settings(host=host, api_key="k").client_override_in_force == "none"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_key_and_with_one_overrides_are_refused(host: str) -> None:
    assert Settings(host=host).client_override_in_force == "any"
    assert Settings(host=host, api_key="k").client_override_in_force == "none"
    assert Settings(host=host, client_override="strengthen").client_override_in_force == (
        "strengthen"
    )


def test_settings_are_frozen_and_do_not_show_the_key() -> None:
    settings = Settings(api_key="topsecret")
    assert "topsecret" not in repr(settings)
    with pytest.raises(pydantic.ValidationError):
        settings.alpha = 0.0


@pytest.mark.parametrize("changes", [{"unknown": 1}, {"max_rows": 0}, {"steering_mode": "every"}])
def test_the_constructor_refuses_what_the_environment_may_not_hold(changes: Any) -> None:
    with pytest.raises(ConfigError, match=f"DESHIFT_{next(iter(changes)).upper()}"):
        Settings(**changes)


def test_the_home_directory_is_expanded() -> None:
    assert Settings(cache=Path("~/x")).cache == Path.home() / "x"


def test_a_budget_of_bodies_that_could_not_hold_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="DESHIFT_MAX_BODY_BYTES 2048 is over .* 1024"):
        Settings(max_body_bytes=2048, max_buffered_bytes=1024)
