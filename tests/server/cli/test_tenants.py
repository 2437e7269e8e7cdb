"""`deshift tenants`: made, seen, deleted, brought back."""

import asyncio
import json
from pathlib import Path

import pytest

from steering.stores import open_store
from tests.server.cli.conftest import Deshift
from tests.server.cli.tables import cells

WHY = ("--reason", "for the test")


@pytest.fixture
def acme(deshift: Deshift) -> Deshift:
    result = deshift("tenants", "create", "acme", "--alpha", 0.8, *WHY)
    assert result.exit_code == 0, result.stderr
    return deshift


def test_an_empty_store_says_what_to_do(deshift: Deshift) -> None:
    result = deshift("tenants", "list")
    assert (result.exit_code, result.stdout) == (
        0,
        "no tenants yet: deshift tenants create makes one\n",
    )
    assert json.loads(deshift("tenants", "list", "--json").stdout) == {
        "revision": 0,
        "kill": "none",
        "tenants": [],
        "unreadable": {},
    }


def test_the_list_shows_what_is_in_force_and_how_many_keys_are_good(acme: Deshift) -> None:
    assert acme("tenants", "create", "b.c", "--mode", "sample", *WHY).exit_code == 0
    for name in ("one", "two"):
        assert acme("keys", "create", "acme", name, *WHY).exit_code == 0
    assert acme("keys", "revoke", "acme", "one", *WHY).exit_code == 0
    assert cells(acme("tenants", "list").stdout) == [
        ["acme", "dataset", "0.8", "", "none", "reject", "1", "1"],
        ["b.c", "sample", "1", "", "none", "reject", "0", "2"],
    ]


def test_the_list_says_that_the_kill_switch_is_on(acme: Deshift) -> None:
    assert acme("tenants", "list").stderr == ""
    assert acme("kill", "reject", *WHY).exit_code == 0
    assert "the kill switch is on: reject" in acme("tenants", "list").stderr


def test_show_has_the_policy_and_the_keys(acme: Deshift) -> None:
    assert acme("tenants", "show", "acme").stdout.endswith("no keys\n")
    assert acme("keys", "create", "acme", "main", *WHY).exit_code == 0
    rows = cells(acme("tenants", "show", "acme").stdout)
    assert ["alpha", "0.8"] in rows and ["requests_per_minute", "none"] in rows
    assert [row[0] for row in rows if len(row) == 4] == ["main"]
    told = json.loads(acme("tenants", "show", "acme", "--json").stdout)
    assert (told["tenant"], told["revision"], told["until"]) == ("acme", 1, None)
    assert told["policy"]["alpha"] == 0.8
    assert [(key["id"], key["is_valid"]) for key in told["keys"]] == [("main", True)]
    assert "digest" not in told["keys"][0]


def test_a_deleted_tenant_and_its_keys_come_back_by_a_revert(acme: Deshift) -> None:
    assert acme("keys", "create", "acme", "main", *WHY).exit_code == 0
    deleted = acme("tenants", "delete", "acme", *WHY, "--json")
    assert json.loads(deleted.stdout) == {"tenant": "acme", "revision": 3}
    gone = acme("tenants", "show", "acme")
    assert (gone.exit_code, gone.stderr) == (1, "deshift: there is no tenant 'acme'\n")
    assert acme("audit", "revert", 3, *WHY).exit_code == 0
    told = json.loads(acme("tenants", "show", "acme", "--json").stdout)
    assert told["policy"]["alpha"] == 0.8 and [key["id"] for key in told["keys"]] == ["main"]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("create", "acme", *WHY), 1, "there is a tenant 'acme' already"),
        (("create", "<script>", *WHY), 1, "'<script>' is not a name"),
        (("create", "b", "--alpha", "3", *WHY), 1, "alpha 3 is over alpha_max 2"),
        (("create", "b", "--schedule", "some", *WHY), 1, "schedule 'some' is not one of"),
        (("create", "b", "--reason", " "), 1, "a change needs a reason"),
        (("create", "b", "--reason", "two\nlines"), 1, "one line"),
        (("create", "b"), 2, "--reason"),
        (("delete", "acme"), 2, "--reason"),
        (("delete", "acme", "--revision", "7", *WHY), 1, "at revision 1, not 7"),
        (("delete", "b", *WHY), 1, "there is no tenant 'b'"),
        (("list", "--store", "mysql://x"), 1, "mysql"),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(
    acme: Deshift, arguments: tuple[str, ...], exit_code: int, said: str
) -> None:
    result = acme("tenants", *arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert said in result.stderr
    if exit_code == 1:
        assert result.stderr.count("\n") == 1
    told = json.loads(acme("tenants", "list", "--json").stdout)
    assert (told["revision"], len(told["tenants"])) == (1, 1)


def test_the_store_with_rights_to_write_is_taken_before_the_servers(
    deshift: Deshift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [f"sqlite:///{tmp_path}/{name}.db" for name in ("served", "admin", "named")]
    monkeypatch.setenv("DESHIFT_STORE", urls[0])
    assert deshift("tenants", "create", "a", *WHY).exit_code == 0
    monkeypatch.setenv("DESHIFT_ADMIN_STORE", urls[1])
    assert deshift("tenants", "create", "b", *WHY).exit_code == 0
    assert deshift("tenants", "create", "c", *WHY, "--store", urls[2]).exit_code == 0
    for url, name in zip(urls, "abc", strict=True):
        told = json.loads(deshift("tenants", "list", "--json", "--store", url).stdout)
        assert [each["tenant"] for each in told["tenants"]] == [name]


def test_a_damaged_document_hides_no_other_tenant(acme: Deshift, tmp_path: Path) -> None:
    async def damage() -> None:
        store = open_store(f"sqlite:///{tmp_path}/cache/deshift.db")
        await store.commit({"tenant/bad": '{"policy":{"alpha":-1}}'}, {}, "{}")
        await store.close()

    asyncio.run(damage())
    result = acme("tenants", "list")
    assert [row[0] for row in cells(result.stdout)] == ["acme"]
    assert "'tenant/bad' cannot be read: policy.alpha" in result.stderr
    told = json.loads(acme("tenants", "list", "--json").stdout)
    assert list(told["unreadable"]) == ["tenant/bad"]
    assert acme("tenants", "show", "bad").exit_code == 1
