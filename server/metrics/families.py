"""Metric families with their series, and their text in Prometheus' two formats.

Our own because a scrape holds the interpreter's lock while the engine decodes: prometheus_client
takes about 8 microseconds a line, which is 120 ms for 200 tenants, and 45 ms only to collect the
samples. Here the text of a series' name and labels is made once, when the series begins, and a
histogram's whole text again only when it has changed, so that tenants without traffic since the
last scrape cost next to nothing. Does not cover what is declared (catalogue.py) nor the process'
own metrics, which prometheus_client does (metrics.py).
"""

import math
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Literal

from server.engine.stats import Distribution, Histogram

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]  # values, in the order of the family's label names


def escaped(text: str) -> str:
    """A label's value or a help text, as it stands between quotes."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def number_text(value: float) -> str:
    """As Go, and with it Prometheus, writes it."""
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


class Family:
    """One metric: its name, and what its text begins with. Event loop only.

    constant: the labels that every series has, as text `a="b"`.
    """

    kind: Kind

    def __init__(self, name: str, help_text: str, labels: Labels, constant: str) -> None:
        self.name = name
        self.help_text = help_text
        self.labels = labels
        self._constant = constant

    def head(self, is_openmetrics: bool) -> str:
        # In OpenMetrics the family of counters is named without their suffix.
        name = self.name.removesuffix("_total") if is_openmetrics else self.name
        return f"# HELP {name} {escaped(self.help_text)}\n# TYPE {name} {self.kind}\n"

    def lines(self, with_exemplars: bool) -> Iterator[str]:
        """The series, without the head; one or several lines at a time."""
        raise NotImplementedError

    def forget(self, label: str, value: str) -> None:
        """Drop every series that has this value of the label."""
        raise NotImplementedError

    def _text_of(self, values: Labels) -> str:
        """`a="b",c="d"`, the constant labels first."""
        own = [f'{k}="{escaped(v)}"' for k, v in zip(self.labels, values, strict=True)]
        return ",".join((self._constant, *own))


class Numbers(Family):
    """Counters or gauges."""

    def __init__(
        self, kind: Kind, name: str, help_text: str, labels: Labels, constant: str
    ) -> None:
        super().__init__(name, help_text, labels, constant)
        self.kind = kind
        self._values: dict[Labels, float] = {}
        self._prefixes: dict[Labels, str] = {}

    def inc(self, *labels: str, by: float = 1) -> None:
        self.set(self._values.get(labels, 0) + by, *labels)

    def set(self, value: float, *labels: str) -> None:
        self._values[labels] = value
        if labels not in self._prefixes:
            self._prefixes[labels] = self._prefix(labels)

    def replace(self, values: Mapping[Labels, float]) -> None:
        """These and no others, for what is known elsewhere and read at a scrape."""
        self._values = dict(values)
        known = self._prefixes
        self._prefixes = {each: known.get(each) or self._prefix(each) for each in values}

    def lines(self, with_exemplars: bool) -> Iterator[str]:
        del with_exemplars  # of histograms only
        for labels, value in self._values.items():
            yield f"{self._prefixes[labels]}{number_text(value)}\n"

    def forget(self, label: str, value: str) -> None:
        if label in self.labels:
            place = self.labels.index(label)
            self.replace({k: v for k, v in self._values.items() if k[place] != value})

    def _prefix(self, labels: Labels) -> str:
        return f"{self.name}{{{self._text_of(labels)}}} "


class Histograms(Family):
    """Histograms with fixed bounds, or distributions that were counted elsewhere."""

    kind = "histogram"

    def __init__(
        self, name: str, help_text: str, labels: Labels, bounds: tuple[float, ...], constant: str
    ) -> None:
        super().__init__(name, help_text, labels, constant)
        self.bounds = bounds
        self._values: dict[Labels, Histogram | Distribution] = {}
        self._exemplars: dict[Labels, dict[int, str]] = {}  # by bucket
        self._prefixes: dict[Labels, tuple[str, ...]] = {}
        # Of those that have not changed since, with exemplars and without.
        self._texts: dict[bool, dict[Labels, str]] = {True: {}, False: {}}

    def observe(self, value: float, *labels: str, request_id: str | None = None) -> None:
        """With a request's id as the exemplar of the value's bucket."""
        histogram = self._values.get(labels)
        if not isinstance(histogram, Histogram):
            histogram = self._values[labels] = Histogram(*self.bounds)
            self._prefixes[labels] = self._histogram_prefixes(labels, self.bounds)
        histogram.observe(value)
        self._has_changed(labels)
        if request_id is not None:
            bucket = bisect_left(self.bounds, value)
            told = f' # {{request_id="{escaped(request_id)}"}} {value!r} {time.time():.3f}'
            self._exemplars.setdefault(labels, {})[bucket] = told

    def replace(self, distributions: Mapping[Labels, Distribution]) -> None:
        """These and no others."""
        for labels in self._values.keys() | distributions.keys():
            self._has_changed(labels)
        self._values = dict(distributions)
        known = self._prefixes
        self._prefixes = {
            labels: known.get(labels) or self._histogram_prefixes(labels, found.bounds)
            for labels, found in distributions.items()
        }

    def lines(self, with_exemplars: bool) -> Iterator[str]:
        texts = self._texts[with_exemplars]
        for labels, value in self._values.items():
            text = texts.get(labels)
            if text is None:
                found = value.snapshot() if isinstance(value, Histogram) else value
                exemplars = self._exemplars.get(labels, {}) if with_exemplars else {}
                text = texts[labels] = _histogram_text(self._prefixes[labels], found, exemplars)
            yield text

    def forget(self, label: str, value: str) -> None:
        if label in self.labels:
            place = self.labels.index(label)
            for labels in [each for each in self._values if each[place] == value]:
                del self._values[labels], self._prefixes[labels]
                self._exemplars.pop(labels, None)
                self._has_changed(labels)

    def _has_changed(self, labels: Labels) -> None:
        for texts in self._texts.values():
            texts.pop(labels, None)

    def _histogram_prefixes(self, labels: Labels, bounds: tuple[float, ...]) -> tuple[str, ...]:
        text, name = self._text_of(labels), self.name
        buckets = [
            f'{name}_bucket{{{text},le="{number_text(bound)}"}} ' for bound in (*bounds, math.inf)
        ]
        return (*buckets, f"{name}_sum{{{text}}} ", f"{name}_count{{{text}}} ")


def _histogram_text(
    prefixes: tuple[str, ...], found: Distribution, exemplars: Mapping[int, str]
) -> str:
    """Of one series. prefixes: of its buckets, its sum and its count."""
    *buckets, total, count = prefixes
    so_far = 0
    parts = []
    for index, (prefix, num) in enumerate(zip(buckets, found.counts, strict=True)):
        so_far += num
        parts.append(f"{prefix}{so_far}{exemplars.get(index, '')}\n")
    parts.append(f"{count}{so_far}\n{total}{number_text(found.total)}\n")
    return "".join(parts)
