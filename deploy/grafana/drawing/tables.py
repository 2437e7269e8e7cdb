"""Panels of the kind table: the results of several queries side by side, by their labels."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from matplotlib.lines import Line2D

from deploy.grafana.drawing.results import Json, Result
from deploy.grafana.drawing.sheet import EDGE, INK, NAMED, SOFT, Box, Sheet, fitting, text_width
from deploy.grafana.drawing.units import formatted

_LINE_HEIGHT = 27.0
_SIZE = 11.0


@dataclass
class _Line:
    """labels: as Prometheus has them. values: by the query's letter."""

    labels: dict[str, str]
    values: dict[str, float] = field(default_factory=dict)

    def fits(self, labels: Mapping[str, str]) -> bool:
        return all(self.labels.get(name, value) == value for name, value in labels.items())


def table_height(result: Result) -> float:
    return _LINE_HEIGHT * (len(_lines(result)) + 1) + 10


def columns(result: Result) -> list[tuple[str, str]]:
    """What each is of (a label, or `Value #A`), and its heading, in their order."""
    options = result.panel["transformations"][1]["options"]
    order: dict[str, int] = options["indexByName"]
    renamed: dict[str, str] = options["renameByName"]
    return [(name, renamed[name]) for name in sorted(renamed, key=lambda each: order[each])]


def cells(result: Result) -> list[list[tuple[str, str]]]:
    """Text and colour of each cell, line by line, sorted as the panel says."""
    (by,) = result.panel["options"]["sortBy"]
    headed = {heading: name for name, heading in columns(result)}
    key = headed[by["displayName"]]
    found = sorted(_lines(result), key=lambda line: _sort_key(line, key), reverse=by["desc"])
    return [[_cell(result, line, *column) for column in columns(result)] for line in found]


def _sort_key(line: _Line, name: str) -> tuple[float, str]:
    return line.values.get(name.removeprefix("Value #"), 0.0), line.labels.get(name, "")


def _lines(result: Result) -> list[_Line]:
    """As Grafana's transformation `merge`: what has the same labels is one line; a query with
    fewer labels gives its value to every line that these fit."""
    names = {name for name, _ in columns(result)}
    found: list[_Line] = []
    for series in sorted(result.drawn, key=lambda each: -len(each.labels)):
        labels = {name: value for name, value in series.labels.items() if name in names}
        fitting_lines = [line for line in found if line.fits(labels)]
        if not fitting_lines:
            fitting_lines = [_Line(labels)]
            found += fitting_lines
        for line in fitting_lines:
            line.values[series.ref] = series.numbers[-1]
    return found


def _cell(result: Result, line: _Line, name: str, heading: str) -> tuple[str, str]:
    if not name.startswith("Value #"):
        return line.labels.get(name, ""), INK
    value = line.values.get(name.removeprefix("Value #"), math.nan)
    properties = _overrides(result.panel, heading)
    for mapping in properties.get("mappings", []):
        if option := mapping["options"].get(f"{value:g}"):
            return option["text"], NAMED[option["color"]]
    return formatted(value, properties["unit"]), INK


def _overrides(panel: Json, heading: str) -> Json:
    return {
        each["id"]: each["value"]
        for override in panel["fieldConfig"]["overrides"]
        if override["matcher"]["options"] == heading
        for each in override["properties"]
    }


def draw_table(sheet: Sheet, box: Box, result: Result) -> None:
    headings, rows = [heading for _, heading in columns(result)], cells(result)
    needed = [
        26 + max(text_width(text, _SIZE) for text in (heading, *(row[i][0] for row in rows)))
        for i, heading in enumerate(headings)
    ]
    scale = (box.width - 16) / sum(needed)
    y = box.y + _LINE_HEIGHT / 2
    for index, cells_of in enumerate([[(heading, SOFT) for heading in headings], *rows]):
        x = box.x + 12
        for (text, color), width in zip(cells_of, needed, strict=True):
            sheet.text(x, y, fitting(text, _SIZE, width * scale - 8), _SIZE, color, bold=not index)
            x += width * scale
        rule = 1 - (y + _LINE_HEIGHT / 2) / sheet.height
        ends = [(box.x + 8) / sheet.width, (box.x + box.width - 8) / sheet.width]
        sheet.figure.add_artist(Line2D(ends, [rule, rule], color=EDGE, linewidth=0.7))
        y += _LINE_HEIGHT
