"""The report of runs whose numbers are known: report.json, and the page read back cell by cell."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the extra `eval` is not installed")

from steering.errors import EvaluationError
from steering.evaluate import perplexity, report
from steering.evaluate.conditions import parse, parse_all
from steering.evaluate.judge import judge_run
from steering.evaluate.report.command import command
from steering.evaluate.report.geometry import principal
from steering.evaluate.report.samples import MAX_CHANGED
from steering.evaluate.report.words import interval, p_value, percent, signed
from steering.evaluate.statistics import compare, rate
from steering.evaluate.summary import summarise
from tests.steering.evaluate.judged_runs import answer, harmful, write_run
from tests.steering.evaluate.report_pages import Page, words
from tests.steering.evaluate.report_runs import (
    CONDITIONS,
    NUM,
    REFUSED,
    RIGHT,
    STEERED,
    XSS,
    make_run,
    make_scores,
    make_states,
)


def page_of(path: Path) -> Page:
    report.write(path)
    return Page((path / "report.html").read_text())


def document_of(path: Path) -> dict[str, Any]:
    report.write(path)
    return dict(json.loads((path / "report.json").read_text()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_run(tmp_path_factory.mktemp("report") / "run")
    make_states().save(path)
    perplexity.save(path, make_scores())
    return path


@pytest.fixture(scope="module")
def document(run: Path) -> dict[str, Any]:
    return document_of(run)


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return page_of(run)


def test_the_summary_in_report_json_is_the_summary(run: Path, document: dict[str, Any]) -> None:
    assert document["summary"] == json.loads(json.dumps(summarise(run).as_dict()))
    points = {point["condition"]: point for point in document["points"]}
    assert list(points) == list(CONDITIONS)
    for name in CONDITIONS:
        harmful = rate(REFUSED["bad"][name], NUM - (name == "base"))
        found = points[name]["rates"]["harmful_refused"]
        assert (found["hits"], found["num"]) == (harmful.hits, harmful.num)
        assert (found["low"], found["high"]) == (harmful.low, harmful.high)
        right = points[name]["rates"]["pictures_right"]
        assert (right["hits"], right["num"]) == (RIGHT[name], NUM)
    babble = points[STEERED[2]]["rates"]
    assert babble["harmless_refused"]["hits"] == 0 and babble["harmless_lost"]["hits"] == NUM
    assert babble["degenerate"]["hits"] == 3 * NUM


def test_the_overview_holds_every_cell_of_the_summary(run: Path, page: Page) -> None:
    head, *rows = page.tables["overview"]
    assert [words(cell) for cell in head[1:]] == [
        "bad harmful: refused",
        "good harmless: refused",
        "seen visual: right",
    ]
    summary = summarise(run)
    assert [words(row[0]) for row in rows] == list(CONDITIONS)
    for row in rows:
        for suite, cell in zip(("bad", "good", "seen"), row[1:], strict=True):
            found = summary.cell(words(row[0]), suite)
            of = found.rates["right" if suite == "seen" else "refused"]
            low, high = f"{100 * of.low:.0f}", f"{100 * of.high:.0f}"
            share = f"{100 * of.share:.1f}".removesuffix(".0")
            errors = " 1 errors" if found.num_errors else ""
            assert words(cell) == f"{share} % ({low}\u2013{high}), n {of.num}{errors}"


def test_differences_are_paired_tested_and_corrected(run: Path, page: Page) -> None:
    [table] = [table for name, table in page.tables.items() if name.startswith("bad, harmful")]
    rows = {words(row[0]): [words(cell) for cell in row[1:]] for row in table[1:]}
    assert rows["base"][:2] == ["19", "1"]
    assert rows["base"][3:5] == ["\u2013", "\u2013"]
    # On the 19 that both answered, those from 4 on up to 16 are refused in this condition only.
    paired = compare([i < 16 for i in range(19)], [i < 4 for i in range(19)])
    low, high = signed(100 * paired.low, 0), signed(100 * paired.high, 0)
    assert rows[STEERED[1]][3] == (
        f"{signed(100 * paired.difference)} ({low} to {high}), 12:0 of 19"
    )
    [compared] = [
        each
        for each in summarise(run).comparisons
        if (each.condition, each.suite, each.outcome) == (STEERED[1], "bad", "refused")
    ]
    assert compared.paired.p == pytest.approx(2 * 0.5**12)
    assert rows[STEERED[1]][4] == (
        f"{p_value(compared.p_holm)} uncorrected {p_value(compared.paired.p)}"
    )


def test_pooled_rates_and_alphas_are_the_documents(page: Page, document: dict[str, Any]) -> None:
    head, *rows = page.tables["pooled"]
    columns = {words(cell): index for index, cell in enumerate(head)}
    for row, point in zip(rows, document["points"], strict=True):
        assert words(row[0]) == str(point["number"]) and words(row[1]) == point["condition"]
        for measure, of in point["rates"].items():
            cell = words(row[columns[document["measures"][measure]]])
            assert cell.startswith(f"{percent(of)} {interval(of)}, n {of['num']}")
    [family] = document["families"]
    assert family["alphas"] == [
        [0.0, "base"],
        *([alpha, name] for alpha, name in zip((0.1, 0.2, 0.4), STEERED, strict=True)),
    ]
    [table] = [table for name, table in page.tables.items() if name.startswith("dataset: schedule")]
    assert [words(row[0]) for row in table[1:]] == ["0", "0.1", "0.2", "0.4"]
    assert [words(row[1]).split(" %")[0] for row in table[1:]] == ["21.1", "50", "80", "0"]


def test_the_frontier_holds_what_nothing_beats(document: dict[str, Any]) -> None:
    on = {p["condition"]: (p["on_frontier"], p["on_picture_frontier"]) for p in document["points"]}
    assert on == {
        "base": (True, True),
        "text-only": (None, None),  # no setting that can be served
        STEERED[0]: (True, True),
        STEERED[1]: (True, True),
        STEERED[2]: (False, False),  # refuses nothing, and every harmless prompt is lost
    }
    told = " ".join(row["condition"] for row in document["conclusion"])
    assert STEERED[1] in told and STEERED[2] not in told


def test_what_was_measured_and_how_to_repeat_it_is_told(
    page: Page, document: dict[str, Any]
) -> None:
    for text in ("12" * 32, "ab" * 32, "cd" * 32, "ef" * 32, "max_tokens 32", "a processor"):
        assert text in page.text
    assert document["files"].keys() >= {"run.json", "answers.jsonl", "judged.jsonl", "states.npz"}
    for digest in document["files"].values():
        assert digest in page.text
    limits = " ".join(document["limits"])
    assert "bad 7" in limits and "Of good, seen no rows were set aside" in limits
    assert "repeat one of the anchors" in limits and "1 requests ended in an error" in limits
    line = " ".join(document["command"])
    assert line.startswith("deshift eval --out RUN_DIR --demo --dtype bfloat16 --suite bad.jsonl")
    assert "--skip bad=7" in line and "--num 20 --seed 3 --max-tokens 32" in line
    asked = re.findall(r"--condition (\S+)", line)
    assert [parse(text) for text in asked] == [parse(text) for text in CONDITIONS]


def test_the_readmes_set_is_repeated_by_its_name() -> None:
    chosen = parse_all(["dataset:alpha=0.31"], table=True)
    lines = command({"settings": {"conditions": [asdict(each) for each in chosen]}, "starts": []})
    assert "--conditions-set table" in lines
    assert [line for line in lines if "--condition " in line] == ["--condition dataset:alpha=0.31"]


def test_samples_show_what_changed_and_no_more_than_the_limit(document: dict[str, Any]) -> None:
    groups = {(g["condition"], g["suite"]): g for g in document["samples"]["groups"]}
    group = groups[STEERED[1], "bad"]
    assert group["num_changed"] == {"newly refused": 12, "no longer refused": 0}
    newly = [sample for sample in group["samples"] if sample["why"] == "newly refused"]
    assert len(newly) == min(12, MAX_CHANGED)
    assert all(s["verdict"]["refused"] and not s["before"]["verdict"]["refused"] for s in newly)
    assert groups["text-only", "bad"]["num_changed"]["newly refused"] == 14
    shown = [s for s in groups["text-only", "bad"]["samples"] if s["why"] == "newly refused"]
    assert len(shown) == MAX_CHANGED
    assert groups[STEERED[2], "bad"]["num_changed"]["no longer refused"] == 4


def test_markup_of_prompts_answers_and_names_stays_text(page: Page) -> None:
    assert not {"script", "img", "iframe", "link", "object"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert XSS in page.text and "status 500: <b>broken</b>" in page.text
    assert "model <b>one</b>" in page.text and not any(
        tag == "b" and a == {} for tag, a in page.tags
    )


def test_nothing_is_loaded_and_ids_are_unique(page: Page) -> None:
    loads = ("src", "srcset", "href", "xlink:href", "data", "poster", "action")
    named = [attrs[name] or "" for _, attrs in page.tags for name in loads if name in attrs]
    assert named and all(target.startswith("#") for target in named)
    styles = [attrs["style"] or "" for _, attrs in page.tags if "style" in attrs]
    clips = [attrs["clip-path"] or "" for _, attrs in page.tags if "clip-path" in attrs]
    urls = re.findall(r"url\(([^)]*)\)", " ".join([page.style, *styles, *clips]))
    assert urls and all(target.startswith("#") for target in urls)
    assert "@import" not in page.style
    assert len(page.ids) == len(set(page.ids))
    assert {target[1:] for target in [*named, *urls]} <= set(page.ids)


def test_tables_and_charts_have_names_for_those_who_do_not_see_them(page: Page) -> None:
    tables = [attrs for tag, attrs in page.tags if tag == "table"]
    assert len(tables) == sum(tag == "caption" for tag, _ in page.tags) > 5
    headers = [attrs for tag, attrs in page.tags if tag == "th"]
    assert all(attrs.get("scope") in ("row", "col") for attrs in headers)
    charts = [attrs for tag, attrs in page.tags if tag == "svg"]
    # Two frontiers, one family, two layers of one condition, four by layer.
    assert len(charts) == 2 + 1 + 2 + 4
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
    assert "harmful prompts refused, %" in page.text  # text in a chart is text


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    before = [(run / name).read_bytes() for name in ("report.json", "report.html")]
    report.write(run)
    assert [(run / name).read_bytes() for name in ("report.json", "report.html")] == before


def test_states_are_told_by_layer(page: Page, document: dict[str, Any]) -> None:
    states = document["states"]
    assert [plane["layer"] for plane in states["planes"]] == [1, 4]
    first = states["planes"][0]["variance_explained"]
    assert first[0] > 0.9  # the shift is nearly all that differs
    points = states["planes"][0]["points"]
    text, image, steered = (
        np.mean(points[group], axis=0)[0] for group in ("text only", "with picture", STEERED[1])
    )
    assert (steered - text) / (image - text) == pytest.approx(1 / 3, abs=0.01)
    rows = page.tables["layers"][1:]
    assert [words(row[0]) for row in rows] == [str(layer) for layer in range(5)]
    assert words(rows[2][4]) == "3" and words(rows[2][7]) == "0.1"
    assert any(STEERED[0] in text and "was not given" in text for text in document["missing"])


def test_principal_components_are_those_of_the_covariance() -> None:
    random = np.random.default_rng(1)
    fitted = random.normal(size=(50, 4)) * [3, 2, 0.5, 0.1] + 7
    coordinates, shares = principal(fitted, fitted)
    values = np.sort(np.linalg.eigvalsh(np.cov(fitted.T)))[::-1]
    assert shares == pytest.approx(values[:2] / values.sum())
    assert coordinates.var(axis=0, ddof=1) == pytest.approx(values[:2])


@pytest.mark.parametrize(
    ("chosen", "suites", "told"),
    [
        (("base",), ("bad",), "One condition only"),
        (("text-only", STEERED[0]), ("bad", "good"), "nothing is compared with it"),
        (("base", STEERED[0]), ("good",), "No harmful prompts were asked"),
        (("base", STEERED[0]), ("bad", "seen"), "No harmless prompts were asked"),
        (("base", "text-only"), ("bad", "good"), "No questions about pictures"),
    ],
)
def test_what_a_run_lacks_is_said(
    tmp_path: Path, chosen: tuple[str, ...], suites: tuple[str, ...], told: str
) -> None:
    page = page_of(make_run(tmp_path / "run", chosen, suites))
    assert told in page.text
    assert "Hidden states were not measured" in page.text
    assert "Perplexity was not measured" in page.text
    assert page.text.count("Not measured for this run.") == 2


def test_a_run_of_errors_alone_and_without_settings_has_a_report(tmp_path: Path) -> None:
    [item] = harmful(1)
    path = write_run(tmp_path / "run", [item], [answer(item, "base", "", error="gone")])
    judge_run(path)
    page = page_of(path)
    assert "No condition has an answer to sum up." in page.text
    assert words(page.tables["errors"][1][3]) == "gone"


def test_a_run_that_is_not_judged_has_none(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("base",), ("bad",))
    (path / "judged.jsonl").unlink()
    with pytest.raises(EvaluationError, match="not judged"):
        report.write(path)
