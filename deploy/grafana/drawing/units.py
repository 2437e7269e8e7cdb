"""Numbers as Grafana writes them, for the units that the dashboards use."""

import math

_SECONDS = ((1e-6, 1e9, "ns"), (1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (60.0, 1.0, "s"),
            (3600.0, 1 / 60, "min"), (math.inf, 1 / 3600, "hour"))  # fmt: skip
_THOUSANDS = ("", " K", " Mil", " Bil")
_BYTES = (" B", " KiB", " MiB", " GiB", " TiB")
_RATES = {"reqps": " req/s", "ops": " ops/s"}


def formatted(value: float, unit: str) -> str:
    """Three digits that count, more only where a whole number has more.

    unit: Grafana's name of it. Raises ValueError for one that no dashboard uses.
    """
    if not math.isfinite(value):
        return "–"
    if unit == "none":
        return _digits(value)
    if unit == "percentunit":
        return f"{_digits(100 * value)}%"
    if unit == "s":
        return _seconds(value)
    if unit == "short":
        return _scaled(value, 1000.0, _THOUSANDS)
    if unit == "bytes":
        return _scaled(value, 1024.0, _BYTES)
    if unit in _RATES:
        return _digits(value) + _RATES[unit]
    raise ValueError(f"no dashboard uses the unit {unit!r}")


def _seconds(value: float) -> str:
    if value == 0:
        return "0 s"
    _, factor, name = next(each for each in _SECONDS if abs(value) < each[0])
    return f"{_digits(value * factor)} {name}"


def _scaled(value: float, base: float, names: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= base and power < len(names) - 1:
        value, power = value / base, power + 1
    return _digits(value) + names[power]


def _digits(value: float) -> str:
    if value == 0:
        return "0"
    after_the_point = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{after_the_point}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
