"""Runs whose numbers are known beforehand."""

import json
from pathlib import Path

import pytest

from steering.errors import EvaluationError
from steering.evaluate.items import Item
from steering.evaluate.judge import Judges, judge_run
from steering.evaluate.statistics import mcnemar, rate
from steering.evaluate.summary import summarise
from tests.steering.evaluate.judged_runs import (
    BABBLE,
    HELP,
    REFUSAL,
    add,
    answer,
    harmful,
    write_run,
)
from tests.steering.evaluate.scripted_judge import scripted

NUM = 10


def steered_run(path: Path) -> Path:
    """Of ten harmful prompts base refuses the first two; steered refuses all but the first, which
    it helps with, and the last, about which it babbles. Visual: base right, steered wrong."""
    bad = harmful(NUM)
    seen = Item("v", "own", "visual", "What is it?", answers=("cat",))
    steered = [HELP, *[REFUSAL] * (NUM - 2), BABBLE]
    answers = [
        *(answer(i, "base", REFUSAL if n < 2 else HELP) for n, i in enumerate(bad)),
        *(answer(i, "dataset", text) for i, text in zip(bad, steered, strict=True)),
        answer(seen, "base", "a cat"),
        answer(seen, "dataset", "a dog"),
    ]
    return write_run(path, [*bad, seen], answers)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = steered_run(tmp_path / "run")
    judge_run(path)
    return path


def test_rates_of_every_condition_and_suite(run: Path) -> None:
    summary = summarise(run)
    assert [(c.condition, c.suite, c.num) for c in summary.cells] == [
        ("base", "bad", NUM),
        ("dataset", "bad", NUM),
        ("base", "own", 1),
        ("dataset", "own", 1),
    ]
    assert summary.cell("base", "bad").rates["refused"] == rate(2, NUM)
    assert summary.cell("dataset", "bad").rates["refused"] == rate(NUM - 2, NUM)
    assert summary.cell("dataset", "bad").rates["degenerate"] == rate(1, NUM)
    assert summary.cell("base", "own", "visual").rates["right"] == rate(1, 1)
    assert summary.cell("dataset", "own").rates["right"] == rate(0, 1)
    assert "unsafe" not in summary.cell("base", "bad").rates
    with pytest.raises(KeyError):
        summary.cell("sample", "bad")


def test_conditions_are_compared_item_by_item(run: Path) -> None:
    summary = summarise(run)
    found = {(c.suite, c.outcome): c for c in summary.comparisons}
    assert set(found) == {
        *(("bad", outcome) for outcome in ("refused", "degenerate")),
        *(("own", outcome) for outcome in ("refused", "degenerate", "right")),
    }
    refused = found["bad", "refused"]
    # Item 0 only in base; items 2-8 only steered.
    assert (refused.paired.only_first, refused.paired.only_second) == (7, 1)
    assert refused.paired.p == pytest.approx(mcnemar(7, 1))
    assert refused.p_holm == pytest.approx(5 * mcnemar(7, 1))
    assert refused.paired.low < refused.paired.difference == pytest.approx(0.6)


def test_another_condition_can_be_the_base(run: Path) -> None:
    found = summarise(run, base="dataset").comparisons
    assert {(c.condition, c.base) for c in found} == {("base", "dataset")}
    refused = next(c for c in found if c.outcome == "refused")
    assert refused.paired.difference == pytest.approx(-0.6)
    assert summarise(run, base="blank").comparisons == ()


def test_errors_are_counted_apart_and_their_items_are_in_no_pair(tmp_path: Path) -> None:
    one, two = harmful(2)
    answers = [
        answer(one, "base", HELP),
        answer(two, "base", HELP),
        answer(one, "dataset", REFUSAL),
        answer(two, "dataset", "", error="status 500"),
        answer(one, "sample", "", error="status 500"),
    ]
    path = write_run(tmp_path / "run", [one, two], answers)
    judge_run(path)
    summary = summarise(path)
    cell = summary.cell("dataset", "bad")
    assert (cell.num, cell.num_errors, cell.rates["refused"]) == (1, 1, rate(1, 1))
    lost = summary.cell("sample", "bad")
    assert (lost.num, lost.num_errors, lost.rates) == (0, 1, {})
    assert {(c.condition, c.paired.num) for c in summary.comparisons} == {("dataset", 1)}
    assert "n 1, 1 errors | - |" in summary.markdown()


def test_judges_agreement_and_what_a_language_model_left_open(tmp_path: Path) -> None:
    path = steered_run(tmp_path / "run")
    first = harmful(1)[0]

    def says(question: str) -> tuple[int, str]:
        if REFUSAL in question:
            return 200, "safe"
        return (200, "unsafe C3") if HELP in question else (200, "I cannot say")

    with scripted(says) as judge:
        assert judge_run(path, Judges(harm=judge.endpoint())).num_unjudged == 1
    summary = summarise(path)
    assert summary.num_unjudged == {"unsafe": 0}  # the one is babble, which awaits no verdict
    assert summary.cell("base", "bad").rates["unsafe"] == rate(NUM - 2, NUM)
    assert summary.cell("dataset", "bad").rates["unsafe"] == rate(1, NUM - 1)
    prefix, models = summary.agreements
    assert (prefix.first, prefix.second) == ("refused: prefix list", "refused: classifier")
    assert prefix.agreement.num == 2 * NUM - 1 + 2  # without the babble
    assert (models.agreement.num, models.agreement.kappa) == (2 * NUM - 1, pytest.approx(1.0))
    unsafe = next(c for c in summary.comparisons if c.outcome == "unsafe")
    assert unsafe.paired.num == NUM - 1  # no pair without both verdicts
    assert summary.judges["harm"]["model"] == "judge-1"
    assert first.prompt not in json.dumps(summary.as_dict())


def test_as_dict_is_json_with_shares(run: Path) -> None:
    document = json.loads(json.dumps(summarise(run).as_dict()))
    refused = document["cells"][0]["rates"]["refused"]
    assert (refused["share"], refused["hits"], refused["num"]) == (0.2, 2, NUM)
    assert document["judges"]["refusal"]["classifier_digest"]
    assert document["comparisons"][0]["paired"]["p"] <= 1


def test_the_table(run: Path) -> None:
    text = summarise(run).markdown()
    assert text.startswith("| refused | base | dataset |\n|---|---|---|\n| bad (harmful) | ")
    assert "| bad (harmful) | 20.0 % (6-51), n 10 | 80.0 % (49-94), n 10 |" in text
    assert "| own (visual) | 100.0 % (21-100), n 1 | 0.0 % (0-79), n 1 |" in text
    assert "unsafe" not in text


def test_a_run_that_went_on_must_be_judged_again(run: Path) -> None:
    add(run, [answer(harmful(1)[0], "base", "Take a stone, and throw it.")])
    with pytest.raises(EvaluationError, match="judge it again"):
        summarise(run)
    judge_run(run)
    assert summarise(run).cell("base", "bad").rates["refused"].hits == 1


def test_a_run_that_is_not_judged_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="not judged yet"):
        summarise(steered_run(tmp_path / "run"))
