"""`deshift vectors`: what an operator reads and switches."""

import asyncio
import getpass
import json
import sqlite3
from pathlib import Path

import pytest
import torch

from steering.stores import opened_store
from steering.stores.base import AuditRecord
from steering.stores.base import aliases as aliases_of
from tests.redis_server import PASSWORDS, RedisServer
from tests.server.cli.conftest import Deshift
from tests.steering.samples import manifest, shift_vectors

ONE = shift_vectors(
    1,
    manifest=manifest(created_at="2026-05-06T07:08:09+00:00"),
    mean=torch.tensor([[3.0, 4.0], [0.0, 0.5], [6.0, 8.0]]).repeat_interleave(4, 1) / 2,
    hidden_norm=torch.tensor([10.0, 1.0, 40.0]),
    consistency=torch.tensor([0.75, -0.25, 1.0]),
)
TWO = shift_vectors(2)


@pytest.fixture
def filled(deshift: Deshift, tmp_path: Path) -> Deshift:
    """ONE is `default`, TWO has no alias."""
    for vectors, alias in ((ONE, ("--alias", "default")), (TWO, ())):
        vectors.save(tmp_path / "set.safetensors")
        assert deshift("vectors", "add", tmp_path / "set.safetensors", *alias).exit_code == 0
    return deshift


def in_cache(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/cache/deshift.db"


def aliases(url: str) -> dict[str, str]:
    async def read() -> dict[str, str]:
        async with opened_store(url) as store:
            return await aliases_of(store)

    return asyncio.run(read())


def audit(url: str) -> list[AuditRecord]:
    async def read() -> list[AuditRecord]:
        async with opened_store(url) as store:
            return await store.audit(100)

    return asyncio.run(read())


def test_an_empty_store_says_what_to_do(deshift: Deshift) -> None:
    result = deshift("vectors", "list")
    assert (result.exit_code, result.stdout) == (
        0,
        "no vector sets yet: deshift extract makes one\n",
    )
    assert json.loads(deshift("vectors", "list", "--json").stdout) == []


def test_the_list_shows_each_set_with_its_alias_model_and_anchors(filled: Deshift) -> None:
    lines = [line for line in filled("vectors", "list").stdout.splitlines() if "tiny" in line]
    first, second = ([cell.strip() for cell in line.split("│")[1:-1]] for line in lines)
    created = "2026-05-06T07:08:09+00:00"
    assert first == [
        *(ONE.id[:12], "default", "tiny", "blank", "few (4)", "3 x 8"),
        *(f"{len(ONE.to_bytes()) / 1024:.0f} KiB", created),
    ]
    assert second[:2] == [TWO.id[:12], ""]


def test_the_list_as_json_has_whole_ids_and_manifests(filled: Deshift) -> None:
    first, second = json.loads(filled("vectors", "list", "--json").stdout)
    assert (first["id"], first["aliases"]) == (ONE.id, ["default"])
    assert (second["id"], second["aliases"]) == (TWO.id, [])
    assert first["manifest"] == ONE.manifest.as_dict()
    assert first["size_bytes"] == len(ONE.to_bytes())


@pytest.mark.parametrize("name", ["default", ONE.id, ONE.id[:8]])
def test_show_prints_provenance_and_the_shift_of_each_layer(filled: Deshift, name: str) -> None:
    result = filled("vectors", "show", name)
    assert result.exit_code == 0
    for said in (ONE.id, "a" * 64, "b" * 64, "c" * 64, "d" * 64, "blank, 336x336", "torch 2"):
        assert said in result.stdout
    assert "basis, refusal_direction, text_mean" in result.stdout
    rows = [line.split("│")[1:-1] for line in result.stdout.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["0", "5.000", "10.000", "0.5000", "0.750"],
        ["1", "0.500", "1.000", "0.5000", "-0.250"],
        ["2", "10.000", "40.000", "0.2500", "1.000"],
    ]


def test_show_as_json_has_the_same_numbers(filled: Deshift) -> None:
    answer = json.loads(filled("vectors", "show", "default", "--json").stdout)
    assert (answer["id"], answer["aliases"]) == (ONE.id, ["default"])
    assert answer["manifest"] == ONE.manifest.as_dict()
    assert answer["layers"][2] == {
        "layer": 2,
        "delta_norm": 10.0,
        "hidden_norm": 40.0,
        "relative_shift": 0.25,
        "consistency": 1.0,
    }


def test_activate_moves_the_alias_and_says_what_it_was(filled: Deshift, tmp_path: Path) -> None:
    result = filled("vectors", "activate", TWO.id[:12])
    assert result.stdout == f"alias default points to {TWO.id}, was {ONE.id}\n"
    assert aliases(in_cache(tmp_path)) == {"default": TWO.id}
    filled("vectors", "activate", ONE.id, "--alias", "spare")
    assert aliases(in_cache(tmp_path)) == {"default": TWO.id, "spare": ONE.id}


def test_changes_go_to_the_store_that_operators_may_write(
    filled: Deshift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They went by the servers' credentials, which may only read, unlike every other command's."""
    monkeypatch.setenv("DESHIFT_ADMIN_STORE", in_cache(tmp_path))
    monkeypatch.setenv("DESHIFT_STORE", f"sqlite:///{tmp_path}/readers.db")
    assert filled("vectors", "activate", TWO.id).exit_code == 0
    assert filled("vectors", "add", tmp_path / "set.safetensors", "--alias", "b").exit_code == 0
    assert aliases(in_cache(tmp_path)) == {"default": TWO.id, "b": TWO.id}
    other = f"sqlite:///{tmp_path}/other.db"
    assert filled("vectors", "add", tmp_path / "set.safetensors", "--store", other).exit_code == 0


def test_activating_an_unknown_or_damaged_set_leaves_the_last_good_one(
    filled: Deshift, tmp_path: Path
) -> None:
    unknown = filled("vectors", "activate", "nothing")
    assert (unknown.exit_code, unknown.stdout) == (1, "")
    assert unknown.stderr.startswith("deshift: 'nothing' is neither an alias nor a vector set")
    connection = sqlite3.connect(tmp_path / "cache" / "deshift.db")
    connection.execute("update vectors set data = x'00' where id = ?", (TWO.id,))
    connection.commit()
    connection.close()
    damaged = filled("vectors", "activate", TWO.id)
    assert (damaged.exit_code, TWO.id[:12] in damaged.stderr) == (1, True)
    assert aliases(in_cache(tmp_path)) == {"default": ONE.id}


def test_every_move_of_an_alias_is_in_the_audit_with_person_and_reason(
    filled: Deshift, tmp_path: Path
) -> None:
    filled("vectors", "activate", TWO.id, "--reason", "ONE babbles")
    newest, first = (json.loads(record.entry) for record in audit(in_cache(tmp_path)))
    assert (newest["by"], newest["reason"]) == (getpass.getuser(), "ONE babbles")
    assert newest["changes"] == [
        {"key": "alias/default", "before": {"vector": ONE.id}, "after": {"vector": TWO.id}}
    ]
    assert (first["by"], first["reason"]) == (getpass.getuser(), "activated by command line")
    assert filled("vectors", "activate", ONE.id, "--reason", " ").exit_code == 1


def test_push_copies_a_set_to_another_store_byte_for_byte(
    filled: Deshift, tmp_path: Path, redis_server: RedisServer
) -> None:
    url = redis_server.url()
    result = filled("vectors", "push", "default", "--to", url, "--alias", "live")
    shown = f"redis://127.0.0.1:{redis_server.port}/0"
    assert result.stdout == f"vector set {ONE.id} is in {shown}\nalias live points to it\n"
    assert PASSWORDS["deshift-operator"] not in result.stdout + result.stderr
    assert aliases(url) == {"live": ONE.id}
    back = f"sqlite:///{tmp_path}/other.db"
    result = filled("vectors", "push", "live", "--store", url, "--to", back)
    assert result.stdout == f"vector set {ONE.id} is in {back}\n"
    listed = json.loads(filled("vectors", "list", "--store", back, "--json").stdout)
    assert [(each["id"], each["aliases"]) for each in listed] == [(ONE.id, [])]


def test_a_push_with_credentials_that_may_only_read_says_so_in_one_line(
    filled: Deshift, redis_server: RedisServer
) -> None:
    result = filled("vectors", "push", "default", "--to", redis_server.url("deshift-server"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"127.0.0.1:{redis_server.port}" in result.stderr and "permission" in result.stderr
    assert PASSWORDS["deshift-server"] not in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_damaged_set_is_not_pushed(filled: Deshift, tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "cache" / "deshift.db")
    connection.execute("update vectors set data = x'00' where id = ?", (ONE.id,))
    connection.commit()
    connection.close()
    other = f"sqlite:///{tmp_path}/other.db"
    result = filled("vectors", "push", "default", "--to", other)
    assert (result.exit_code, ONE.id[:12] in result.stderr) == (1, True)
    assert json.loads(filled("vectors", "list", "--store", other, "--json").stdout) == []


def test_adding_a_damaged_file_is_refused_with_its_path(deshift: Deshift, tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    path.write_bytes(ONE.to_bytes()[:-1])
    result = deshift("vectors", "add", path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert str(path) in result.stderr and result.stderr.count("\n") == 1


def test_a_damaged_store_is_one_line_with_its_path(deshift: Deshift, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "deshift.db").write_bytes(b"not a database, " * 100)
    for command in (("list",), ("show", "default"), ("activate", "default")):
        result = deshift("vectors", *command)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "deshift.db: file is not a database" in result.stderr
        assert result.stderr.count("\n") == 1
