"""Numbers as a report writes them; no markup."""

from collections.abc import Mapping
from typing import Any


def percent(rate: Mapping[str, Any]) -> str:
    """`12.5 %`; whole numbers without a digit behind the point."""
    return f"{_trimmed(100 * rate['share'])} %"


def interval(rate: Mapping[str, Any]) -> str:
    """`(9-17)`, in per cent."""
    return f"({100 * rate['low']:.0f}\u2013{100 * rate['high']:.0f})"


def points_of(paired: Mapping[str, Any]) -> str:
    """`+23.5 points (+16 to +31)`."""
    low, high = signed(100 * paired["low"], 0), signed(100 * paired["high"], 0)
    return f"{signed(100 * paired['difference'])} points ({low} to {high})"


def signed(value: float, digits: int = 1) -> str:
    """With a sign, a real minus; zero has none."""
    text = f"{abs(value):.{digits}f}"
    text = text.removesuffix(".0")
    if float(text) == 0:
        return "0"
    return ("+" if value > 0 else "\u2212") + text


def p_value(p: float) -> str:
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".", 1)


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits; a dash for nothing."""
    return "\u2013" if value is None else f"{value:.{digits}g}"


def _trimmed(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
