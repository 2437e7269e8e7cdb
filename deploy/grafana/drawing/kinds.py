"""Panels of every kind that the dashboards have, each with its height and how it is drawn."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm

from deploy.grafana.drawing import lines
from deploy.grafana.drawing.results import Json, Result, Series
from deploy.grafana.drawing.sheet import (
    INK,
    NAMED,
    SOFT,
    Box,
    Sheet,
    fitting,
    text_width,
)
from deploy.grafana.drawing.tables import draw_table, table_height
from deploy.grafana.drawing.units import formatted

TITLE_HEIGHT = 30.0
_STAT_HEIGHT, _BAR_HEIGHT, _PATCH_HEIGHT = 74.0, 30.0, 190.0
_ORANGES = LinearSegmentedColormap.from_list(
    "oranges", ("#3a2410", "#7a3a0c", "#c25a12", "#ff9830", "#ffd3a1")
)
_TITLE_SIZE = 12.0


def height_of(result: Result, width: float) -> float:
    """Pixels, of the whole panel."""
    lines_of_title = len(_title_lines(result, width))
    needed = 80.0 if result.is_empty else _HEIGHTS[result.kind](result)
    return TITLE_HEIGHT + 15 * (lines_of_title - 1) + needed


def draw_panel(sheet: Sheet, box: Box, result: Result) -> None:
    """`No data` where the result is empty."""
    sheet.panel(box)
    titles = _title_lines(result, box.width)
    for index, line in enumerate(titles):
        sheet.text(box.x + 12, box.y + 16 + 15 * index, line, _TITLE_SIZE, bold=True)
    inside = box.inner(0, TITLE_HEIGHT + 15 * (len(titles) - 1))
    if result.is_empty:
        middle = inside.x + inside.width / 2
        sheet.text(middle, inside.y + inside.height / 2, "No data", 13, SOFT, align="center")
    else:
        _DRAWN[result.kind](sheet, inside, result)


def _title_lines(result: Result, width: float) -> list[str]:
    """Stats are narrow: their titles have two lines where they need them."""
    room = width - 20
    if text_width(result.title, _TITLE_SIZE, bold=True) <= room or result.kind != "stat":
        return [fitting(result.title, _TITLE_SIZE, room, bold=True)]
    words = result.title.split()
    num = next(
        count
        for count in range(len(words), 0, -1)
        if count == 1 or text_width(" ".join(words[:count]), _TITLE_SIZE, bold=True) <= room
    )
    rest = " ".join(words[num:])
    return [" ".join(words[:num]), fitting(rest, _TITLE_SIZE, room, bold=True)]


def mapped(value: float, mappings: Sequence[Json]) -> tuple[str, str] | None:
    """The word for a number and its colour, where the panel has one."""
    for mapping in mappings:
        option = mapping["options"].get(f"{value:g}")
        if option:
            return str(option["text"]), NAMED[option["color"]]
    return None


def threshold_color(value: float, thresholds: Json) -> str:
    reached = [s for s in thresholds["steps"] if s["value"] is None or value >= s["value"]]
    return NAMED[reached[-1]["color"]]


def _draw_stat(sheet: Sheet, box: Box, result: Result) -> None:
    defaults = result.panel["fieldConfig"]["defaults"]
    value = result.drawn[0].numbers[-1]
    word = mapped(value, defaults["mappings"])
    text, color = word or (
        formatted(value, result.unit),
        threshold_color(value, defaults["thresholds"]),
    )
    sparkline_height = 26.0
    if result.panel["options"]["graphMode"] == "area":
        course = Box(box.x + 1, box.y + box.height - 27, box.width - 2, sparkline_height)
        lines.sparkline(sheet, course, result, color)
    middle = box.y + (box.height - sparkline_height) / 2 - 2
    sheet.text(box.x + box.width / 2, middle, text, 30, color, align="center")


def _draw_heatmap(sheet: Sheet, box: Box, result: Result) -> None:
    """Rows are the buckets that anything fell into, and one more on either side."""
    names, counts = buckets(result)
    used = np.flatnonzero(np.nansum(counts, axis=1) > 0)
    low, high = max(0, used.min() - 1), min(len(names), used.max() + 2)
    names, counts = names[low:high], counts[low:high]
    place = box.inner(lines.AXIS_WIDTH, 4, 10, lines.AXIS_HEIGHT + 26)
    axes = sheet.axes(place)
    moments = np.array(result.window.moments)
    edges = np.append(moments, moments[-1] + result.window.step_s)
    shown = np.ma.masked_less_equal(np.nan_to_num(counts), 1e-9)
    norm = PowerNorm(0.5, vmin=0, vmax=float(shown.max()))
    axes.pcolormesh(
        edges, np.arange(len(names) + 1), shown, cmap=_ORANGES, norm=norm, edgecolors="none"
    )
    every = math.ceil(len(names) / max(1, place.height // 16))
    ticks = range(1, len(names) + 1)[::every]
    axes.set_yticks(list(ticks), [_bound(names[each - 1], result.unit) for each in ticks])
    lines.time_axis(axes, result.window, place.width)
    axes.set_ylim(0, len(names))
    _color_scale(sheet, box, float(shown.max()))


def buckets(result: Result) -> tuple[list[str], "np.ndarray[Any, Any]"]:
    """The upper bounds in order, and how much was between each and the one before it, (bounds,
    moments): Prometheus' buckets count everything below."""
    ordered = sorted(result.series, key=lambda each: float(each.labels["le"]))
    below = np.array([each.values for each in ordered])
    return [each.name for each in ordered], np.diff(below, axis=0, prepend=0).clip(min=0)


def _bound(name: str, unit: str) -> str:
    return name if name == "+Inf" else formatted(float(name), unit)


def _color_scale(sheet: Sheet, box: Box, highest: float) -> None:
    scale = Box(box.x + lines.AXIS_WIDTH, box.y + box.height - 20, 120, 8)
    axes = sheet.axes(scale)
    axes.set_axis_off()
    axes.imshow(np.linspace(0, 1, 64)[None, :] ** 0.5, cmap=_ORANGES, aspect="auto")
    middle = scale.y + 4
    sheet.text(scale.x - 8, middle, "0", 10.5, SOFT, align="right")
    sheet.text(scale.x + 128, middle, f"{highest:.3g} requests", 10.5, SOFT)


def _draw_timeline(sheet: Sheet, box: Box, result: Result) -> None:
    widest = max(text_width(each.name, 11) for each in result.drawn)
    left = min(box.width / 3, widest + 24)
    place = box.inner(left, 4, 12, lines.AXIS_HEIGHT + 24)
    axes = sheet.axes(place)
    axes.set_ylim(len(result.drawn), 0)
    axes.set_yticks([])
    bar = place.height / len(result.drawn)
    for row, series in enumerate(result.drawn):
        name = fitting(series.name, 11, left - 16)
        sheet.text(place.x - 8, place.y + bar * (row + 0.5), name, 11, align="right")
        for begin, end, word, color in spans(series, result):
            axes.barh(row + 0.5, end - begin, 0.74, begin, color=color, alpha=0.75, linewidth=0)
            seconds = result.window.moments[-1] - result.window.moments[0]
            if text_width(word, 11) + 8 < (end - begin) / seconds * place.width:
                x = place.x + ((begin + end) / 2 - result.window.start) / seconds * place.width
                sheet.text(x, place.y + bar * (row + 0.5), word, 11, "#101114", align="center")
    lines.time_axis(axes, result.window, place.width)
    _words(sheet, box, result)


def spans(series: Series, result: Result) -> list[tuple[float, float, str, str]]:
    """Begin, end, word and colour of each state, without times in which there is none."""
    found, window = [], result.window
    defaults = result.panel["fieldConfig"]["defaults"]
    values = [f"{value:g}" for value in series.values]
    index = 0
    for text, group in groupby(values):
        num = len(list(group))
        if text != "nan":
            begin = window.moments[index]
            end = min(begin + num * window.step_s, window.moments[-1])
            word = mapped(float(text), defaults["mappings"])
            found.append((begin, end, *(word or (text, NAMED["text"]))))
        index += num
    return found


def _words(sheet: Sheet, box: Box, result: Result) -> None:
    """The legend: a colour for each word that the panel has."""
    x, y = box.x + 12, box.y + box.height - 13
    for mapping in result.panel["fieldConfig"]["defaults"]["mappings"]:
        for option in mapping["options"].values():
            sheet.swatch(x, y, NAMED[option["color"]])
            sheet.text(x + 18, y, option["text"], 11, INK)
            x += 40 + text_width(option["text"], 11)


_Drawn = Callable[[Sheet, Box, Result], None]
_HEIGHTS: dict[str, Callable[[Result], float]] = {
    "stat": lambda _: _STAT_HEIGHT,
    "timeseries": lines.height,
    "heatmap": lambda _: _PATCH_HEIGHT,
    "state-timeline": lambda result: 62 + _BAR_HEIGHT * len(result.drawn),
    "table": table_height,
}
_DRAWN: dict[str, _Drawn] = {
    "stat": _draw_stat,
    "timeseries": lines.draw,
    "heatmap": _draw_heatmap,
    "state-timeline": _draw_timeline,
    "table": draw_table,
}
