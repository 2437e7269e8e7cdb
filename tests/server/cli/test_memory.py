"""The server's process is started again once, with huge pages."""

import os
import platform
import sys
from typing import Any

import pytest

from server.cli import main
from server.cli.memory import TUNABLE, with_huge_pages


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Commands that this process would have been replaced by."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that it is put back afterwards
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(os, "execv", lambda *call: calls.append(call))
    monkeypatch.setattr(main, "app", lambda: None)
    return calls


def test_serve_is_started_again_as_it_was_called(
    replaced: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["deshift", "serve", "--port", "0"])
    main.run()
    assert replaced == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]
    assert os.environ["GLIBC_TUNABLES"] == TUNABLE
    main.run()
    assert len(replaced) == 1, "once"


def test_other_commands_and_other_c_libraries_are_left_alone(
    replaced: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["deshift", "vectors", "list"])
    main.run()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with_huge_pages()
    assert replaced == []


def test_a_setting_of_the_operators_own_stays(
    replaced: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=3")
    with_huge_pages()
    assert replaced == [] and os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=3"
