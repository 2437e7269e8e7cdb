"""The Grafana dashboards as files: layout, queries, variables, names; every expression parses.

Whether the queries find anything is for tests/test_observability.py, whether Grafana's own types
allow the files for test_grafana_schema.py. No Grafana has ever loaded them here.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.build import DASHBOARDS, text_of
from server.metrics.catalogue import RequestFamilies, StateFamilies
from server.metrics.families import Family
from tests.deploy.expressions import (
    DEPLOY,
    Expression,
    all_expressions,
    dashboard_files,
    of_dashboard,
    panels,
    substituted,
    variables_in,
)
from tests.prometheus_server import PrometheusServer

GRAFANA = DEPLOY / "grafana"
KINDS = {"timeseries", "stat", "heatmap", "table", "state-timeline"}
UNITS = {"s", "percentunit", "reqps", "ops", "short", "none", "bytes"}
BUILT_IN = {"__rate_interval", "__range", "__all"}
VALUES = {
    **{"model": ".+", "replica": ".+", "tenant": ".+", "quantile": "0.95"},
    **{"__rate_interval": "1m", "__range": "1h"},
}
# Labels of every series: the server's, and those that Prometheus adds.
EVERYWHERE = {"model_name", "instance", "job", "namespace"}
FAMILIES: list[Family] = [*RequestFamilies("m"), *StateFamilies("m")]
LABELS = {family.name: set(family.labels) for family in FAMILIES}
NOT_OURS = {"up", "process_start_time_seconds", "process_cpu_seconds_total",
            "process_resident_memory_bytes"}  # fmt: skip
RECORDED = {each.record for each in all_expressions() if each.record}
EXPRESSIONS = all_expressions()


@pytest.fixture(params=dashboard_files(), ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture
def board(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def of_folder(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((GRAFANA / "provisioning" / name).read_text()))


def test_the_files_are_what_their_sources_say() -> None:
    assert {path.stem for path in dashboard_files()} == set(DASHBOARDS)
    for path in dashboard_files():
        told = "run: python -m deploy.grafana.build"
        assert path.read_text(encoding="utf-8") == text_of(DASHBOARDS[path.stem]()), told


def test_a_dashboard_says_what_it_is(path: Path, board: dict[str, Any]) -> None:
    assert board["uid"] == f"deshift-{path.stem}"
    assert board["title"].startswith("Deshift / ") and board["description"].endswith(".")
    assert board["schemaVersion"] >= 39
    assert "id" not in board  # Grafana's own number of it


def test_the_dashboards_lead_to_each_other(board: dict[str, Any]) -> None:
    (link,) = board["links"]
    assert link["type"] == "dashboards" and set(link["tags"]) == set(board["tags"]) == {"deshift"}
    assert link["includeVars"] and link["keepTime"]


def test_panels_have_numbers_of_their_own_and_stand_apart(board: dict[str, Any]) -> None:
    assert max(Counter(panel["id"] for panel in board["panels"]).values()) == 1
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                other = taken.setdefault((x, y), panel["title"])
                assert other == panel["title"], f"{panel['title']} lies over {other}"


def test_every_line_of_panels_is_full(board: dict[str, Any]) -> None:
    """No holes, so that nothing moves when Grafana packs the panels upwards."""
    widths: Counter[int] = Counter()
    for panel in board["panels"]:
        widths[panel["gridPos"]["y"]] += panel["gridPos"]["w"]
    assert set(widths.values()) == {24}, widths


def test_every_panel_says_what_it_shows(board: dict[str, Any]) -> None:
    titles = [panel["title"] for panel in panels(board)]
    assert len(set(titles)) == len(titles)
    for panel in panels(board):
        title = panel["title"]
        assert panel["type"] in KINDS, title
        assert len(panel["description"]) > 10 and panel["description"].endswith("."), title
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, title
        if panel["type"] in ("timeseries", "state-timeline"):
            assert panel["options"]["legend"]["showLegend"], title
            assert all(target["legendFormat"] for target in panel["targets"]), title


def test_every_query_asks_the_chosen_data_source(board: dict[str, Any]) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels(board):
        assert panel["targets"], panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs), panel["title"]
        for target in panel["targets"]:
            assert target["expr"].strip() and target["range"] is not target["instant"]
            assert (target["format"] == "table") == (panel["type"] == "table")
            assert (target["format"] == "heatmap") == (panel["type"] == "heatmap")
    assert _data_sources(board) == [chosen]


def _data_sources(part: Any) -> list[Any]:
    """Every different one that is named anywhere."""
    found: list[Any] = []
    if isinstance(part, dict):
        found = [part["datasource"]] if "datasource" in part else []
        part = list(part.values())
    if isinstance(part, list):
        found += [each for inner in part for each in _data_sources(inner)]
    return [each for place, each in enumerate(found) if each not in found[:place]]


def test_variables_are_defined_and_each_is_used(path: Path, board: dict[str, Any]) -> None:
    defined = {variable["name"]: variable for variable in board["templating"]["list"]}
    text = json.dumps([board["panels"], board["annotations"], board["templating"]])
    assert variables_in(text) - BUILT_IN == set(defined)
    assert {"datasource", "model", "replica", "tenant"} <= set(defined)
    for name in ("model", "replica", "tenant"):
        assert defined[name]["multi"] and defined[name]["includeAll"]
    asked = {each.where.split("$")[1]: each for each in of_dashboard(path) if each.label}
    assert {name: each.label for name, each in asked.items()} == {
        "model": "model_name",
        "replica": "instance",
        "tenant": "tenant",
    }


def test_policy_changes_and_the_kill_switch_are_marked(path: Path) -> None:
    marks = [each for each in of_dashboard(path) if each.kind == "annotation"]
    assert [each.metrics for each in marks] == [
        {"deshift_policy_revision"},
        {"deshift_kill_switch"},
    ]


def test_exemplars_are_asked_for_where_there_are_any(board: dict[str, Any]) -> None:
    """And once in a panel: its quantiles are of the same buckets."""
    have = ("steering_overhead_seconds", "time_to_first_token_seconds", "e2e_request_latency")
    for panel in panels(board):
        asking = [target for target in panel["targets"] if target.get("exemplar")]
        assert len(asking) <= 1, panel["title"]
        assert all(any(name in each["expr"] for name in have) for each in asking), panel["title"]
    if board["uid"] != "deshift-fleet":
        assert any(t["exemplar"] for panel in panels(board) for t in panel["targets"])


def family_of(name: str) -> str | None:
    """The metric that a series' name belongs to; None: there is no such metric."""
    for suffix in ("_bucket", "_sum", "_count"):
        base = name.removesuffix(suffix)
        if base != name and any(f.name == base and f.kind == "histogram" for f in FAMILIES):
            return base
    is_plain = any(f.name == name and f.kind != "histogram" for f in FAMILIES)
    return name if is_plain else None


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda each: each.where)
def test_every_name_is_one_that_the_server_exports(expression: Expression) -> None:
    """Metrics and labels, by the registry that the README's table is made of."""
    assert expression.metrics or expression.kind == "recording", "only rules record constants"
    allowed = EVERYWHERE | {"le"}
    for name in expression.metrics - NOT_OURS - RECORDED:
        family = family_of(name)
        assert family is not None, f"{expression.where}: {name} is no metric of the server"
        allowed |= LABELS[family]
    if not expression.metrics & RECORDED:  # their labels are those of their own rules
        assert expression.labels <= allowed, expression.where


@pytest.mark.parametrize(
    "expression", [e for e in EXPRESSIONS if e.kind == "panel"], ids=lambda each: each.where
)
def test_every_query_is_narrowed_by_the_variables(expression: Expression) -> None:
    for selector in re.findall(r"\bdeshift_\w+(\{[^}]*\})?", expression.text):
        assert 'model_name=~"$model"' in selector and 'instance=~"$replica"' in selector
    for name, selector in re.findall(r"\b(deshift_\w+)\{([^}]*)\}", expression.text):
        has_tenant = "tenant" in LABELS[family_of(name) or name]
        assert ('tenant=~"$tenant"' in selector) == has_tenant, name


def test_legends_show_labels_that_the_result_has() -> None:
    """A label that was summed away would be an empty place in the legend."""
    for each in EXPRESSIONS:
        if each.kind == "panel":
            shown = set(re.findall(r"{{(\w+)}}", each.legend))
            kept = re.findall(r"(?:\bby|group_left) \(([^)]*)\)", each.text)
            names = {label.strip() for group in kept for label in group.split(",")}
            whole = {"mode"} if each.metrics <= RECORDED else set()
            assert shown <= names | whole, f"{each.where}: {each.legend}"


def test_a_real_prometheus_parses_every_expression(tmp_path: Path) -> None:
    problems = []
    with PrometheusServer(tmp_path) as prometheus:
        for each in EXPRESSIONS:
            problem = prometheus.syntax_problem(substituted(each.text, VALUES))
            problems += [f"{each.where}: {problem}"] if problem else []
        assert prometheus.syntax_problem("sum(rate(deshift_requests_total[1m])")
    assert not problems


def test_the_provisioned_folder_is_where_compose_mounts_the_dashboards() -> None:
    (provider,) = of_folder("dashboards/deshift.yml")["providers"]
    compose = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())
    mounts = dict(each.split(":")[:2] for each in compose["services"]["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"


def test_the_data_source_is_the_prometheus_that_scrapes_as_often() -> None:
    (source,) = of_folder("datasources/prometheus.yml")["datasources"]
    assert source["type"] == "prometheus" and source["isDefault"] is True
    assert source["url"] == "http://prometheus:9090"
    scraping = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == scraping["scrape_interval"]


def test_there_is_something_of_each_kind_to_check() -> None:
    kinds = Counter(each.kind for each in EXPRESSIONS)
    assert kinds["panel"] > 100 and kinds["variable"] == 9 and kinds["annotation"] == 6
    assert kinds["alert"] > 10 and kinds["recording"] > 10
