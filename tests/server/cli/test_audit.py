"""`deshift audit`: who, when, what, why, before and after; and taking a change back."""

import asyncio
import getpass
import json
from pathlib import Path

import pytest

from server.cli.display import change_lines, lasting, shown
from server.control import DocumentChange
from steering.stores import open_store
from tests.server.cli.conftest import Deshift
from tests.server.cli.tables import cells

WHY = ("--reason", "for the test")


@pytest.fixture
def changed(deshift: Deshift) -> Deshift:
    """Revisions: 1 and 2 make tenants, 3 a key, 4 a policy, 5 the kill switch."""
    for command in (
        ("tenants", "create", "acme", *WHY),
        ("tenants", "create", "other", *WHY),
        ("keys", "create", "acme", "main", *WHY),
        ("policy", "set", "acme", "--alpha", 0.5, "--by", "ann", "--reason", "[red]less[/red]"),
        ("kill", "reject", *WHY),
    ):
        assert deshift(*map(str, command)).exit_code == 0
    return deshift


def test_the_newest_change_comes_first_with_who_what_and_why(changed: Deshift) -> None:
    rows = cells(changed("audit").stdout)
    assert [row[0] for row in rows if row[0]] == ["5", "4", "3", "2", "1"]
    at = next(index for index, row in enumerate(rows) if row[0] == "4")
    first, second = rows[at : at + 2]
    assert first[2:] == ["ann", "policy.set", "[red]less[/red]"]
    assert second[2:4] == ["by command", "tenant/acme: alpha 1 -> 0.5"]
    assert "kill: action none -> reject" in rows[1]


def test_the_audit_as_json_has_documents_before_and_after(changed: Deshift) -> None:
    newest, policy, *_ = json.loads(changed("audit", "--json").stdout)
    assert (newest["revision"], newest["action"], newest["by"]) == (
        *(5, "kill.set"),
        getpass.getuser(),
    )
    (change,) = policy["changes"]
    assert change["key"] == "tenant/acme"
    assert change["before"]["policy"]["alpha"] == 1.0
    assert change["after"]["policy"]["alpha"] == 0.5
    assert (policy["by"], policy["via"], policy["reason"]) == ("ann", "command", "[red]less[/red]")


def test_a_tenants_changes_and_a_limit(changed: Deshift) -> None:
    def revisions(*arguments: str) -> list[int]:
        return [each["revision"] for each in json.loads(changed("audit", *arguments).stdout)]

    assert revisions("--tenant", "acme", "--json") == [4, 3, 1]
    assert revisions("--tenant", "acme", "--limit", "2", "--json") == [4, 3]
    assert revisions("--limit", "1", "--json") == [5]
    assert changed("audit", "--tenant", "nobody").stdout == "no changes yet\n"


def test_a_revert_brings_back_what_was_there(changed: Deshift) -> None:
    result = changed("audit", "revert", 4, *WHY)
    assert result.stdout == "revision 4 is taken back by revision 6\n"
    told = json.loads(changed("policy", "show", "acme", "--json").stdout)
    assert (told["policy"]["alpha"], told["revision"]) == (1.0, 6)
    assert json.loads(changed("audit", "revert", 5, *WHY, "--json").stdout) == {
        "reverted": 5,
        "revision": 7,
    }


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("revert", "1", *WHY), 1, "tenant/acme is at revision 4, not 1"),
        (("revert", "9", *WHY), 1, "there is no change 9"),
        (("revert", "4"), 2, "--reason"),
        (("revert", "0", *WHY), 2, "greater than or equal to 1"),
        (("--limit", "0"), 2, "--limit"),
    ],
)
def test_what_cannot_be_is_said(
    changed: Deshift, arguments: tuple[str, ...], exit_code: int, said: str
) -> None:
    result = changed("audit", *arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert said in result.stderr
    assert json.loads(changed("audit", "--limit", "1", "--json").stdout)[0]["revision"] == 5


def test_a_terminals_control_sequences_are_not_passed_on(deshift: Deshift, tmp_path: Path) -> None:
    """Whoever may write to the store is not thereby at the operator's terminal."""
    entry = {"by": "\x1b[2J", "via": "api", "reason": "\x1b]0;x\x07", "action": "a", "changes": []}

    async def write() -> None:
        store = open_store(f"sqlite:///{tmp_path}/cache/deshift.db")
        await store.commit({"kill": '{"action":"none"}'}, {}, json.dumps(entry))
        await store.close()

    asyncio.run(write())
    printed = deshift("audit").stdout
    assert "\x1b" not in printed and "\x07" not in printed and "[2J" in printed


@pytest.mark.parametrize(
    ("key", "before", "after", "said"),
    [
        ("tenant/a", None, {"policy": {}}, ["tenant/a: created"]),
        ("tenant/a", {"policy": {}}, None, ["tenant/a: deleted"]),
        ("tenant/a", "{dam", {"policy": {}}, ["tenant/a: replaced"]),
        ("kill", None, {"action": "reject"}, ["kill: action none -> reject"]),
        ("kill", {"action": "reject"}, {"action": "reject"}, ["kill: written again"]),
        ("alias/x", None, {"vector": "3f" * 32}, ["alias/x: vector none -> 3f3f3f3f3f3f"]),
        (
            "keys/a",
            {"keys": [{"id": "old", "expires_at": None}, {"id": "gone", "expires_at": None}]},
            {"keys": [{"id": "old", "expires_at": 0.0}, {"id": "new", "expires_at": None}]},
            [
                "keys/a: old.expires_at none -> 1970-01-01 00:00:00Z",
                "keys/a: gone removed",
                "keys/a: new added",
            ],
        ),
        (
            "tenant/a",
            {"policy": {"alpha": 0.8}, "until": {"at": 60.0, "then": {"alpha": 1.0}}},
            {"policy": {"alpha": 0.5}, "until": None},
            ["tenant/a: alpha 0.8 -> 0.5", "tenant/a: until 1970-01-01 00:01:00Z -> none"],
        ),
    ],
)
def test_changes_of_documents_in_words(
    key: str, before: object, after: object, said: list[str]
) -> None:
    assert change_lines(DocumentChange(key, before, after)) == said


def test_durations_and_values_are_short() -> None:
    assert [lasting(s) for s in (0.3, 90, 119, 2700, 9000, 604800)] == [
        *("0.3 s", "90 s", "119 s", "45 min", "2.5 h", "7 d"),
    ]
    assert [shown(each) for each in (1.0, 0.05, None, "all", 60)] == [
        *("1", "0.05", "none", "all", "60"),
    ]
