"""Audit entries as lines that a person can read."""

from typing import Any

from server.console.diffs import Line, number, readable
from server.control import AuditEntry, DocumentChange
from server.documents import PolicyFields

POLICY = PolicyFields.model_validate({}).model_dump(mode="json")


def lines_of(key: str, before: Any, after: Any) -> list[Line]:
    entry = AuditEntry(3, 0.0, "alice", "api", "why", "x", (DocumentChange(key, before, after),))
    (change,) = readable(entry).changes
    return list(change.lines)


def test_only_what_differs_is_shown() -> None:
    before, after = {"policy": POLICY}, {"policy": POLICY | {"alpha": 0.25, "rollout": 50.0}}
    assert lines_of("tenant/acme", before, after) == [
        Line("alpha", "1", "0.25"),
        Line("rollout", "100", "50"),
    ]


def test_an_end_is_shown_with_what_comes_after_it() -> None:
    after = {"policy": POLICY, "until": {"at": 0.0, "then": POLICY | {"alpha": 0.5}}}
    assert lines_of("tenant/acme", {"policy": POLICY}, after) == [
        Line("ends", "", "1970-01-01 00:00:00"),
        Line("then", "", "alpha 0.5"),
    ]


def test_a_new_tenant_shows_its_mode_and_alpha_and_what_departs_from_the_defaults() -> None:
    after = {"policy": POLICY | {"on_error": "serve-unsteered"}}
    assert lines_of("tenant/acme", None, after) == [
        Line("mode", "", "dataset"),
        Line("alpha", "", "1"),
        Line("on error", "", "serve-unsteered"),
    ]


def test_keys_are_shown_without_their_digests() -> None:
    key = {"id": "ci", "digest": "f" * 64, "created_at": 0.0, "expires_at": None}
    ended = key | {"expires_at": 60.0}
    assert lines_of("keys/acme", None, {"keys": [key]}) == [Line("key ci", "", "valid")]
    assert lines_of("keys/acme", {"keys": [key]}, {"keys": [ended]}) == [
        Line("key ci", "valid", "ends 1970-01-01 00:01:00")
    ]


def test_a_document_of_another_version_is_shown_as_it_is() -> None:
    assert lines_of("alias/default", {"vector": "a" * 64}, "damaged {") == [
        Line("value", "", "damaged {"),
        Line("vector", "aaaaaaaaaaaa", ""),
    ]


def test_numbers_lose_no_digit() -> None:
    shown = [number(each) for each in (2.0, 0.1 + 0.2, 1e-5)]
    assert shown == ["2", "0.30000000000000004", "1e-05"]
