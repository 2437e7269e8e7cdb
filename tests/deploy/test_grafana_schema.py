"""The dashboards against JSON Schemas made of Grafana's own types (npm's @grafana/schema).

The schemas are made anew each time, from pinned versions, and not kept here. Keys that no type has
are refused, so a misspelt option does not pass. What Grafana's types leave open (a target's keys,
an annotation's query) is for test_dashboards.py.
"""

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.deploy.expressions import dashboard_files, panels

pytestmark = pytest.mark.slow
PACKAGES = ("@grafana/schema@13.2.3", "ts-json-schema-generator@2.9.0")
TYPES = Path("node_modules", "@grafana", "schema", "dist", "types", "raw")
# By kind of panel: the folder of its types, and whether it has options of its own for fields.
PANELS = {
    "timeseries": ("timeseries", True),
    "stat": ("stat", False),
    "heatmap": ("heatmap", True),
    "table": ("table", True),
    "state-timeline": ("statetimeline", True),
}
# Of the Prometheus plugin, whose types the package does not have.
OF_ANNOTATIONS = {"expr", "step", "titleFormat", "textFormat", "tagKeys", "useValueForTime"}
Check = Callable[[str, str, Any], None]


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """check(folder of types, type, value) raises jsonschema.ValidationError."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("npm is not installed: Grafana's types come from there")
    folder = tmp_path_factory.mktemp("grafana")
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", *PACKAGES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"npm could not install Grafana's types: {done.stderr[-300:]}")
    schemas: dict[str, Any] = {}

    def schema(types: str) -> Any:
        if types not in schemas:
            generator = Path("node_modules", "ts-json-schema-generator", "bin")
            arguments = [
                *(node, generator / "ts-json-schema-generator.js", "--no-type-check"),
                *("--path", TYPES / types / "x" / "types.gen.d.ts", "--type", "*"),
            ]
            made = subprocess.run(
                arguments, cwd=folder, capture_output=True, text=True, timeout=120, check=True
            )
            schemas[types] = json.loads(made.stdout)
        return schemas[types]

    def validate(types: str, name: str, value: Any) -> None:
        whole = schema(types)
        assert name in whole["definitions"], f"{types} has no type {name}"
        jsonschema.validate(value, whole | {"$ref": f"#/definitions/{name}"})

    return validate


def check_dashboard(check: Check, board: dict[str, Any]) -> None:
    board = copy.deepcopy(board)
    for annotation in board["annotations"]["list"]:
        for key in OF_ANNOTATIONS:
            del annotation[key]
    check("dashboard", "Dashboard", board)
    for panel in panels(board):
        folder, has_fields = PANELS[panel["type"]]
        types = f"composable/{folder}/panelcfg"
        check(types, "Options", panel["options"])
        custom = panel["fieldConfig"]["defaults"].get("custom", {})
        assert has_fields or not custom
        if has_fields:
            check(types, "FieldConfig", custom)


@pytest.mark.parametrize("path", dashboard_files(), ids=lambda path: path.stem)
def test_a_dashboard_is_one_by_grafanas_types(check: Check, path: Path) -> None:
    check_dashboard(check, json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("place", ["dashboard", "panel", "options", "custom", "color", "legend"])
def test_a_misspelt_key_is_found_everywhere(check: Check, place: str) -> None:
    (path,) = (path for path in dashboard_files() if path.stem == "serving")
    board = json.loads(path.read_text(encoding="utf-8"))
    panel = next(panel for panel in panels(board) if panel["type"] == "timeseries")
    options, defaults = panel["options"], panel["fieldConfig"]["defaults"]
    places = {"dashboard": board, "panel": panel, "options": options, "legend": options["legend"]}
    places |= {"custom": defaults["custom"], "color": defaults["color"]}
    places[place]["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError):
        check_dashboard(check, board)
