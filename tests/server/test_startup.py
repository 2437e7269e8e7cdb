"""Starts that fail: each says why in one line, before a model is loaded where that is possible."""

from typing import Any

import pytest

from server.engine.types import EngineError
from server.errors import ServerError, StartupError
from server.serve import admin_socket, listening_socket, serve
from steering.errors import SteeringError
from steering.stores import MemoryStore
from tests.server.conftest import make_settings
from tests.server.fakes import FakeEngine


def test_a_taken_port_is_named_before_a_model_is_loaded() -> None:
    with listening_socket(make_settings()) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"127.0.0.1:{port}.*--port"):
            listening_socket(make_settings(port=port))


def test_a_taken_admin_port_is_named_before_a_model_is_loaded() -> None:
    with admin_socket(make_settings(admin_port=0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"127.0.0.1:{port}.*DESHIFT_ADMIN_PORT"):
            serve(make_settings(admin_port=port, model="./none"))


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(StartupError, match="no.such.host.invalid:0"):
        listening_socket(make_settings(host="no.such.host.invalid", api_key="k"))


@pytest.mark.parametrize(
    ("changes", "word"),
    [({}, "DESHIFT_MODEL"), ({"model": "./none"}, "./none"), ({"store": "ftp://x"}, "ftp://x")],
)
def test_startup_failures_are_one_line(changes: dict[str, Any], word: str) -> None:
    with pytest.raises((ServerError, SteeringError), match=word) as caught:
        serve(make_settings(admin_port=0, **changes))
    assert "\n" not in str(caught.value)


def test_an_engine_that_does_not_start_stops_the_server(
    fake_engine: FakeEngine, store: MemoryStore
) -> None:
    """The canary's message must come out as it is, not as a traceback in uvicorn's log."""
    import asyncio

    from server.app import create_app
    from server.serve import run

    fake_engine.start_error = EngineError("the canary failed at layer 3")
    app = create_app(make_settings(), engine=fake_engine, store=store)
    with (
        listening_socket(make_settings()) as sock,
        admin_socket(make_settings(admin_port=0)) as admin_sock,
        pytest.raises(EngineError, match="canary failed at layer 3"),
    ):
        asyncio.run(run(app, sock, admin_sock))
    assert fake_engine.state == "stopped"


def test_no_model_is_a_clear_error() -> None:
    from server.app import build_engine

    with pytest.raises(ServerError, match="--model"):
        build_engine(make_settings())
