"""Every PromQL expression of the dashboards and rules in deploy/, and the names within each.

Reads the files that are deployed, not what they were made of. Does not run anything.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = DEPLOY / "grafana" / "dashboards"
RULES = DEPLOY / "prometheus" / "rules"
Kind = Literal["panel", "variable", "annotation", "recording", "alert"]

_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))")
_LABEL_VALUES = re.compile(r"label_values\((.+), *(\w+)\)")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTOR = re.compile(r"([A-Za-z_:][\w:]*)?\s*\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*("(?:[^"\\]|\\.)*")')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_NAME = re.compile(r"\b[A-Za-z_:][\w:]*\b(?!\s*\()")
_KEYWORDS = {"and", "or", "unless", "offset", "bool", "inf", "nan", "by", "without", "on"}


@dataclass(frozen=True)
class Expression:
    """where: for people, e.g. `serving.json: Tokens (A)`. text: as written, with variables.

    label: of a variable, whose values it asks for; its text is a selector.
    legend: of a panel, with `{{label}}`; of an alert, its annotations.
    record: of a recording rule, its name.
    """

    kind: Kind
    where: str
    text: str
    legend: str = ""
    label: str = ""
    record: str = ""

    @property
    def metrics(self) -> set[str]:
        """The names of all metrics and recorded series in it."""
        return metric_names(self.text)

    @property
    def labels(self) -> set[str]:
        """That it filters, groups or joins by, asks for or shows."""
        shown = re.findall(r"{{\s*(?:\$labels\.)?(\w+)\s*}}", self.legend)
        return label_names(self.text) | set(shown) | ({self.label} if self.label else set())


def dashboard_files() -> list[Path]:
    return sorted(DASHBOARDS.glob("*.json"))


def rule_files() -> list[Path]:
    return sorted(RULES.glob("*.yml"))


def all_expressions() -> list[Expression]:
    dashboards = [each for path in dashboard_files() for each in of_dashboard(path)]
    return dashboards + [each for path in rule_files() for each in of_rules(path)]


def of_dashboard(path: Path) -> list[Expression]:
    """Of its panels (those in rows, too), variables and annotations."""
    board = json.loads(path.read_text(encoding="utf-8"))
    return [
        *_of_panels(board, path.name),
        *_of_variables(board, path.name),
        *(
            Expression("annotation", f"{path.name}: {each['name']}", each["expr"])
            for each in board["annotations"]["list"]
        ),
    ]


def of_rules(path: Path) -> list[Expression]:
    """Of one file of recording rules and alerts."""
    rules = [
        rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
    ]
    return [_of_rule(rule, path.name) for rule in rules]


def _of_rule(rule: dict[str, Any], file: str) -> Expression:
    if "record" in rule:
        where = f"{file}: {rule['record']}"
        return Expression("recording", where, rule["expr"], record=rule["record"])
    told = " ".join(rule.get("annotations", {}).values())
    return Expression("alert", f"{file}: {rule['alert']}", rule["expr"], legend=told)


def panels(board: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All but the rows."""
    for panel in board["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def _of_panels(board: Mapping[str, Any], file: str) -> Iterator[Expression]:
    for panel in panels(board):
        for target in panel["targets"]:
            where = f"{file}: {panel['title']} ({target['refId']})"
            yield Expression("panel", where, target["expr"], legend=target["legendFormat"])


def _of_variables(board: Mapping[str, Any], file: str) -> Iterator[Expression]:
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            asked = _LABEL_VALUES.fullmatch(variable["query"]["query"])
            assert asked, f"{file}: {variable['name']} is no label_values(selector, label)"
            where = f"{file}: ${variable['name']}"
            yield Expression("variable", where, asked[1], label=asked[2])


def variables_in(text: str) -> set[str]:
    """The names of Grafana's variables."""
    return {braced or bare for braced, bare in _VARIABLE.findall(text)}


def substituted(text: str, values: Mapping[str, str]) -> str:
    """With Grafana's variables replaced. Raises KeyError for one that has no value."""
    return _VARIABLE.sub(lambda found: values[found[1] or found[2]], text)


def metric_names(text: str) -> set[str]:
    """Those before a selector, those alone, and those that `__name__` is matched with."""
    names: set[str] = set()
    for name, matchers in _SELECTOR.findall(text):
        names |= {name} if name else set()
        for label, value in _MATCHER.findall(matchers):
            if label == "__name__":
                names |= set(value.strip('"').split("|"))
    bare = _SELECTOR.sub(" ", text)
    bare = _STRING.sub(" ", _GROUPING.sub(" ", bare))
    bare = _VARIABLE.sub(" ", re.sub(r"\[[^\]]*\]", " ", bare))
    bare = re.sub(r"\b\d+[a-z]+\b|\boffset\s+\S+", " ", bare)
    return names | {name for name in _NAME.findall(bare) if name.lower() not in _KEYWORDS}


def label_names(text: str) -> set[str]:
    """Those of matchers, groupings and joins."""
    labels = {
        label
        for _, matchers in _SELECTOR.findall(text)
        for label, _ in _MATCHER.findall(matchers)
        if label != "__name__"
    }
    for group in _GROUPING.findall(text):
        labels |= {label.strip() for label in group.split(",") if label.strip()}
    return labels
