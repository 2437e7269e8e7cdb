"""The README's pictures: what is drawn of an answer of Prometheus, told by the text in the picture.

The answers are made here, by the labels that each expression groups by. That the expressions find
something in a real Prometheus is for tests/test_observability.py.
"""

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra `eval` has it")
from PIL import Image

from deploy.grafana.drawing import lines, tables
from deploy.grafana.drawing.board import ORIGIN, drawn
from deploy.grafana.drawing.kinds import buckets, spans
from deploy.grafana.drawing.results import (
    Json,
    PictureError,
    Prometheus,
    Result,
    Series,
    Window,
    legend,
)
from deploy.grafana.drawing.sheet import NAMED
from deploy.grafana.drawing.units import formatted
from deploy.grafana.pictures import CHOSEN, board_of, draw_all, results, status, window_of
from deploy.grafana.source import panels
from tests.deploy.expressions import label_names

WINDOW = window_of(1_000_000.0, 1_000_040.0)
BOUNDS = {"0.1": 1.0, "1.0": 3.0, "+Inf": 3.0}
Answers = Callable[[httpx.Request], Any]


def prometheus(answers: Answers) -> Prometheus:
    def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"status": "success", "data": answers(request)})

    transport = httpx.MockTransport(respond)
    return Prometheus(httpx.Client(base_url="http://prometheus", transport=transport))


def two_of_each(request: httpx.Request) -> Any:
    """Two series for every query, always 0.25, or buckets for the distributions."""
    asked = request.url.params
    if request.url.path.endswith("exemplars"):
        return [{"exemplars": [{"timestamp": WINDOW.start + 5, "value": "0.5"}]}]
    labels = sorted(label_names(asked["query"]) - {"le"} | {"mode"})  # a recorded series has it
    series = [({name: f"{name}-{which}" for name in labels}, 0.25) for which in "ab"]
    if asked["query"].startswith("sum by (le)"):
        series = [({"le": bound}, value) for bound, value in BOUNDS.items()]
    if "step" not in asked:
        return {"result": [{"metric": m, "value": [0, str(v)]} for m, v in series]}
    return {
        "result": [
            {"metric": m, "values": [[moment, str(v)] for moment in WINDOW.moments]}
            for m, v in series
        ]
    }


def nothing(request: httpx.Request) -> Any:
    return [] if request.url.path.endswith("exemplars") else {"result": []}


def texts(rows: list[list[Result]]) -> list[str]:
    """In the picture, as an SVG."""
    root = ET.fromstring(drawn("A dashboard", rows).svg())
    return [
        "".join(each.itertext()).strip() for each in root.iter("{http://www.w3.org/2000/svg}text")
    ]


def result(panel: Json, *series: Series, window: Window = WINDOW) -> Result:
    panel = panel | {"gridPos": {"w": 12}}
    return Result(panel, panel["title"], window, series)


def course(name: str, *values: float, ref: str = "A", **labels: str) -> Series:
    """As many moments as the window has, the last value on and on."""
    rest = len(WINDOW.moments) - len(values)
    return Series(ref, name, labels, (*values, *(values[-1:] * rest)))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "s", "0 s"),
        (2.5e-7, "s", "250 ns"),
        (0.00025, "s", "250 µs"),
        (0.0404, "s", "40.4 ms"),
        (2.6, "s", "2.6 s"),
        (90, "s", "1.5 min"),
        (7200, "s", "2 hour"),
        (0.194, "percentunit", "19.4%"),
        (0.0086, "percentunit", "0.86%"),
        (1, "percentunit", "100%"),
        (1234, "short", "1.23 K"),
        (2_500_000, "short", "2.5 Mil"),
        (0.5, "short", "0.5"),
        (1234, "none", "1234"),
        (-3, "none", "-3"),
        (1536, "bytes", "1.5 KiB"),
        (2**30, "bytes", "1 GiB"),
        (0.897, "reqps", "0.897 req/s"),
        (12, "ops", "12 ops/s"),
        (math.nan, "s", "–"),
    ],
)
def test_numbers_are_written_as_grafana_writes_them(value: float, unit: str, text: str) -> None:
    assert formatted(value, unit) == text


def test_a_unit_that_no_dashboard_uses_is_refused() -> None:
    with pytest.raises(ValueError, match="furlong"):
        formatted(1, "furlong")


@pytest.mark.parametrize("name", CHOSEN)
def test_titles_series_and_units_are_in_the_picture(name: str) -> None:
    """Every panel of the pictures: each series of the answer is told by name, its value by unit."""
    rows = results(prometheus(two_of_each), name, WINDOW)
    shown = texts(rows)
    assert ORIGIN in shown and "No data" not in shown
    joined = " ".join(shown)
    for each in (panel for row in rows for panel in row):
        assert each.title in joined
        if each.kind in ("timeseries", "state-timeline"):
            assert {series.name for series in each.series} <= set(shown), each.title
        if each.kind in ("timeseries", "stat") and not each.panel["fieldConfig"]["defaults"].get(
            "mappings"
        ):
            assert formatted(0.25, each.unit) in shown, each.title
        if each.kind == "table":
            assert {heading for _, heading in tables.columns(each)} <= set(shown), each.title
        if each.kind == "heatmap":
            assert {formatted(0.1, each.unit), "+Inf"} <= set(shown), each.title


@pytest.mark.parametrize("name", CHOSEN)
def test_the_panels_are_the_dashboards(name: str) -> None:
    """Also the kinds that no picture needs now can be drawn: each that a dashboard has."""
    asked = prometheus(two_of_each)
    chosen = {title for row in CHOSEN[name] for title in row}
    others = [
        each
        for each in board_of(name)["panels"]
        if each["type"] != "row" and each["title"] not in chosen
    ]
    assert others
    shown = texts([[asked.result(each, WINDOW)] for each in others])
    assert "No data" not in shown


@pytest.mark.slow
def test_the_pictures_are_small_files_of_the_right_width(tmp_path: Path) -> None:
    assert draw_all(prometheus(two_of_each), WINDOW, tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in CHOSEN}
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert picture.width == 1280
        assert 10_000 < path.stat().st_size <= 250_000


def test_empty_panels_say_so_and_fail_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = prometheus(nothing)
    num = sum(len(row) for row in CHOSEN["fleet"])
    assert texts(results(asked, "fleet", WINDOW)).count("No data") == num
    empty = draw_all(asked, WINDOW, tmp_path)
    assert len(empty) == sum(len(row) for rows in CHOSEN.values() for row in rows)
    assert status(empty) == 1
    assert "steering-overhead: Overhead by mode" in capsys.readouterr().err
    assert status([]) == 0 and capsys.readouterr().err == ""


def test_a_series_without_a_number_is_none() -> None:
    panel = panels.timeseries("T", "d", "s", panels.target("x", "a"))
    assert result(panel, course("a", math.nan)).is_empty
    both = result(panel, course("a", math.nan), course("b", math.nan, 1.0))
    assert [each.name for each in both.drawn] == ["b"]


def test_what_prometheus_refuses_is_told() -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        return httpx.Response(400, json={"status": "error", "error": "parse error"})

    asked = Prometheus(httpx.Client(base_url="http://x", transport=httpx.MockTransport(refuse)))
    with pytest.raises(PictureError, match="parse error"):
        asked.result(panels.stat("T", "d", "s", "sum("), WINDOW)


def test_variables_are_replaced_in_expressions_and_titles() -> None:
    text = 'f($quantile, a{tenant=~"$tenant"}[$__rate_interval]) (${quantile:text})'
    assert WINDOW.in_expression(text) == 'f(0.95, a{tenant=~".+"}[1m]) (p95)'
    assert WINDOW.in_title("Share ($quantile)") == "Share (p95)"
    assert WINDOW.in_expression("$__range") == "40s"
    with pytest.raises(PictureError, match=r"\$colour has no value"):
        WINDOW.in_expression("a[$colour]")


def test_a_legend_takes_its_labels() -> None:
    assert legend("{{ tenant }} {{mode}} p95", {"tenant": "acme"}) == "acme  p95"


def test_missing_moments_stay_gaps() -> None:
    def with_a_gap(_: httpx.Request) -> Any:
        moments = [WINDOW.moments[0], WINDOW.moments[2]]
        return {"result": [{"metric": {}, "values": [[each, "1"] for each in moments]}]}

    panel = panels.timeseries("T", "d", "s", panels.target("x", "a"))
    (series,) = prometheus(with_a_gap).result(panel, WINDOW).series
    assert series.values[0] == series.values[2] == 1.0 and math.isnan(series.values[1])
    assert len(series.values) == len(WINDOW.moments)


def test_a_change_is_marked_where_it_begins() -> None:
    """And none at the window's own beginning, which says nothing of when it was."""
    begins = {"Policy changes": (0, 1, 7, 8), "Kill switch": (5,)}

    def changed(request: httpx.Request) -> Any:
        name = "Kill switch" if "kill" in request.url.params["query"] else "Policy changes"
        values = [[WINDOW.moments[index], "1"] for index in begins[name]]
        return {"result": [{"metric": {}, "values": values}]}

    found = prometheus(changed).changes(board_of("fleet"), WINDOW)
    assert found == (WINDOW.moments[5], WINDOW.moments[7])


def test_buckets_hold_what_is_theirs_alone() -> None:
    """Prometheus' count everything up to their bound; they come in any order."""
    panel = panels.heatmap("T", "d", "s", "sum by (le) (x)")
    series = [
        course("+Inf", 9.0, le="+Inf"),
        course("0.1", 2.0, le="0.1"),
        course("2", 5.0, le="2"),
    ]
    names, counts = buckets(result(panel, *series))
    assert names == ["0.1", "2", "+Inf"]
    assert [list(row) for row in counts[:, :1]] == [[2.0], [3.0], [4.0]]


def test_states_that_follow_each_other_are_one_bar() -> None:
    words = panels.states(_1=("ready", "green"), _0=("down", "red"))
    panel = panels.timeline("T", "d", words, panels.target("x", "a"))
    series = course("a", 1.0, 1.0, math.nan, 0.0)
    first, third, last = WINDOW.moments[0], WINDOW.moments[2], WINDOW.moments[-1]
    assert spans(series, result(panel, series)) == [
        (first, third, "ready", NAMED["green"]),
        (WINDOW.moments[3], last, "down", NAMED["red"]),
    ]


def test_a_table_joins_its_queries_by_their_labels() -> None:
    panel = panels.table(
        *("T", "d", {"tenant": "Tenant", "mode": "Mode"}),
        {"Info": ("i", ""), "Alpha": ("a", "none"), "p95": ("b", "s"), "On": ("c", "none")},
        sort_by="p95",
        mappings={"On": panels.states(_1=("yes", "green"))},
    )
    acme, beta = ({"tenant": "acme", "mode": "dataset"}, {"tenant": "beta", "mode": "sample"})
    series = [
        Series("A", "", acme | {"job": "x"}, (1.0,)),
        Series("A", "", beta, (1.0,)),
        Series("B", "", {"tenant": "acme"}, (0.2,)),
        Series("C", "", acme, (0.04,)),
        Series("C", "", beta, (4.0,)),
        Series("D", "", {}, (1.0,)),
    ]
    told = result(panel, *series)
    assert [heading for _, heading in tables.columns(told)] == [
        *("Tenant", "Mode", "Alpha", "p95", "On")
    ]
    assert [[text for text, _ in line] for line in tables.cells(told)] == [
        ["beta", "sample", "–", "4 s", "yes"],
        ["acme", "dataset", "0.2", "40 ms", "yes"],
    ]
    assert tables.cells(told)[0][4][1] == NAMED["green"]


def test_colours_are_those_of_the_overrides() -> None:
    panel = panels.timeseries(
        *("T", "d", "reqps", panels.target("x", "{{a}}")),
        overrides=panels.colors({"error": "dark-red"}),
    )
    found = dict(
        (each.name, color)
        for each, color in lines.colored(result(panel, course("ok", 1.0), course("error", 1.0)))
    )
    assert found == {"ok": lines.PALETTE[0], "error": NAMED["dark-red"]}
