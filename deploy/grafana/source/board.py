"""A dashboard: where its panels stand, and the variables, annotations and links of all."""

from deploy.grafana.source.panels import DATASOURCE, Json
from deploy.grafana.source.queries import REPLICA, select

COLUMNS = 24
TAG = "deshift"
SCHEMA_VERSION = 42  # of Grafana 12.2 and 13; later ones bring it up to date as they load it


class Board:
    """Panels from left to right, in rows with headings."""

    def __init__(self, uid: str, title: str, description: str, *extra_variables: Json) -> None:
        self.uid = uid
        self._about = {"uid": uid, "title": title, "description": description}
        self._extra_variables = extra_variables
        self._panels: list[Json] = []
        self._x = self._y = self._line_height = 0

    def row(self, title: str) -> None:
        self._break_line()
        self._place({"type": "row", "title": title, "collapsed": False, "panels": []}, COLUMNS, 1)
        self._break_line()

    def add(self, width: int, height: int, *panels: Json) -> None:
        """width: of the 24 columns; height: in Grafana's units of 30 pixels."""
        for panel in panels:
            if self._x + width > COLUMNS:
                self._break_line()
            self._place(panel, width, height)

    def json(self) -> Json:
        return self._about | {
            "schemaVersion": SCHEMA_VERSION,
            "tags": [TAG],
            "editable": True,
            "graphTooltip": 1,  # one crosshair on all panels
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "timezone": "browser",
            "links": [LINKS],
            "templating": {"list": [*VARIABLES, *self._extra_variables]},
            "annotations": {"list": ANNOTATIONS},
            "panels": self._panels,
        }

    def _place(self, panel: Json, width: int, height: int) -> None:
        place = {"x": self._x, "y": self._y, "w": width, "h": height}
        self._panels.append({"id": len(self._panels) + 1, **panel, "gridPos": place})
        self._x += width
        self._line_height = max(self._line_height, height)

    def _break_line(self) -> None:
        self._y += self._line_height
        self._x = self._line_height = 0


LINKS: Json = {
    "type": "dashboards",
    "title": "Deshift",
    "tooltip": "The other dashboards of Deshift, for the same model, replicas, tenants and time",
    "tags": [TAG],
    "asDropdown": False,
    "icon": "external link",
    "includeVars": True,
    "keepTime": True,
    "targetBlank": False,
}


def _values_of(label: str, selector: str, *, name: str, heading: str) -> Json:
    """A variable with every value that a label has; several may be chosen, at first all."""
    query = f"label_values({selector}, {label})"
    return {
        "type": "query",
        "name": name,
        "label": heading,
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "refresh": 2,  # with the time range, for what came and went
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


VARIABLES: list[Json] = [
    {
        "type": "datasource",
        "name": "datasource",
        "label": "Data source",
        "query": "prometheus",
        "refresh": 1,
    },
    _values_of("model_name", "deshift_replica_info", name="model", heading="Model"),
    _values_of(
        "instance",
        'deshift_replica_info{model_name=~"$model"}',
        name="replica",
        heading="Replica",
    ),
    # Two metrics: tenants that were configured, and `other`, for those without a label.
    _values_of(
        "tenant",
        f'{{__name__=~"deshift_steering_alpha|deshift_requests_total", {REPLICA}}}',
        name="tenant",
        heading="Tenant",
    ),
]
QUANTILE: Json = {
    "type": "custom",
    "name": "quantile",
    "label": "Quantile",
    "query": "p50 : 0.5, p95 : 0.95, p99 : 0.99",
    "options": [
        {"text": text, "value": value, "selected": text == "p95"}
        for text, value in (("p50", "0.5"), ("p95", "0.95"), ("p99", "0.99"))
    ],
    "current": {"selected": True, "text": "p95", "value": "0.95"},
    "multi": False,
    "includeAll": False,
}


def _annotation(name: str, color: str, expression: str, title: str, text: str, tags: str) -> Json:
    return {
        "name": name,
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": color,
        "expr": expression,
        "step": "15s",
        "titleFormat": title,
        "textFormat": text,
        "tagKeys": tags,
        "useValueForTime": False,
    }


_CHANGES = f"changes({select('deshift_policy_revision')}[$__rate_interval])"
_KILL = select("deshift_kill_switch")
ANNOTATIONS: list[Json] = [
    _annotation(
        *("Policy changes", "blue", f"max by (tenant) ({_CHANGES}) > 0"),
        *("Policy of {{tenant}} changed", "Who and why: the audit on the console", "tenant"),
    ),
    _annotation(
        *("Kill switch", "red", f"max by (action) ({_KILL}) > 0"),
        *("Kill switch: {{action}}", "Overrides every tenant's policy", "action"),
    ),
]
