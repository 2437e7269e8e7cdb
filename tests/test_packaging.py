"""What is shipped and how it is set up: pins, package data, the Makefile's messages."""

import hashlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "deploy/constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_pin_is_exact_and_every_direct_dependency_has_one() -> None:
    assert all(re.fullmatch(r"[\w.]+", pin) for pin in PINS.values())
    pinned = {normalised(name) for name in PINS}
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + [r for group in extras.values() for r in group]
    for requirement in wanted:
        name = re.split(r"[\[><=~!; ]", requirement)[0]
        assert normalised(name) in pinned, f"{name} has no pin in deploy/constraints.txt"
    assert next(iter(PINS)) == "torch"


def test_what_is_installed_is_what_is_pinned() -> None:
    for name, pin in PINS.items():
        try:
            installed = version(name).split("+")[0]
        except PackageNotFoundError:
            continue  # needed on another system only
        assert installed == pin, f"{name}: run `make setup`"


def test_no_package_index_is_named_anywhere() -> None:
    for path in ("pyproject.toml", "Makefile", "deploy/constraints.txt", ".ci/run"):
        text = (ROOT / path).read_text()
        assert not re.search(r"https?://|index-url|find-links", text), path


def test_the_photograph_is_the_one_that_its_licence_note_describes() -> None:
    content = (ROOT / "server/demo/photo.jpg").read_bytes()
    note = (ROOT / "server/demo/photo.txt").read_text()
    assert len(content) < 100_000
    assert hashlib.sha256(content).hexdigest() in note
    assert "CC0" in note


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("exit 1", "Deshift needs Python 3.11 or newer"),
        ("case $2 in *venv*) exit 1;; esac", "has no venv module"),
    ],
)
def test_make_says_what_is_wrong_with_the_python_it_got(
    tmp_path: Path, python: str, message: str
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{python}\n")
    fake.chmod(0o755)
    done = subprocess.run(
        ["make", "demo", f"PYTHON={fake}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_wheel_holds_all_data_and_no_tests(tmp_path: Path) -> None:
    """Built from a copy of what git tracks, so that leftovers of the work tree do not help it."""
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    for name in tracked:
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(tmp_path), str(source)],
        check=True,
    )
    [wheel] = tmp_path.glob("deshift-*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    expected = {name for name in tracked if name.split("/")[0] in ("server", "steering")}
    assert {name for name in expected if (ROOT / name).is_file()} <= shipped
    outside = {name for name in shipped - expected if ".dist-info/" not in name}
    assert not outside, outside
