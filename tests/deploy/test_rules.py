"""Prometheus' configuration, rules and their unit tests, by the real promtool; the runbook.

Does not cover whether a server has the metrics that the rules ask for (test_observability.py).
"""

import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperGroup

from server.cli.main import app
from tests.redis_server import program

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
RUNBOOK = DEPLOY / "RUNBOOK.md"
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))


def promtool(*arguments: str | Path) -> str:
    """What it says; fails with that where it finds anything wrong."""
    command = [program("promtool"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "rules" / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}
RECORDED = {rule["record"] for rule in rules("recording.yml")}


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def sections() -> dict[str, str]:
    """The runbook's text by the anchors of its headings of the third level."""
    parts = re.split(r"^### (.+)$", RUNBOOK.read_text(), flags=re.MULTILINE)
    return {anchor(heading): text for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


def test_prometheus_takes_the_configuration() -> None:
    said = promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert "2 rule files found" in said
    assert f"{len(ALERTS)} rules found" in said


def test_the_example_of_more_replicas_is_a_file_of_targets(tmp_path: Path) -> None:
    """promtool reads the files in targets/, too, when it checks the configuration."""
    (tmp_path / "rules").symlink_to(PROMETHEUS / "rules")
    (tmp_path / "targets").mkdir()
    example = (PROMETHEUS / "targets" / "replicas.yml.example").read_text()
    (tmp_path / "targets" / "replicas.yml").write_text(example)
    config = tmp_path / "prometheus.yml"
    config.write_text((PROMETHEUS / "prometheus.yml").read_text())
    assert "does not exist" not in promtool("check", "config", config)
    assert len(yaml.safe_load(example)[0]["targets"]) == 2


def test_the_scraped_target_is_the_compose_service() -> None:
    (job,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert job["job_name"] == "deshift"  # the rules look for this name
    assert job["static_configs"] == [{"targets": ["deshift:8001"]}]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_the_rules_do_what_their_unit_tests_say(path: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", path)


def test_a_unit_test_that_expects_something_else_fails(tmp_path: Path) -> None:
    """So that the tests above can."""
    text = (PROMETHEUS / "tests" / "recording.yml").read_text()
    wrong = text.replace("value: 0.75}", "value: 0.76}")
    assert wrong != text
    path = tmp_path / "wrong.yml"
    path.write_text(wrong.replace("../rules", str(PROMETHEUS / "rules")))
    command = [program("promtool"), "test", "rules", path]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode != 0


def test_every_alert_has_a_test_where_it_fires_and_one_where_it_does_not() -> None:
    fires: Counter[str] = Counter()
    is_silent: Counter[str] = Counter()
    for path in TESTS:
        for group in yaml.safe_load(path.read_text())["tests"]:
            for case in group.get("alert_rule_test", []):
                (fires if case.get("exp_alerts") else is_silent)[case["alertname"]] += 1
    assert fires.keys() == ALERTS.keys()
    assert is_silent.keys() == ALERTS.keys()


def test_every_recording_rule_has_a_unit_test() -> None:
    text = (PROMETHEUS / "tests" / "recording.yml").read_text()
    asked = " ".join(re.findall(r"expr: (.*)", text))
    assert {name for name in RECORDED if not re.search(rf"\b{name}\b", asked)} == set()


def test_what_the_alerts_take_from_recording_rules_is_recorded() -> None:
    taken = set(re.findall(r"\w*:\w+:\w+", " ".join(rule["expr"] for rule in ALERTS.values())))
    assert taken, "no alert takes anything from a recording rule"
    assert taken - RECORDED == set()


@pytest.mark.parametrize("alert", ALERTS.values(), ids=ALERTS)
def test_an_alert_says_how_bad_it_is_what_it_means_and_what_to_do(alert: dict[str, Any]) -> None:
    annotations, severity = alert["annotations"], alert["labels"]["severity"]
    assert alert["labels"] == {"severity": severity}
    assert severity in ("critical", "warning", "info")
    assert annotations.keys() == {"summary", "description", "runbook"}
    assert all(annotations.values())
    file, _, place = annotations["runbook"].partition("#")
    assert DEPLOY.parent / file == RUNBOOK
    assert place == anchor(alert["alert"])
    section = sections()[place]
    assert section.strip().startswith(f"*{severity}.*")
    for word in ("**Means:**", "**Users see:**", "ook", "o:**"):
        assert word in re.sub(r"\s+", " ", section), f"{alert['alert']} does not say {word}"


def test_the_runbook_has_no_section_without_an_alert() -> None:
    assert sections().keys() == {anchor(name) for name in ALERTS}


def test_links_within_the_runbook_lead_somewhere() -> None:
    linked = set(re.findall(r"\]\(#([^)]+)\)", RUNBOOK.read_text()))
    assert linked
    assert linked - sections().keys() == set()


def commands() -> list[str]:
    """Every `deshift ...` line of the runbook's code blocks, comments cut off."""
    blocks = re.findall(r"^```\n(.*?)^```", RUNBOOK.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    return sorted(
        {line.partition("  #")[0].strip() for line in lines if line.startswith("deshift ")}
    )


def parse(line: str) -> None:
    """Parse a command's words as it would itself, and run nothing. Raises what it exits with."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("deshift", shlex.split(line)[1:])
    while isinstance(command, TyperGroup):
        rest = [*context._protected_args, *context.args]  # as a group's own `invoke` takes them
        if not rest:
            if not command.invoke_without_command:
                context.fail("a subcommand is missing")
            return
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_runbook_is_one_that_deshift_takes(line: str) -> None:
    parse(line)


@pytest.mark.parametrize(
    "line",
    [
        "deshift polcy show acme",
        "deshift policy",
        "deshift policy set acme",
        "deshift policy set acme --alfa 1 --reason x",
        "deshift kill maybe --reason x",
        "deshift audit revert newest --reason x",
        "deshift replicas all",
    ],
)
def test_a_command_that_deshift_does_not_take_is_found_out(line: str) -> None:
    with pytest.raises(Exception) as raised:
        parse(line)
    assert getattr(raised.value, "exit_code", None) == 2, "not for the way it is used"
