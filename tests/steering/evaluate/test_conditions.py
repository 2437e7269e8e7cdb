"""Conditions as people write them."""

import pytest

from steering.errors import EvaluationError
from steering.evaluate.conditions import Condition, parse, parse_all, readme_table


@pytest.mark.parametrize(
    ("text", "picture", "steering"),
    [
        ("base", "own", {"mode": "off"}),
        ("text-only", "none", None),
        ("caption", "caption", None),
        ("blank", "blank", {"mode": "off"}),
        ("noise", "noise", {"mode": "off"}),
        ("served", "own", None),
        ("dataset", "own", {"mode": "dataset"}),
        (
            "dataset:alpha=0.20,schedule=incremental",
            "own",
            {"mode": "dataset", "alpha": 0.2, "schedule": "incremental"},
        ),
        (
            "sample:corruption=noise,schedule=range:3-11",
            "own",
            {"mode": "sample", "corruption": "noise", "schedule": "range:3-11"},
        ),
        (
            "dataset:method=safety-projected,gate=15:0.1,alpha=1",
            "own",
            {
                "mode": "dataset",
                "method": "safety-projected",
                "gate": "15:0.1:0.1",
                "alpha": 1.0,
            },
        ),
        ("dataset:gate=none", "own", {"mode": "dataset", "gate": "none"}),
    ],
)
def test_a_condition_says_which_picture_and_which_steering(
    text: str, picture: str, steering: dict[str, object] | None
) -> None:
    assert parse(text) == Condition(text, picture, steering)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is not one of: base, text-only"),
        ("Base", "is not one of: base"),
        ("base:alpha=1", "base has no fields"),
        ("dataset:", "write FIELD=VALUE"),
        ("dataset:alpha", "write FIELD=VALUE,... not 'alpha'"),
        ("dataset:alpha=", "write FIELD=VALUE"),
        ("dataset:alpha=-1", "alpha '-1' is not a number >= 0"),
        ("dataset:alpha=nan", "alpha 'nan' is not a number >= 0"),
        ("dataset:alpha=inf", "alpha 'inf' is not a number >= 0"),
        ("dataset:alpha=1,alpha=2", "alpha is given twice"),
        ("dataset:strength=1", "'strength' is not one of: alpha, schedule"),
        ("dataset:schedule=some", "schedule 'some' is not one of: all"),
        ("dataset:gate=x", "gate 'x'"),
        ("dataset:method=magic", "method 'magic' is not one of: subtract"),
        ("dataset:corruption=blank", "has its corruption already"),
        ("sample:corruption=red", "corruption 'red' is not one of: blank"),
    ],
)
def test_what_is_wrong_with_a_condition_is_said(text: str, words: str) -> None:
    with pytest.raises(EvaluationError) as error:
        parse(text)
    assert words in str(error.value)


def test_two_conditions_that_ask_for_the_same_are_refused() -> None:
    with pytest.raises(EvaluationError, match="'dataset:alpha=1' and 'dataset:alpha=1.0' are the"):
        parse_all(["dataset:alpha=1", "base", "dataset:alpha=1.0"])
    with pytest.raises(EvaluationError, match="no condition"):
        parse_all([])


def test_the_readmes_set_can_be_read_and_extended() -> None:
    table = readme_table()
    assert {"base", "text only", "blank", "noise"} < {condition.name for condition in table}
    assert [c.name for c in parse_all(["caption"], table=True)] == [
        *(condition.name for condition in table),
        "caption",
    ]
    with pytest.raises(EvaluationError, match="are the same"):
        parse_all(["base"], table=True)


def test_another_server_is_asked_without_the_field_and_never_for_steering() -> None:
    for text in ("base", "blank", "served", "text-only"):
        assert parse(text).without_steering().steering is None
    with pytest.raises(EvaluationError, match="needs a Deshift server"):
        parse("sample").without_steering()
