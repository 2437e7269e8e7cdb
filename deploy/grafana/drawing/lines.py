"""Panels of the kind timeseries: lines, stacked or not, with a legend that holds every series."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deploy.grafana.drawing.results import Result, Series, Window
from deploy.grafana.drawing.sheet import (
    DPI,
    GRID,
    INK,
    NAMED,
    PALETTE,
    SOFT,
    Box,
    Sheet,
    fitting,
    text_width,
)
from deploy.grafana.drawing.units import formatted

AXIS_WIDTH, AXIS_HEIGHT, LINE_HEIGHT = 66.0, 22.0, 18.0
_PLOT_HEIGHT = 150.0
_COLUMNS = ("Mean", "Max", "Last")
_GAP = 18.0  # between two columns
_CHANGE, _EXEMPLAR = NAMED["blue"], "#4d8ee8"


def height(result: Result) -> float:
    return _PLOT_HEIGHT + AXIS_HEIGHT + _legend_height(result)


def draw(sheet: Sheet, box: Box, result: Result) -> None:
    below = _legend_height(result)
    place = box.inner(AXIS_WIDTH, 4, 10, AXIS_HEIGHT + below)
    axes = sheet.axes(place)
    chosen = {each.name: color for each, color in colored(result)}
    if result.panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal":
        _stack(axes, result, chosen)
    else:
        _plot(axes, result, chosen)
    _value_axis(axes, result)
    time_axis(axes, result.window, place.width)
    _marks(axes, result)
    _legend(sheet, box.inner(0, box.height - below), result)


def colored(result: Result) -> list[tuple[Series, str]]:
    """Grafana's palette in order, unless an override names a colour."""
    fixed = {
        override["matcher"]["options"]: NAMED[each["value"]["fixedColor"]]
        for override in result.panel["fieldConfig"]["overrides"]
        for each in override["properties"]
        if each["id"] == "color"
    }
    return [
        (each, fixed.get(each.name, PALETTE[index % len(PALETTE)]))
        for index, each in enumerate(result.drawn)
    ]


def time_axis(axes: Axes, window: Window, width: float) -> None:
    """Hours and minutes, UTC; seconds where there are only few minutes."""
    axes.set_xlim(window.moments[0], window.moments[-1])
    every = _whole_seconds(window, max(2, round(width / 110)))
    first = math.ceil(window.moments[0] / every) * every
    ticks = range(first, int(window.moments[-1]) + 1, every)
    form = "%H:%M" if every >= 60 else "%H:%M:%S"
    axes.set_xticks(ticks, [datetime.fromtimestamp(each, UTC).strftime(form) for each in ticks])
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _whole_seconds(window: Window, num: int) -> int:
    """Between two labels, so that there are at most as many."""
    length = window.moments[-1] - window.moments[0]
    whole = (5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
    return next((each for each in whole if length / each <= num), whole[-1])


def _plot(axes: Axes, result: Result, colors: dict[str, str]) -> None:
    custom = result.panel["fieldConfig"]["defaults"]["custom"]
    style = "steps-post" if custom["lineInterpolation"] == "stepAfter" else "default"
    fill = {"alpha": custom["fillOpacity"] / 100 / 2, "linewidth": 0}
    step: Literal["post"] | None = "post" if style == "steps-post" else None
    for each in result.drawn:
        color = colors[each.name]
        moments = result.window.moments
        axes.plot(moments, each.values, color=color, linewidth=1.3, drawstyle=style)
        axes.fill_between(moments, each.values, color=color, step=step, **fill)  # to 0


def _stack(axes: Axes, result: Result, colors: dict[str, str]) -> None:
    """Each on those before it; nothing counts as 0."""
    moments, base = result.window.moments, np.zeros(len(result.window.moments))
    for each in result.drawn:
        top = base + np.nan_to_num(np.array(each.values))
        axes.fill_between(moments, base, top, color=colors[each.name], alpha=0.3, linewidth=0)
        axes.plot(moments, top, color=colors[each.name], linewidth=1.3)
        base = top


def _value_axis(axes: Axes, result: Result) -> None:
    """Ends as the panel has them, else by the lines and the exemplars."""
    defaults = result.panel["fieldConfig"]["defaults"]
    drawn = [line.get_ydata() for line in axes.get_lines()]
    values = np.concatenate([*drawn, [value for _, value in result.exemplars]])
    bottom = defaults.get("min", float(np.nanmin(values)))
    highest = float(np.nanmax(values))
    room = (highest - bottom) * 0.06 or 1.0
    top = defaults.get("max", highest + room)
    axes.set_ylim(bottom if "min" in defaults else bottom - room, top + (top - bottom) * 0.02)
    axes.set_yticks(_ticks(bottom, top, result.unit))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(value, result.unit)))


def _ticks(bottom: float, top: float, unit: str) -> list[float]:
    """A few round values; of bytes those that are round in KiB, MiB ..."""
    whole = 1024.0 ** max(0, math.floor(math.log(top, 1024))) if unit == "bytes" else 1.0
    locator = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10])
    found = [float(each) * whole for each in locator.tick_values(bottom / whole, top / whole)]
    return [each for each in found if bottom <= each <= top]


def _marks(axes: Axes, result: Result) -> None:
    """Thresholds, exemplars, and the changes that annotations mark."""
    defaults = result.panel["fieldConfig"]["defaults"]
    if defaults["custom"]["thresholdsStyle"]["mode"] == "dashed":
        for step in defaults["thresholds"]["steps"]:
            if step["value"] is not None and step["value"] <= axes.get_ylim()[1]:
                color = NAMED[step["color"]]
                axes.axhline(step["value"], color=color, linewidth=1, linestyle="--")
    for moment in result.changes:
        axes.axvline(moment, color=_CHANGE, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.8)
    if result.exemplars:
        moments, values = zip(*result.exemplars, strict=True)
        axes.scatter(
            moments, values, marker="D", s=7, color=_EXEMPLAR, alpha=0.75, linewidths=0, zorder=3
        )


def _legend_height(result: Result) -> float:
    return LINE_HEIGHT * (len(result.drawn) + 1) + 8


def _legend(sheet: Sheet, box: Box, result: Result) -> None:
    """A line for each series: name, mean, max and last."""
    lines = [
        (series.name, color, [formatted(each, result.unit) for each in _calculated(series.numbers)])
        for series, color in colored(result)
    ]
    widths = [
        max(text_width(text, 11) for text in (heading, *(values[i] for _, _, values in lines)))
        for i, heading in enumerate(_COLUMNS)
    ]
    last = box.x + box.width - 12
    right = [last - sum(widths[i + 1 :]) - _GAP * (len(widths) - 1 - i) for i in range(len(widths))]
    y = box.y + LINE_HEIGHT / 2
    sheet.text(box.x + 12, y, "Name", 10.5, SOFT)
    for x, heading in zip(right, _COLUMNS, strict=True):
        sheet.text(x, y, heading, 10.5, SOFT, align="right")
    for name, color, values in lines:
        y += LINE_HEIGHT
        sheet.swatch(box.x + 12, y, color)
        room = right[0] - widths[0] - _GAP - box.x - 30
        sheet.text(box.x + 30, y, fitting(name, 11, room), 11, INK)
        for x, value in zip(right, values, strict=True):
            sheet.text(x, y, value, 11, INK, align="right")


def _calculated(numbers: Sequence[float]) -> tuple[float, float, float]:
    return sum(numbers) / len(numbers), max(numbers), numbers[-1]


def sparkline(sheet: Sheet, box: Box, result: Result, color: str) -> None:
    """A number's course, without axes."""
    axes = sheet.axes(box)
    axes.set_axis_off()
    values = np.array(result.drawn[0].values)
    low, high = np.nanmin(values), np.nanmax(values)
    axes.set_xlim(result.window.moments[0], result.window.moments[-1])
    axes.set_ylim(min(low, 0), (high if high > low else high + 1) * 1.1 + 1e-12)
    axes.plot(result.window.moments, values, color=color, linewidth=100 / DPI)
    axes.fill_between(result.window.moments, values, min(low, 0), color=color, alpha=0.15, lw=0)
