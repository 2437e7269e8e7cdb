"""The policy form: bounds from PolicyFields, typed text, stale forms."""

import pytest

from server.console.forms import (
    TEXTS,
    field_groups,
    merge,
    policy_fields,
    read_policy,
    values_of,
)
from server.documents import PolicyFields

DEFAULT = PolicyFields.model_validate({})


def test_every_field_of_a_policy_has_words_and_stands_once_on_the_page() -> None:
    shown = [field.name for _, fields in field_groups() for field in fields]
    assert sorted(shown) == sorted(PolicyFields.model_fields)
    assert set(TEXTS) == set(PolicyFields.model_fields)
    assert all(field.help for field in policy_fields().values())


def test_bounds_and_choices_are_those_of_the_model() -> None:
    fields = policy_fields()
    assert (fields["rollout"].minimum, fields["rollout"].maximum) == ("0", "100")
    assert fields["max_relative_dose"].over and fields["max_relative_dose"].bounds == "above 0"
    assert fields["requests_per_minute"].bounds == "1 to 1,000,000"
    assert fields["requests_per_minute"].is_optional and fields["concurrency"].is_optional
    assert fields["concurrency"].kind == "integer" and fields["alpha"].kind == "number"
    assert fields["mode"].choices == ("off", "dataset", "sample")


def test_what_the_inputs_hold_reads_back_as_the_same_policy() -> None:
    policy = PolicyFields.model_validate(
        {"alpha": 0.1 + 0.2, "requests_per_minute": 600, "schedule": "range:2-9", "rollout": 12.5}
    )
    typed = read_policy(values_of(policy))
    assert typed.policy == policy
    assert typed.errors == {}


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("alpha", "strong"),
        ("alpha", "nan"),
        ("alpha", "-1"),
        ("alpha", "2.5"),  # over alpha_max
        ("alpha", ""),
        ("mode", "loud"),
        ("rollout", "101"),
        ("concurrency", "0"),
        ("schedule", "layers 3"),
        ("vector_alias", "<b>"),
    ],
)
def test_a_wrong_field_is_named_and_keeps_what_was_typed(field: str, text: str) -> None:
    typed = read_policy(values_of(DEFAULT) | {field: text})
    assert typed.policy is None
    assert list(typed.errors) == [field]
    assert typed.values[field] == text


def test_a_form_without_a_field_is_no_policy() -> None:
    values = values_of(DEFAULT)
    del values["client_override"]
    assert read_policy(values).policy is None


def test_a_stale_form_keeps_what_was_typed_and_takes_what_others_changed() -> None:
    seen = DEFAULT
    now = PolicyFields.model_validate({"alpha": 0.9, "client_override": "any", "rollout": 50})
    typed = values_of(seen) | {"alpha": "0.7", "concurrency": "3", "rollout": "50"}
    merged = merge(typed, seen, now)
    assert merged.values["alpha"] == "0.7" and merged.conflicts == {"alpha": "0.9"}
    assert merged.values["client_override"] == "any"
    assert merged.values["concurrency"] == "3"
    assert merged.values["rollout"] == "50"


def test_where_nobody_knows_what_was_seen_every_difference_is_shown() -> None:
    now = PolicyFields.model_validate({"alpha": 0.9})
    merged = merge(values_of(DEFAULT), None, now)
    assert merged.values["alpha"] == "1" and merged.conflicts == {"alpha": "0.9"}
