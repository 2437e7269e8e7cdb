"""`deshift keys`: a key is shown once, alone on standard output."""

import hashlib
import json
import time
from pathlib import Path

import pytest

from tests.server.cli.conftest import Deshift
from tests.server.cli.tables import cells

WHY = ("--reason", "for the test")


@pytest.fixture
def acme(deshift: Deshift) -> Deshift:
    assert deshift("tenants", "create", "acme", *WHY).exit_code == 0
    return deshift


def keys(deshift: Deshift) -> dict[str, dict[str, object]]:
    told = json.loads(deshift("keys", "list", "acme", "--json").stdout)
    return {key["id"]: key for key in told}


def test_the_key_stands_alone_on_stdout_and_only_its_digest_is_kept(
    acme: Deshift, tmp_path: Path
) -> None:
    made = acme("keys", "create", "acme", "main", *WHY)
    assert made.exit_code == 0
    key = made.stdout.removesuffix("\n")
    assert key.startswith("dsk-") and len(key) > 40 and key.split() == [key]
    assert "main" in made.stderr and key not in made.stderr
    kept = b"".join(file.read_bytes() for file in (tmp_path / "cache").glob("deshift.db*"))
    assert key.encode() not in kept
    assert hashlib.sha256(key.encode()).hexdigest().encode() in kept


def test_the_key_can_be_read_from_json(acme: Deshift) -> None:
    before = time.time()
    made = json.loads(
        acme("keys", "create", "acme", "k", "--expires", "30d", *WHY, "--json").stdout
    )
    assert made["key"].startswith("dsk-")
    assert (made["tenant"], made["id"], made["revision"]) == ("acme", "k", 2)
    assert before + 30 * 86400 <= made["expires_at"] <= time.time() + 30 * 86400


def test_a_rotated_key_stays_good_for_the_overlap(acme: Deshift) -> None:
    old = acme("keys", "create", "acme", "old", *WHY).stdout
    before = time.time()
    rotated = acme("keys", "rotate", "acme", "old", "new", "--overlap", "90m", *WHY)
    assert rotated.exit_code == 0 and rotated.stdout.startswith("dsk-")
    assert rotated.stdout != old
    told = keys(acme)
    assert told["new"]["expires_at"] is None
    end = told["old"]["expires_at"]
    assert isinstance(end, float) and before + 5400 <= end <= time.time() + 5400
    assert told["old"]["is_valid"]
    rows = {row[0]: row[2:] for row in cells(acme("keys", "list", "acme").stdout)}
    assert rows["new"] == ["never", "good"]
    assert rows["old"][1] == "good for 90 min"


def test_a_rotation_without_overlap_ends_the_old_key(acme: Deshift) -> None:
    assert acme("keys", "create", "acme", "old", *WHY).exit_code == 0
    assert acme("keys", "rotate", "acme", "old", "new", "--overlap", "0s", *WHY).exit_code == 0
    assert {name: key["is_valid"] for name, key in keys(acme).items()} == {
        "old": False,
        "new": True,
    }


def test_a_revoked_key_is_listed_as_ended(acme: Deshift) -> None:
    assert acme("keys", "create", "acme", "main", *WHY).exit_code == 0
    revoked = acme("keys", "revoke", "acme", "main", *WHY)
    assert revoked.stdout == "the key main of acme has ended, revision 3\n"
    assert cells(acme("keys", "list", "acme").stdout)[0][3] == "ended"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("create", "acme", "main", *WHY), 1, "has a key 'main' already"),
        (("create", "acme", "a b", *WHY), 1, "'a b' is not a name"),
        (("create", "none", "main", *WHY), 1, "there is no tenant 'none'"),
        (("create", "acme", "k", "--expires", "0s", *WHY), 1, "above 0"),
        (("create", "acme", "k", "--expires", "30", *WHY), 2, "12h"),
        (("create", "acme", "k", "--expires", "1w", *WHY), 2, "7d"),
        (("create", "acme", "k"), 2, "--reason"),
        (("rotate", "acme", "main", "new", *WHY), 2, "--overlap"),
        (("rotate", "acme", "other", "new", "--overlap", "1h", *WHY), 1, "has no key 'other'"),
        (("revoke", "acme", "other", *WHY), 1, "has no key 'other'"),
    ],
)
def test_what_cannot_be_is_said_and_no_key_is_made(
    acme: Deshift, arguments: tuple[str, ...], exit_code: int, said: str
) -> None:
    assert acme("keys", "create", "acme", "main", *WHY).exit_code == 0
    result = acme("keys", *arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert said in result.stderr
    assert list(keys(acme)) == ["main"]


@pytest.mark.parametrize(
    "command", [("create", "two"), ("rotate", "main", "two", "--overlap", "0s"), ("revoke", "main")]
)
def test_a_stale_revision_of_the_keys_changes_nothing(
    acme: Deshift, command: tuple[str, ...]
) -> None:
    """The commands had no way to say what was seen."""
    assert acme("keys", "create", "acme", "main", *WHY).exit_code == 0
    seen = json.loads(acme("tenants", "show", "acme", "--json").stdout)["keys_revision"]
    assert f"revision {seen}" in acme("keys", "list", "acme").stdout
    assert acme("keys", "create", "acme", "meanwhile", *WHY).exit_code == 0
    name, *rest = command
    stale = acme("keys", name, "acme", *rest, "--revision", str(seen), *WHY)
    assert stale.exit_code == 1 and "changed in the meantime" in stale.stderr
    told = keys(acme)
    assert set(told) == {"main", "meanwhile"} and told["main"]["expires_at"] is None
