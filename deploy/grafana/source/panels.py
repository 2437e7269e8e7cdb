"""Panels as Grafana's JSON, with what all of them have in common.

One function per kind of panel; where they stand and which number they have is the dashboard's
(board.py). Does not cover queries (queries.py).
"""

from string import ascii_uppercase
from typing import Any

Json = dict[str, Any]
DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
GOOD, WARN, BAD = "green", "orange", "red"
QUANTILES = {"p50": "0.5", "p95": "0.95", "p99": "0.99"}
_TOOLTIP: Json = {"mode": "multi", "sort": "desc"}


def target(expression: str, legend: str = "", *, exemplars: bool = False) -> Json:
    """A query over the time that is shown. exemplars: of histograms that carry request ids."""
    return {
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": expression,
        "legendFormat": legend,
        "format": "time_series",
        "range": True,
        "instant": False,
        "exemplar": exemplars,
    }


def steps(*limits: tuple[float, str], first: str = GOOD) -> Json:
    """Thresholds: colours from a value on; first: below the first of them."""
    rest = [{"value": value, "color": color} for value, color in limits]
    return {"mode": "absolute", "steps": [{"value": None, "color": first}, *rest]}


def states(**texts: tuple[str, str]) -> list[Json]:
    """Words for numbers: `_1=("ready", GOOD)`."""
    options = {
        value.removeprefix("_"): {"text": text, "color": color, "index": index}
        for index, (value, (text, color)) in enumerate(texts.items())
    }
    return [{"type": "value", "options": options}]


def colors(by_name: dict[str, str]) -> list[Json]:
    """Overrides that give series of a name a fixed colour."""
    return [
        _override(name, "color", {"mode": "fixed", "fixedColor": color})
        for name, color in by_name.items()
    ]


def _override(name: str, *pairs: Any) -> Json:
    """pairs: property, value, property, value ..."""
    properties = [{"id": pairs[i], "value": pairs[i + 1]} for i in range(0, len(pairs), 2)]
    return {"matcher": {"id": "byName", "options": name}, "properties": properties}


def _panel(kind: str, title: str, description: str, targets: list[Json], **more: Any) -> Json:
    numbered = [
        each | {"refId": letter} for letter, each in zip(ascii_uppercase, targets, strict=False)
    ]
    told = {"type": kind, "title": title, "description": description, "datasource": DATASOURCE}
    return told | {"targets": numbered} | more


def timeseries(
    title: str,
    description: str,
    unit: str,
    *targets: Json,
    top: float | None = None,
    bottom: float | None = 0,
    is_stacked: bool = False,
    is_stepped: bool = False,
    thresholds: Json | None = None,
    overrides: list[Json] | None = None,
) -> Json:
    """Lines. thresholds: drawn as dashed lines. top, bottom: ends of the axis, else by the data."""
    custom: Json = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if is_stacked else 8,
        "lineInterpolation": "stepAfter" if is_stepped else "linear",
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if is_stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "off" if thresholds is None else "dashed"},
    }
    defaults: Json = {"unit": unit, "color": {"mode": "palette-classic"}, "custom": custom}
    ends = {"min": bottom, "max": top, "thresholds": thresholds}
    defaults |= {name: value for name, value in ends.items() if value is not None}
    legend = {
        "displayMode": "table",
        "placement": "bottom",
        "showLegend": True,
        "calcs": ["mean", "max", "lastNotNull"],
    }
    return _panel(
        *("timeseries", title, description, list(targets)),
        fieldConfig={"defaults": defaults, "overrides": overrides or []},
        options={"legend": legend, "tooltip": _TOOLTIP},
    )


def stat(
    title: str,
    description: str,
    unit: str,
    expression: str,
    *,
    thresholds: Json | None = None,
    mappings: list[Json] | None = None,
    decimals: int | None = None,
) -> Json:
    """One number, its newest, over its course. Grey dash where there is nothing yet."""
    defaults: Json = {
        "unit": unit,
        "noValue": "–",
        "color": {"mode": "thresholds"},
        "thresholds": thresholds or steps(first="text"),
        "mappings": mappings or [],
    }
    if decimals is not None:
        defaults["decimals"] = decimals
    options = {
        "colorMode": "value",
        "graphMode": "none" if mappings else "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "percentChangeColorMode": "standard",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showPercentChange": False,
        "textMode": "auto",
        "wideLayout": True,
    }
    return _panel(
        *("stat", title, description, [target(expression, title)]),
        fieldConfig={"defaults": defaults, "overrides": []},
        options=options,
    )


def heatmap(
    title: str, description: str, unit: str, expression: str, *, exemplars: bool = False
) -> Json:
    """Of a histogram's buckets by `le`; darker: more."""
    options = {
        "calculate": False,
        "cellGap": 1,
        "color": {
            "mode": "scheme",
            "scheme": "Oranges",
            "scale": "exponential",
            "exponent": 0.5,
            "steps": 64,
            "reverse": False,
            "fill": "dark-orange",
        },
        "exemplars": {"color": "rgba(50,116,217,0.8)"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "yHistogram": False},
        "yAxis": {"unit": unit, "axisPlacement": "left", "reverse": False},
    }
    buckets = target(expression, "{{le}}", exemplars=exemplars) | {"format": "heatmap"}
    return _panel(
        *("heatmap", title, description, [buckets]),
        fieldConfig={"defaults": {"unit": unit}, "overrides": []},
        options=options,
    )


def timeline(
    title: str, description: str, mappings: list[Json], *targets: Json, unit: str = "none"
) -> Json:
    """States over time, one bar for each series."""
    defaults = {
        "unit": unit,
        "color": {"mode": "thresholds"},
        "thresholds": steps(first="text"),
        "mappings": mappings,
        "custom": {"fillOpacity": 70, "lineWidth": 0},
    }
    options = {
        "alignValue": "center",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "mergeValues": True,
        "rowHeight": 0.8,
        "showValue": "auto",
        "tooltip": {"mode": "single", "sort": "none"},
    }
    return _panel(
        *("state-timeline", title, description, list(targets)),
        fieldConfig={"defaults": defaults, "overrides": []},
        options=options,
    )


def table(
    title: str,
    description: str,
    labels: dict[str, str],
    columns: dict[str, tuple[str, str]],
    *,
    sort_by: str,
    mappings: dict[str, list[Json]] | None = None,
) -> Json:
    """One line for each set of labels, as it is now.

    labels: the heading of each label's column. columns: by heading, an expression and its unit;
    unit "": only which labels there are, no column. Needs two or more, so that Grafana tells their
    values apart (`Value #A`). mappings: by heading.
    """
    assert len(columns) > 1
    queries, renamed, overrides, hidden = [], dict(labels), [], {"Time": True}
    for letter, (heading, (expression, unit)) in zip(
        ascii_uppercase, columns.items(), strict=False
    ):
        queries.append(target(expression) | {"format": "table", "range": False, "instant": True})
        if unit:
            renamed[f"Value #{letter}"] = heading
            words = (mappings or {}).get(heading)
            more = ("mappings", words) if words else ()
            overrides.append(_override(heading, "unit", unit, *more))
        else:
            hidden[f"Value #{letter}"] = True
    order = {name: index for index, name in enumerate(renamed)}
    organize = {"excludeByName": hidden, "renameByName": renamed, "indexByName": order}
    custom = {"align": "auto", "cellOptions": {"type": "auto"}, "inspect": False}
    sort = [{"displayName": sort_by, "desc": sort_by not in labels.values()}]
    return _panel(
        *("table", title, description, queries),
        fieldConfig={"defaults": {"unit": "none", "custom": custom}, "overrides": overrides},
        options={"frameIndex": 0, "showHeader": True, "cellHeight": "sm", "sortBy": sort},
        transformations=[
            {"id": "merge", "options": {}},
            {"id": "organize", "options": organize},
        ],
    )
