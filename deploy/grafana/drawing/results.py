"""What Prometheus answers to the expressions of a dashboard's panels, asked as Grafana asks.

Does not draw anything.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

Json = dict[str, Any]
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::(\w+))?\}|(\w+))")
_LABEL = re.compile(r"{{\s*(\w+)\s*}}")


class PictureError(Exception):
    """A picture cannot be made; the message is for the person at the terminal."""


@dataclass(frozen=True)
class Series:
    """name: as the legend has it. values: one for each moment of the window, NaN for none."""

    ref: str
    name: str
    labels: Mapping[str, str]
    values: tuple[float, ...]

    @property
    def numbers(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]


@dataclass(frozen=True)
class Window:
    """start, end: Unix seconds. variables: of the dashboard, and Grafana's own; by name the value
    in an expression and the text in a title."""

    start: float
    end: float
    step_s: float
    variables: Mapping[str, tuple[str, str]]

    @property
    def moments(self) -> tuple[float, ...]:
        num = math.floor((self.end - self.start) / self.step_s) + 1
        return tuple(self.start + index * self.step_s for index in range(num))

    def in_expression(self, text: str) -> str:
        """Raises PictureError for a variable without a value."""
        return self._substituted(text, False)

    def in_title(self, text: str) -> str:
        return self._substituted(text, True)

    def _substituted(self, text: str, is_title: bool) -> str:
        def value(found: re.Match[str]) -> str:
            name = found[1] or found[3]
            if name not in self.variables:
                raise PictureError(f"the variable ${name} has no value: {text}")
            return self.variables[name][is_title or found[2] == "text"]

        return _VARIABLE.sub(value, text)


@dataclass(frozen=True)
class Result:
    """Of one panel. exemplars, changes: moments, the former with values."""

    panel: Json
    title: str
    window: Window
    series: tuple[Series, ...]
    exemplars: tuple[tuple[float, float], ...] = ()
    changes: tuple[float, ...] = ()

    @property
    def kind(self) -> str:
        return str(self.panel["type"])

    @property
    def unit(self) -> str:
        return str(self.panel["fieldConfig"]["defaults"]["unit"])

    @property
    def drawn(self) -> tuple[Series, ...]:
        """Those with a number."""
        return tuple(each for each in self.series if each.numbers)

    @property
    def is_empty(self) -> bool:
        return not self.drawn


@dataclass(frozen=True)
class Prometheus:
    """client: of its base URL. Raises PictureError where it refuses."""

    client: httpx.Client = field(repr=False)

    def result(self, panel: Json, window: Window, changes: Sequence[float] = ()) -> Result:
        """Of all targets of a panel, over the window, or at its end for tables."""
        series: list[Series] = []
        exemplars: list[tuple[float, float]] = []
        for target in panel["targets"]:
            series += self._series(target, window)
            if target.get("exemplar"):
                exemplars += self._exemplars(window.in_expression(target["expr"]), window)
        title = window.in_title(panel["title"])
        return Result(panel, title, window, tuple(series), tuple(exemplars), tuple(changes))

    def changes(self, board: Json, window: Window) -> tuple[float, ...]:
        """When each of the board's annotations began."""
        begins: set[float] = set()
        for annotation in board["annotations"]["list"]:
            target = {"refId": "", "expr": annotation["expr"], "legendFormat": "", "range": True}
            for series in self._series(target, window):
                before = math.nan
                for moment, value in zip(window.moments, series.values, strict=True):
                    if math.isfinite(value) and not math.isfinite(before):
                        begins.add(moment)
                    before = value
        return tuple(sorted(begins - {window.moments[0]}))

    def _series(self, target: Json, window: Window) -> list[Series]:
        expression = window.in_expression(target["expr"])
        if target["range"]:
            over = {"start": window.start, "end": window.end, "step": window.step_s}
            found = self._get("query_range", query=expression, **over)["result"]
            points = [each["values"] for each in found]
        else:
            found = self._get("query", query=expression, time=window.end)["result"]
            points = [[[window.end, each["value"][1]]] for each in found]
        return [
            Series(
                target["refId"],
                legend(target["legendFormat"], each["metric"]),
                each["metric"],
                _on_grid(values, window) if target["range"] else (float(values[0][1]),),
            )
            for each, values in zip(found, points, strict=True)
        ]

    def _exemplars(self, expression: str, window: Window) -> list[tuple[float, float]]:
        found = self._get("query_exemplars", query=expression, start=window.start, end=window.end)
        points = {
            (float(each["timestamp"]), float(each["value"]))
            for series in found
            for each in series["exemplars"]
        }
        return sorted(points)

    def _get(self, path: str, **parameters: Any) -> Any:
        answer = self.client.get(f"/api/v1/{path}", params=parameters).json()
        if answer["status"] != "success":
            raise PictureError(f"Prometheus refuses {parameters}: {answer['error']}")
        return answer["data"]


def legend(pattern: str, labels: Mapping[str, str]) -> str:
    """A label that the series has not is left empty, as Grafana does."""
    return _LABEL.sub(lambda found: labels.get(found[1], ""), pattern)


def _on_grid(points: Sequence[Sequence[Any]], window: Window) -> tuple[float, ...]:
    values = [math.nan] * len(window.moments)
    for moment, value in points:
        values[round((float(moment) - window.start) / window.step_s)] = float(value)
    return tuple(values)
