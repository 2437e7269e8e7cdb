"""The Dockerfile: hadolint's findings, and what it promises. No image is built here."""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.deploy.validators import ROOT, validator

TEXT = (ROOT / "Dockerfile").read_text()
# Continued lines as one, comments out.
LINES = [
    line
    for line in re.sub(r"\\\n", " ", TEXT).splitlines()
    if line.strip() and not line.startswith("#")
]
FINAL = LINES[max(i for i, line in enumerate(LINES) if line.startswith("FROM ")) :]


def instruction(name: str, lines: list[str] = FINAL) -> list[str]:
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


def health_command() -> list[str]:
    """What HEALTHCHECK runs."""
    (check,) = instruction("HEALTHCHECK")
    return list(json.loads(check.split(" CMD ", 1)[1]))


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [validator("hadolint"), "--no-color", "Dockerfile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_both_stages_come_from_one_base_that_is_pinned_by_digest() -> None:
    (base,) = [line for line in LINES[:1] if line.startswith("ARG PYTHON_IMAGE=")]
    assert re.search(r"=python:3\.11\.\d+-slim-\w+@sha256:[0-9a-f]{64}$", base)
    assert instruction("FROM", LINES) == ["${PYTHON_IMAGE} AS build", "${PYTHON_IMAGE}"]


def test_it_runs_as_nobody_in_particular_with_a_volume_for_all_it_writes() -> None:
    (user,) = instruction("USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    assert instruction("VOLUME") == instruction("WORKDIR") == ["/var/lib/deshift"]
    variables = dict(word.split("=", 1) for word in instruction("ENV")[0].split())
    for name in ("DESHIFT_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        assert variables[name].startswith("/var/lib/deshift"), name


def test_the_server_is_the_process_that_signals_reach() -> None:
    assert instruction("STOPSIGNAL") == ["SIGTERM"]
    assert json.loads(instruction("ENTRYPOINT")[0]) == ["deshift"]
    assert json.loads(instruction("CMD")[0]) == ["serve", "--or-demo"]


def test_no_secret_can_be_left_in_a_layer() -> None:
    named = re.findall(r"^(?:ARG|ENV) +(\w+)|(\w+)=", "\n".join(LINES), re.M)
    names = {one or other for one, other in named}
    assert {"TORCH_INDEX", "DESHIFT_HOST"} <= names  # the expression does find names
    assert not [name for name in names if re.search("KEY|TOKEN|SECRET|PASS", name)]


def test_every_installation_takes_the_pinned_versions() -> None:
    installs = re.findall(r"pip install ([^&\n]+)", "\n".join(LINES))
    assert len(installs) == 3
    for words in installs:
        assert "--constraint deploy/constraints.txt" in words or "--no-deps --no-build" in words


def test_it_names_the_projects_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"VERSION={project['version']}" in instruction("ARG")
    compose = (ROOT / "docker-compose.yml").read_text()
    assert f"image: deshift:{project['version']}\n" in compose


def test_the_step_that_lists_the_dependencies_lists_them() -> None:
    (code,) = re.findall(r'python -c "(import tomllib.*?)" >', TEXT)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert done.stdout.splitlines() == project["dependencies"]


def _ignored(path: str) -> bool:
    """By .dockerignore, whose last matching line decides; folders stand for what is in them."""
    parts = path.split("/")
    heads = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    is_ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        name = pattern.removeprefix("**/")
        found = parts if name != pattern else heads
        if any(fnmatch.fnmatchcase(head, name) for head in found):
            is_ignored = not line.startswith("!")
    return is_ignored


def test_nothing_private_is_sent_to_the_build() -> None:
    for path in (".env", "deploy/server.env", ".git/config", ".venv/x", "server/__pycache__/a.pyc"):
        assert _ignored(path), path
    for path in ("server/app.py", "steering/data/anchors.jsonl", "deploy/constraints.txt"):
        assert not _ignored(path), path


@pytest.mark.slow
def test_what_is_copied_is_enough_to_build_the_wheel(tmp_path: Path) -> None:
    """The build stage's COPY instructions, then its last installation as a wheel."""
    source = tmp_path / "source"
    build = LINES[: LINES.index(FINAL[0], 2)]
    for copied in instruction("COPY", build):
        *names, target = copied.split()
        for name in names:
            assert not _ignored(name), name
            here, there = ROOT / name, source / (target if len(names) == 1 else name)
            there.parent.mkdir(parents=True, exist_ok=True)
            if here.is_dir():
                shutil.copytree(here, there, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(here, there)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(tmp_path), str(source)],
        check=True,
    )
    (wheel,) = tmp_path.glob("deshift-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"server/app.py", "steering/demo/weights.safetensors"} <= names
