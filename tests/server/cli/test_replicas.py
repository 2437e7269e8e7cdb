"""`deshift replicas`: heartbeats as they are, whatever they hold."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steering.stores import open_store
from tests.server.cli.conftest import Deshift
from tests.server.cli.tables import cells

Beat = Callable[[str, str], None]
BEAT: dict[str, Any] = {
    "replica": "gpu-a",
    "revision": 2,
    "age_s": 0.25,
    "store": "ok",
    "problem": None,
    "kill": "none",
    "local_kill": "none",
    "vectors": {"default": "3f" * 32},
    "problems": [],
    "running": 3,
    "waiting": 0,
}


@pytest.fixture
def beat(deshift: Deshift, tmp_path: Path) -> Beat:
    """Write a heartbeat, by name and text, into a store at revision 2."""
    for name in ("a", "b"):
        assert deshift("tenants", "create", name, "--reason", "test").exit_code == 0

    def write(name: str, text: str) -> None:
        async def written() -> None:
            store = open_store(f"sqlite:///{tmp_path}/cache/deshift.db")
            await store.heartbeat(name, text, 60.0)
            await store.close()

        asyncio.run(written())

    return write


def test_without_replicas_it_says_so(deshift: Deshift) -> None:
    assert deshift("replicas").stdout == "no replica has told this store of itself lately\n"
    assert json.loads(deshift("replicas", "--json").stdout) == {
        "revision": 0,
        "epoch": "",
        "replicas": [],
    }


def test_a_replica_that_is_behind_or_has_a_switch_of_its_own_stands_out(
    deshift: Deshift, beat: Beat
) -> None:
    beat("gpu-a", json.dumps(BEAT))
    late = {"revision": 1, "age_s": 300, "store": "unreachable", "problem": "timed out"}
    late |= {"local_kill": "reject", "problems": ["a tenant is damaged"], "num_problems": 3}
    beat("gpu-b", json.dumps(BEAT | late))
    beat("gpu-c", json.dumps(BEAT | {"epoch": "another"}))
    result = deshift("replicas")
    vectors = "default 3f3f3f3f"
    assert cells(result.stdout) == [
        ["gpu-a", "2", "0", "0.25 s", "ok", "none", vectors],
        ["gpu-b", "1", "1", "5 min", "unreachable", "none", vectors],
        ["", "", "", "", "", "here: reject", ""],
        ["gpu-c", "2", "other data", "0.25 s", "ok", "none", vectors],
    ]
    assert result.stdout.splitlines()[-4:] == [
        "the store is at revision 2",
        "gpu-b: timed out",
        "gpu-b: a tenant is damaged",
        "gpu-b: and 2 more",
    ]


def test_the_fleet_as_json_keeps_every_field(deshift: Deshift, beat: Beat) -> None:
    beat("gpu-a", json.dumps(BEAT | {"later": [1]}))
    told = json.loads(deshift("replicas", "--json").stdout)
    assert told["revision"] == 2 and told["epoch"]
    assert told["replicas"] == [BEAT | {"later": [1], "behind": 0}]


@pytest.mark.parametrize("text", ["[1", "[1]", "null", "{}", '{"vectors": 3, "problems": "x"}'])
def test_a_heartbeat_of_another_version_is_shown_as_far_as_it_goes(
    deshift: Deshift, beat: Beat, text: str
) -> None:
    beat("odd", text)
    result = deshift("replicas")
    assert result.exit_code == 0, result.stderr
    assert cells(result.stdout) == [["odd", *"??????"]]
    assert json.loads(deshift("replicas", "--json").stdout)["replicas"][0]["behind"] is None
