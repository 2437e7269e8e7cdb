"""What a report says of perplexities whose numbers are known."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the extra `eval` is not installed")

from steering.evaluate import report
from steering.evaluate.judge import answer_digest, judge_run, verdicts_of
from steering.evaluate.perplexity import save
from steering.evaluate.report import likelihood
from steering.evaluate.report.words import interval, percent
from steering.evaluate.statistics import agreement, median, rate
from tests.steering.evaluate.judged_runs import HELP, add, answer
from tests.steering.evaluate.report_pages import Page, words
from tests.steering.evaluate.report_runs import (
    CONDITIONS,
    NUM,
    STEERED,
    items,
    make_run,
    make_scores,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As measured; then one answer is asked again, and one comes back empty."""
    path = make_run(tmp_path_factory.mktemp("likelihood") / "run")
    save(path, make_scores())
    first, second = items()[:2]
    add(path, [answer(first, "text-only", HELP + " Again."), answer(second, "text-only", " ")])
    judge_run(path)
    return path


@pytest.fixture(scope="module")
def document(run: Path) -> dict[str, Any]:
    report.write(run)
    return dict(json.loads((run / "report.json").read_text()))


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    report.write(run)
    return Page((run / "report.html").read_text())


def test_conditions_have_medians_and_shares_of_unlikely_answers(document: dict[str, Any]) -> None:
    found = document["perplexity"]
    rows = {each["condition"]: each for each in found["conditions"]}
    assert list(rows) == list(CONDITIONS)
    assert found["models"] == [["56" * 32, "bfloat16"]]
    # The 59th of the base's 59 is the first that 99 % do not exceed.
    assert found["num_base"] == 59 and found["limit"] == pytest.approx(math.exp(1.9))
    places = [place / 10 for place in range(NUM)]
    base = sorted([*places, *places, *places[:-1]])
    expected = median([math.exp(nll) for nll in base])
    assert rows["base"]["perplexity"] == pytest.approx(vars(expected))
    assert rows["base"]["asked"] == rows["base"]["text"] == pytest.approx(math.exp(0.9))
    assert rows[STEERED[0]]["asked"] == pytest.approx((math.exp(1.8) + math.exp(2.0)) / 2)
    hits = {name: rows[name]["unlikely"]["hits"] for name in CONDITIONS}
    assert hits == {"base": 0, "text-only": 0, STEERED[0]: 0, STEERED[1]: 6, STEERED[2]: 3 * NUM}
    of = rate(6, 3 * NUM)
    assert rows[STEERED[1]]["unlikely"] == pytest.approx(vars(of) | {"share": 0.1})


def test_answers_without_a_score_are_counted_and_told(document: dict[str, Any]) -> None:
    [row] = [c for c in document["perplexity"]["conditions"] if c["condition"] == "text-only"]
    assert (row["num"], row["num_empty"], row["num_unscored"]) == (3 * NUM - 2, 1, 1)
    assert "1 answers came after perplexity was measured, and have none." in document["missing"]


def test_the_rules_and_the_flag_are_compared(
    run: Path, document: dict[str, Any], page: Page
) -> None:
    scored = 5 * 3 * NUM - 1 - 2  # but an error of the base's, and two answers without a score
    expected = agreement(
        [True] * (3 * NUM) + [False] * (scored - 3 * NUM),
        [True] * (3 * NUM + 6) + [False] * (scored - 3 * NUM - 6),
    )
    found = document["perplexity"]["agreement"]
    assert found["agreement"] == pytest.approx(vars(expected))
    [row] = [row for row in page.tables["agreement"] if words(row[1]) == "unlikely: perplexity"]
    assert [words(cell) for cell in row] == [
        "degenerate: rules",
        "unlikely: perplexity",
        str(scored),
        f"{100 * expected.accuracy:.1f} %",
        f"{expected.kappa:.2f} ({expected.low:.2f}\u2013{expected.high:.2f})",
    ]
    assert (
        sum(v.degenerate for v in verdicts_of(run)) == 3 * NUM + 1
    )  # as without it; and the empty


def test_the_page_says_what_the_document_says(document: dict[str, Any], page: Page) -> None:
    head, *rows = page.tables["perplexities"]
    assert words(head[-1]) == "Unlikely"
    for row, each in zip(rows, document["perplexity"]["conditions"], strict=True):
        of, unlikely = each["perplexity"], each["unlikely"]
        shares = f"{percent(unlikely)} {interval(unlikely)}, n {unlikely['num']}"
        assert [words(cell) for cell in row] == [
            each["condition"],
            *(str(each[key]) for key in ("num", "num_empty", "num_unscored")),
            f"{of['value']:.3g} ({of['low']:.3g}\u2013{of['high']:.3g})",
            f"{each['asked']:.3g}",
            f"{each['text']:.3g}",
            shares,
        ]
    told = words(page.text)
    assert "above 6.69, the highest of its only 59 answers" in told
    assert f"weights {'56' * 6}, bfloat16" in told
    assert "which checkpoint was served is not known" not in told
    assert "Perplexity changes no verdict." in " ".join(document["limits"])


def test_a_hundredth_of_many_answers_of_the_base_is_unlikely() -> None:
    prompts = [replace(items()[0], id=str(number)) for number in range(200)]
    answers = [answer(item, "base", HELP) for item in prompts]
    [pattern] = [each for each in make_scores() if each.key == ("base", "bad", "b1")]
    pattern = replace(pattern, answer_digest=answer_digest(answers[0]))
    scored = [
        replace(pattern, id=str(number), nll_asked=number / 100, nll_text=9.0)
        for number in range(200)
    ]
    found = likelihood.described(scored, answers, [], "base")
    assert found["limit"] == pytest.approx(math.exp(1.97))
    assert found["conditions"][0]["unlikely"]["hits"] == 2
    assert found["agreement"] is None  # nothing was judged


def test_without_a_base_there_is_no_limit(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("text-only", STEERED[0]), ("bad",))
    save(path, [each for each in make_scores() if each.condition == "text-only"])
    report.write(path)
    found = json.loads((path / "report.json").read_text())["perplexity"]
    assert found["limit"] is None and found["agreement"] is None
    measured, other = found["conditions"]
    assert measured["perplexity"]["num"] == NUM and measured["unlikely"] is None
    assert other["perplexity"] is None and other["num_unscored"] == NUM
    head, *rows = Page((path / "report.html").read_text()).tables["perplexities"]
    assert words(head[-1]) == "After its text alone"
    assert words(rows[1][4]) == words(rows[1][5]) == "\u2013"


def test_an_unknown_checkpoint_is_told(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("base",), ("bad",))
    document = json.loads((path / "run.json").read_text())
    document["settings"]["checkpoint"] = None
    (path / "run.json").write_text(json.dumps(document))
    save(path, make_scores())
    report.write(path)
    assert "which checkpoint was served is not known" in (path / "report.html").read_text()
