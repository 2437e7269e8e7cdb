"""The validators of the `dev` extra, and what docker-compose.yml comes to with secrets given."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SECRETS = {
    "DESHIFT_API_KEY": "client-key-77aa01",
    "DESHIFT_ADMIN_KEYS": "alice:operator-key-53c1f0",
    "REDIS_SERVER_PASSWORD": "server-password-9f2c",
    "REDIS_OPERATOR_PASSWORD": "operator-password-71ab",
    "GRAFANA_ADMIN_PASSWORD": "grafana-password-2e8d",
}


def validator(name: str) -> str:
    """Where the program lies that pip installed; the test is skipped where there is none."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        pytest.skip(f"{name} is not installed: its wheel is not made for this machine")
    return str(path)


def run_compose(
    *arguments: str, files: tuple[str, ...] = ("docker-compose.yml",), **environment: str
) -> subprocess.CompletedProcess[str]:
    """docker-compose with this environment alone, whatever a .env of the checkout says."""
    chosen = [word for name in files for word in ("-f", name)]
    return subprocess.run(
        [validator("docker-compose"), "--env-file", os.devnull, *chosen, *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def compose_config(
    *, files: tuple[str, ...] = ("docker-compose.yml",), **environment: str
) -> dict[str, Any]:
    """The file as compose reads it, with SECRETS."""
    done = run_compose("config", "--format", "json", files=files, **(SECRETS | environment))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warning of a variable that is not set
    return dict(json.loads(done.stdout))


def unescaped(words: list[str]) -> list[str]:
    """Words of a command in compose's output, where a dollar is written twice."""
    return [word.replace("$$", "$") for word in words]
