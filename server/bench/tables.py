"""How tables of figures are laid out, and how a figure reads in one. Not what is in any of them."""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from server.bench.summary import Interval, Spread

MIB = 1024 * 1024


def table(title: str, columns: Sequence[str], *, num_names: int = 2) -> Table:
    """The last of the first `num_names` columns is a name, the rest are numbers."""
    result = Table(title=title)
    for index, name in enumerate(columns):
        result.add_column(name, justify="left" if index == num_names - 1 else "right")
    return result


def name(target: str, num_failed: int, first_error: str) -> str:
    return escape(target + (f" {num_failed} failed: {first_error}" if num_failed else ""))


def spread(value: Spread | None, scale: float, form: str) -> str:
    """Median (interquartile range)."""
    return _three(value, scale, form)


def interval(value: Interval | None, scale: float, form: str) -> str:
    """Marked where too few rounds make it less than a 95 % interval."""
    short = "" if value is None or value.level >= 0.95 else f", {value.level:.0%}"
    return _three(value, scale, form, short)


def _three(value: Spread | Interval | None, scale: float, form: str, note: str = "") -> str:
    if value is None:
        return "-"
    median, low, high = (form.format(scale * x) for x in (value.median, value.low, value.high))
    between = " to " if low.startswith(("+", "-")) or high.startswith(("+", "-")) else "-"
    return f"{median} ({low}{between}{high}{note})"


def median(value: Spread | None) -> str:
    return "-" if value is None else f"{value.median:.0f}"


def median_and_p99(value: Spread | None) -> str:
    """Of seconds, in milliseconds."""
    return "-" if value is None else f"{1000 * value.median:.1f} / {1000 * value.p99:.1f}"


def mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:.0f}"
