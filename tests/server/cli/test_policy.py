"""`deshift policy`: what is changed, what stays, and what is refused."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from server.cli.policy_options import _HELP, changed, option_of
from server.control import Author, Control
from server.documents import PolicyFields
from steering.stores import open_store
from tests.server.cli.conftest import Deshift
from tests.server.cli.tables import cells

WHY = ("--reason", "for the test")


@pytest.fixture
def acme(deshift: Deshift) -> Deshift:
    made = deshift("tenants", "create", "acme", "--alpha", 0.8, "--concurrency", 4, *WHY)
    assert made.exit_code == 0
    return deshift


def policy(deshift: Deshift) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(deshift("policy", "show", "acme", "--json").stdout)
    return told


def test_set_changes_what_is_given_and_says_before_and_after(acme: Deshift) -> None:
    before = policy(acme)
    result = acme("policy", "set", "acme", "--alpha", 0.5, "--concurrency", "none", *WHY)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("policy of acme: revision 1 -> 2\n")
    assert cells(result.stdout) == [["alpha", "0.8", "0.5"], ["concurrency", "4", "none"]]
    after = policy(acme)
    assert after["revision"] == 2 and after["until"] is None
    assert after["policy"] == before["policy"] | {"alpha": 0.5, "concurrency": None}


def test_every_field_has_an_option_that_reaches_it(acme: Deshift) -> None:
    values: dict[str, Any] = {
        "mode": "sample",
        "method": "safety-projected",
        "alpha": 0.25,
        "alpha_max": 1.5,
        "schedule": "range:1-2",
        "gate": "3:0.25:0.5",
        "scope": "last",
        "vector_alias": "strict",
        "corruption": "noise",
        "on_error": "serve-unsteered",
        "client_override": "strengthen",
        "max_relative_dose": 0.7,
        "rollout": 12.5,
        "requests_per_minute": 600,
        "concurrency": 9,
    }
    assert list(values) == list(PolicyFields.model_fields) == list(_HELP)
    options = [word for name, value in values.items() for word in (option_of(name), str(value))]
    assert acme("policy", "set", "acme", *options, *WHY).exit_code == 0
    assert policy(acme)["policy"] == values


def test_a_client_override_of_none_is_a_value_and_no_missing_limit() -> None:
    some = PolicyFields.model_validate({"client_override": "any", "concurrency": 3})
    wanted = changed(some, {"client_override": "none", "concurrency": "none"})
    assert (wanted.client_override, wanted.concurrency) == ("none", None)


@pytest.mark.parametrize("with_evidence", [True, False])
def test_a_file_gives_fields_and_options_win(
    acme: Deshift, tmp_path: Path, with_evidence: bool
) -> None:
    """As `deshift calibrate` writes it, or bare; what it does not name stays."""
    fields = {"alpha": 0.3, "schedule": "incremental", "gate": "3:0:0.1", "concurrency": None}
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"policy": fields, "evidence": {}} if with_evidence else fields))
    before = policy(acme)["policy"]
    result = acme("policy", "set", "acme", "--file", file, "--alpha", 0.4, *WHY)
    assert result.exit_code == 0, result.stderr
    assert policy(acme)["policy"] == before | fields | {"alpha": 0.4}


def test_a_file_that_is_no_policy_changes_nothing(acme: Deshift, tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    for content, said in [
        ("{", "not a JSON file"),
        ("[1]", "no JSON object with fields of a policy"),
        ('{"policy": 3}', "no JSON object with fields of a policy"),
        ('{"alhpa": 1}', "alhpa: Extra inputs are not permitted"),
        ('{"alpha": "much"}', "alpha: Input should be a valid number"),
    ]:
        file.write_text(content)
        result = acme("policy", "set", "acme", "--file", file, *WHY)
        assert (result.exit_code, result.stdout) == (1, ""), result.output
        assert said in result.stderr
    assert policy(acme)["revision"] == 1


def test_a_stale_revision_changes_nothing(acme: Deshift) -> None:
    assert acme("policy", "set", "acme", "--alpha", 0.7, "--revision", 1, *WHY).exit_code == 0
    stale = acme("policy", "set", "acme", "--alpha", 0.1, "--revision", 1, *WHY)
    assert (stale.exit_code, stale.stdout) == (1, "")
    assert stale.stderr == (
        "deshift: the policy of 'acme' is at revision 2, not 1: it was changed in the meantime\n"
    )
    assert policy(acme)["policy"]["alpha"] == 0.7


def test_what_is_so_already_makes_no_revision(acme: Deshift) -> None:
    same = acme("policy", "set", "acme", "--alpha", "0.80", *WHY)
    assert same.stdout == "nothing to change: acme stays at revision 1\n"
    assert policy(acme)["revision"] == 1


def test_a_temporary_policy_says_what_comes_then(acme: Deshift) -> None:
    before = time.time()
    result = acme("policy", "set", "acme", "--alpha", 0.2, "--for", "30m", *WHY)
    assert "for 30 min, then back to what was in force before" in result.stdout
    told = policy(acme)
    assert before + 1800 <= told["until"]["at"] <= time.time() + 1800
    assert (told["policy"]["alpha"], told["until"]["then"]["alpha"]) == (0.2, 0.8)
    rows = cells(acme("policy", "show", "acme").stdout)
    assert ["alpha", "0.2", "0.8"] in rows and ["rollout", "100", "100"] in rows
    (row,) = cells(acme("tenants", "list").stdout)
    assert row[2] == "0.2" and row[3].endswith("then 0.8")


def test_a_temporary_policy_does_not_become_lasting_unnoticed(acme: Deshift) -> None:
    assert acme("policy", "set", "acme", "--alpha", 0.2, "--for", "30m", *WHY).exit_code == 0
    for more in ((), ("--for", "1h")):
        refused = acme("policy", "set", "acme", "--rollout", 50, *more, *WHY)
        assert refused.exit_code == 1 and "deshift audit revert 2" in refused.stderr
    assert acme("policy", "set", "acme", "--rollout", 50, "--permanent", *WHY).exit_code == 0
    told = policy(acme)
    assert told["until"] is None
    assert (told["policy"]["alpha"], told["policy"]["rollout"]) == (0.2, 50)


def test_what_has_run_out_is_not_revived_by_a_change(acme: Deshift, tmp_path: Path) -> None:
    async def an_hour_ago() -> None:
        store = open_store(f"sqlite:///{tmp_path}/cache/deshift.db")
        control = Control(store, now=lambda: time.time() - 3600)
        weak = changed((await control.tenant("acme")).document.policy, {"alpha": "0.1"})
        await control.set_policy("acme", weak, None, Author("ann", "test", "api"), 60.0)
        await store.close()

    asyncio.run(an_hour_ago())
    assert policy(acme)["policy"]["alpha"] == 0.8 and policy(acme)["until"] is None
    result = acme("policy", "set", "acme", "--rollout", 50, *WHY)
    assert cells(result.stdout) == [["rollout", "100", "50"]]
    assert policy(acme)["policy"]["alpha"] == 0.8


def test_the_change_as_json(acme: Deshift) -> None:
    result = acme("policy", "set", "acme", "--alpha", 0.2, "--for", "90s", *WHY, "--json")
    assert json.loads(result.stdout) == {
        "tenant": "acme",
        "revision_before": 1,
        "revision": 2,
        "for_s": 90.0,
        "changes": {"alpha": [0.8, 0.2]},
    }


def test_diff_compares_a_revision_with_now(acme: Deshift) -> None:
    assert acme("tenants", "create", "other", *WHY).exit_code == 0
    assert acme("policy", "set", "acme", "--alpha", 0.5, *WHY).exit_code == 0
    assert acme("keys", "create", "acme", "main", *WHY).exit_code == 0
    for revision in (1, 2):  # at 2, another tenant was changed
        result = acme("policy", "diff", "acme", revision)
        assert cells(result.stdout) == [["alpha", "0.8", "0.5"]]
        assert f"revision {revision}" in result.stdout and "now (revision 3)" in result.stdout
    assert "the same policy" in acme("policy", "diff", "acme", 4).stdout
    told = json.loads(acme("policy", "diff", "acme", 1, "--json").stdout)
    assert told == {"tenant": "acme", "from": 1, "to": 3, "changes": {"alpha": [0.8, 0.5]}}
    assert "no tenant 'other' at revision 1" in acme("policy", "diff", "other", 1).stderr
    assert "there is no revision 5 yet" in acme("policy", "diff", "acme", 5).stderr
    assert acme("tenants", "delete", "acme", *WHY).exit_code == 0
    assert acme("tenants", "create", "acme", *WHY).exit_code == 0
    assert "was deleted at revision 5" in acme("policy", "diff", "acme", 5).stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("acme", "--alpha", "3"), 1, "alpha 3 is over alpha_max 2"),
        (("acme", "--alpha", "-1"), 1, "alpha: Input should be greater than or equal to 0"),
        (("acme", "--alpha", "nan"), 1, "alpha: Input should be a finite number"),
        (("acme", "--alpha", "none"), 1, "alpha: "),
        (("acme", "--mode", "on"), 1, "mode: Input should be 'off', 'dataset' or 'sample'"),
        (("acme", "--schedule", "some"), 1, "schedule: schedule 'some' is not one of"),
        (("acme", "--alpha", "1", "--for", "367d"), 1, "366 days"),
        (("acme", "--alpha", "1", "--for", "30"), 2, "12h"),
        (("acme",), 2, "--alpha 0.8"),
        (("acme", "--for", "1h"), 2, "--alpha 0.8"),
        (("nobody", "--alpha", "1"), 1, "there is no tenant 'nobody'"),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(
    acme: Deshift, arguments: tuple[str, ...], exit_code: int, said: str
) -> None:
    result = acme("policy", "set", *arguments, *WHY)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert said in result.stderr
    if exit_code == 1:
        assert result.stderr.count("\n") == 1
    assert policy(acme)["revision"] == 1
