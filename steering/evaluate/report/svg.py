"""Matplotlib's figures as inline SVG: text as text, colours from the page, ids of their own.

Every chart begins with `axes` and ends with `finished`, so that all look alike. What is drawn is
charts.py's.
"""

import html
import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Stand-ins that no other colour is equal to, for the page's own, which differ in light and dark.
INK, SOFT, LINE, SHEET = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
# After Okabe and Ito: told apart with any colour vision; each has a marker of its own as well.
SERIES = tuple(f"#0a0c0{number}" for number in range(1, 7))
MARKERS = ("o", "^", "s", "D", "v", "P")
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", SHEET: "sheet"} | {
    colour: f"c{number}" for number, colour in enumerate(SERIES, start=1)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "deshift",
    "text.parse_math": False,  # names may hold a dollar sign
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def axes(width: float, height: float, x: str, y: str) -> tuple[Figure, Axes]:
    """One frame with a grid and named axes; inches of 72 units."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        frame = figure.add_subplot()
        frame.spines[["top", "right"]].set_visible(False)
        frame.grid(True)
        frame.set_axisbelow(True)
        frame.set_xlabel(x)
        frame.set_ylabel(y)
    return figure, frame


def finished(figure: Figure, name: str, told: str) -> str:
    """The figure for a page. name: a prefix for its ids, of letters and digits. told: what a
    reader who does not see it is told."""
    content = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(
            content,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Type": None, "Format": None},
        )
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r"font(-family)?: ([\d.]+px )?[^;\"]*", _font, text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    head = re.search(r'viewBox="[^"]*"', text)
    assert head is not None, "matplotlib writes a view box"
    body = text[text.index(">") + 1 :]
    label = html.escape(told)
    # The template takes it as it is: matplotlib escapes whatever text it is given to write.
    return f'<svg class="chart" role="img" aria-label="{label}" {head[0]}>{body}'


def _font(found: re.Match[str]) -> str:
    """The size stays; the family is the page's."""
    return f"font-size: {found[2].strip()}" if found[2] else ""
