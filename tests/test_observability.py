"""Dashboards and rules against a real fleet that a real Prometheus scraped under a mixed load.

Every expression of every panel, variable, annotation and rule is run as Grafana or Prometheus would
run it, and has to find something. That the files are well formed is for tests/deploy/.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.expressions import (
    DASHBOARDS,
    Expression,
    all_expressions,
    dashboard_files,
    of_dashboard,
    rule_files,
    substituted,
)
from tests.fleet import TENANT, until
from tests.observed import POLICIES, Observed, observed_fleet

pytestmark = pytest.mark.slow
ANYTHING = {"model": ".+", "replica": ".+", "tenant": ".+", "quantile": "0.95"}
INTERVALS = {"__rate_interval": "20s", "__range": "5m"}
# What these look for did not happen: pictures that could not be steered and were answered anyway.
QUIET = {'deshift_steering_skipped_total{reason=~"vectors-unavailable|shift-failed"}'}
_SELECTOR = re.compile(r"[\w:]*\{[^}]*\}")


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    with observed_fleet(tmp_path_factory.mktemp("observed")) as observed:
        yield observed


def results(observed: Observed, each: Expression, **chosen: str) -> list[dict[str, Any]]:
    """The series that have a number, with their labels; over all that was driven, as panels ask."""
    text = substituted(each.text, ANYTHING | INTERVALS | chosen)
    found = observed.prometheus.query_range(text, observed.start, observed.end)
    return [series for series in found if any(_is_number(value) for _, value in series["values"])]


def _is_number(text: str) -> bool:
    return math.isfinite(float(text))


def problems(observed: Observed, expressions: list[Expression]) -> list[str]:
    """What is wrong with each: a metric that does not exist, a selector or result that is empty,
    a legend's label that the result has not."""
    found = [(each.where, problem) for each in expressions for problem in _problems(observed, each)]
    return [f"{where}: {problem}" for where, problem in found]


def _problems(observed: Observed, each: Expression) -> Iterator[str]:
    prometheus, window = observed.prometheus, (observed.start, observed.end)
    for name in sorted(each.metrics):
        if not prometheus.series(name, *window):
            yield f"no series of {name}"
    for selector in _SELECTOR.findall(each.text):
        asked = substituted(selector, ANYTHING)
        if selector not in QUIET and not prometheus.series(asked, *window):
            yield f"nothing found by {asked}"
    if each.kind == "variable":
        if not prometheus.label_values(each.label, substituted(each.text, ANYTHING)):
            yield f"no value of {each.label}"
    elif each.kind == "alert":
        prometheus.query(each.text)  # silent, unless what it warns of has happened
    elif not (series := results(observed, each)):
        yield f"an empty result: {each.text}"
    else:
        for label in re.findall(r"{{(\w+)}}", each.legend):
            if not all(one["metric"].get(label) for one in series):
                yield f"its legend shows {label}, which the result has not"


def test_every_expression_finds_what_it_asks_for(observed: Observed) -> None:
    expressions = all_expressions()
    assert {each.kind for each in expressions} == {
        *("panel", "variable", "annotation", "recording", "alert")
    }
    assert problems(observed, expressions) == []


@pytest.mark.parametrize("path", dashboard_files(), ids=lambda path: path.stem)
def test_a_renamed_metric_is_found_out(observed: Observed, path: Path, tmp_path: Path) -> None:
    """The check above can fail: one metric of each dashboard, under a name that nobody exports."""
    renamed = {
        "steering-overhead": "deshift_steering_alpha",
        "serving": "deshift_inter_token_latency_seconds",
        "fleet": "deshift_store_revision",
    }[path.stem]
    copy = tmp_path / path.name
    copy.write_text(path.read_text(encoding="utf-8").replace(renamed, f"{renamed}_was"))
    told = problems(observed, of_dashboard(copy))
    assert told and all(f"{renamed}_was" in each for each in told)
    changed = [each for each in of_dashboard(path) if renamed in each.text]
    assert all(any(each.where in one for one in told) for each in changed)


def test_rules_are_evaluated_without_an_error(observed: Observed) -> None:
    rules = observed.prometheus.rules()
    assert {rule["name"] for rule in rules} >= {e.record for e in all_expressions() if e.record}
    assert len(rules) == sum(each.kind in ("recording", "alert") for each in all_expressions())
    assert {(rule["health"], rule.get("lastError", "")) for rule in rules} == {("ok", "")}
    assert len(rule_files()) == 2


def test_no_critical_alert_holds_once_all_is_well_again(observed: Observed) -> None:
    """Not even one that would have to hold for a while before it is sent."""
    rules = observed.prometheus.rules()
    critical = {r["name"] for r in rules if r.get("labels", {}).get("severity") == "critical"}
    assert len(critical) > 5
    for each in all_expressions():
        if each.kind == "alert" and each.where.split(": ")[1] in critical:
            assert observed.prometheus.query(each.text) == [], each.where


def expression(title: str, file: str = "steering-overhead.json") -> Expression:
    found = [e for e in of_dashboard(DASHBOARDS / file) if e.where == f"{file}: {title}"]
    assert len(found) == 1, title
    return found[0]


def test_a_change_of_alpha_is_read_from_the_panel(observed: Observed) -> None:
    panel = substituted(
        expression("Alpha in force (A)").text, ANYTHING | INTERVALS | {"tenant": TENANT}
    )
    assert observed.fleet.change(0.37).status_code == 200

    def shown() -> list[tuple[str, float]]:
        found = observed.prometheus.query(panel)
        return [(each["metric"]["tenant"], float(each["value"][1])) for each in found]

    until(lambda: shown() == [(TENANT, 0.37)], "the panel shows the new alpha")
    each = f'deshift_steering_alpha{{tenant="{TENANT}"}}'
    until(
        lambda: [one["value"][1] for one in observed.prometheus.query(each)] == ["0.37"] * 2,
        "both replicas say so",
    )


def test_the_counters_are_what_clients_saw(observed: Observed) -> None:
    """By outcome, and by tenant and what was done to the pictures."""
    seen, requests = observed.seen, "deshift_requests_total"
    until(lambda: observed.total(requests, "outcome") == seen.outcomes, "all is counted")
    assert observed.total(f'{requests}{{outcome="success"}}', "tenant") == seen.succeeded
    steered = observed.total("deshift_steering_overhead_seconds_count", "tenant", "mode")
    assert steered == seen.steered
    assert observed.total("deshift_steering_skipped_total", "tenant", "reason") == seen.skipped
    assert {each.split(" ")[1] for each in seen.skipped} == {
        *("text-only", "disabled", "alpha-zero", "rollout", "kill-switch")
    }


def test_labels_hold_what_they_should(observed: Observed) -> None:
    def values(label: str, metric: str) -> set[str]:
        return set(observed.prometheus.label_values(label, metric))

    replicas = {each.admin.removeprefix("http://") for each in observed.fleet.replicas}
    assert values("instance", "deshift_replica_info") == replicas
    assert values("replica", "deshift_replica_info") == {"one", "two"}
    assert values("model_name", '{__name__=~"deshift_.+"}') == {"tiny-llava"}
    assert values("mode", "deshift_requests_total") == {"off", "dataset", "sample"}
    assert values("mode", "deshift_steering_overhead_seconds_count") == {"dataset", "sample"}
    assert values("tenant", "deshift_steering_alpha") == {TENANT, "default", *POLICIES}
    stages = {"inject", "store", "admission"}
    for mode, own in (("dataset", stages), ("sample", stages | {"shift"})):
        assert values("stage", f'deshift_steering_stage_seconds_count{{mode="{mode}"}}') == own
    assert values("vector_id", "deshift_vectors_info") == {observed.fleet.vector}


def test_the_variables_narrow_what_is_shown(observed: Observed) -> None:
    panel = expression("Overhead by tenant and mode (${quantile:text}) (A)")
    of_all = {each["metric"]["tenant"] for each in results(observed, panel)}
    assert of_all - {"limited"} == {TENANT, "default", "sampled"}  # it has too few to be sure of
    of_two = results(observed, panel, tenant=f"({TENANT}|sampled)")
    assert {each["metric"]["tenant"] for each in of_two} == {TENANT, "sampled"}
    (address, _) = sorted(each.admin.removeprefix("http://") for each in observed.fleet.replicas)
    waiting = expression("Queue by replica (A)", "serving.json")
    of_one = results(observed, waiting, replica=re.escape(address).replace("\\", "\\\\"))
    assert [each["metric"]["instance"] for each in of_one] == [address]
    assert not results(observed, panel, model="another-model")


def test_exemplars_lead_to_requests(observed: Observed) -> None:
    """Their ids are those that clients were given, and stand in a replica's log."""
    logs = [(observed.fleet.folder / f"{name}.log").read_text() for name in ("one", "two")]
    for metric in (
        *("deshift_steering_overhead_seconds", "deshift_time_to_first_token_seconds"),
        "deshift_e2e_request_latency_seconds",
    ):
        found = observed.prometheus.exemplars(f"{metric}_bucket", observed.start, observed.end)
        ids = {one["labels"]["request_id"] for each in found for one in each["exemplars"]}
        assert ids, metric
        answered = ids & observed.seen.request_ids
        assert answered and all(any(one in log for log in logs) for one in ids)


def test_changes_and_the_kill_switch_are_marked_when_they_were(observed: Observed) -> None:
    for name, label, values in (
        ("Policy changes", "tenant", {TENANT}),
        ("Kill switch", "action", {"unsteered", "reject"}),
    ):
        marks = results(observed, expression(name))
        assert {each["metric"][label] for each in marks} == values
