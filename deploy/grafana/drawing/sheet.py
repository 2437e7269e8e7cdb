"""A dark page measured in pixels from its top left corner, and Grafana's colours."""

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.textpath import TextPath
from PIL import Image

DPI = 100
PAGE, PANEL, EDGE, GRID = "#111217", "#181b1f", "#2b2e34", "#2a2d33"
INK, SOFT = "#d0d0de", "#9a9ba8"
FONT = "DejaVu Sans"
NAMED = {
    "text": INK,
    "green": "#73bf69",
    "yellow": "#fade2a",
    "orange": "#ff9830",
    "red": "#f2495c",
    "dark-red": "#c4162a",
    "blue": "#5794f2",
    "purple": "#b877d9",
    "light-purple": "#ca95e5",
}
PALETTE = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#c8c9ca",
           "#37872d", "#e0b400", "#6ed0e0", "#fa6400")  # fmt: skip


@dataclass(frozen=True)
class Box:
    """x, y: of the top left corner."""

    x: float
    y: float
    width: float
    height: float

    def inner(self, left: float, top: float, right: float = 0, bottom: float = 0) -> "Box":
        return Box(
            self.x + left, self.y + top, self.width - left - right, self.height - top - bottom
        )


class Sheet:
    """width, height: pixels. Text sizes are pixels, too."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAGE)
        FigureCanvasAgg(self.figure)

    def panel(self, box: Box) -> None:
        """The background of one."""
        shape = FancyBboxPatch(
            (box.x / self.width, 1 - (box.y + box.height) / self.height),
            box.width / self.width,
            box.height / self.height,
            boxstyle="square,pad=0",
            transform=self.figure.transFigure,
            facecolor=PANEL,
            edgecolor=EDGE,
            linewidth=0.7,
            zorder=-1,  # axes have 0
        )
        self.figure.add_artist(shape)

    def axes(self, box: Box) -> Axes:
        """Without a frame."""
        place = (box.x / self.width, 1 - (box.y + box.height) / self.height,
                 box.width / self.width, box.height / self.height)  # fmt: skip
        axes = self.figure.add_axes(place, facecolor="none")
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=SOFT, labelsize=points(10.5), length=0, pad=4)
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            label.set_fontfamily(FONT)
        return axes

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 11.5,
        color: str = INK,
        *,
        align: Any = "left",
        bold: bool = False,
    ) -> None:
        """y: of the middle of the line."""
        self.figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            parse_math=False,
            fontsize=points(size),
            color=color,
            ha=align,
            va="center_baseline",
            fontweight="bold" if bold else "normal",
            family=FONT,
        )

    def swatch(self, x: float, y: float, color: str) -> None:
        """A dash in a legend; y: its middle."""
        shape = Rectangle(
            (x / self.width, 1 - (y + 2) / self.height),
            12 / self.width,
            4 / self.height,
            transform=self.figure.transFigure,
            facecolor=color,
            edgecolor="none",
        )
        self.figure.add_artist(shape)

    def svg(self) -> str:
        """With its text as text."""
        made = io.StringIO()
        with rc_context({"svg.fonttype": "none"}):
            self.figure.savefig(made, format="svg", facecolor=PAGE)
        return made.getvalue()

    def save_png(self, path: Path) -> None:
        made = io.BytesIO()
        self.figure.savefig(made, format="png", facecolor=PAGE)
        save_small(Image.open(made), path)


def save_small(image: Image.Image, path: Path) -> None:
    """With 256 colours: the commonest as they are, so that grounds and lines stay right, and some
    between them for the edges of letters."""
    image = image.convert("RGB")
    pixels = np.asarray(image).reshape(-1, 3) @ np.array([1 << 16, 1 << 8, 1])
    colors, counts = np.unique(pixels, return_counts=True)
    commonest = [int(each).to_bytes(3, "big") for each in colors[np.argsort(-counts)][:128]]
    between = image.quantize(128, Image.Quantize.MAXCOVERAGE).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for color in commonest for part in color] + between)
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)


def points(pixels: float) -> float:
    return pixels * 72 / DPI


@cache
def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Pixels."""
    weight = "bold" if bold else "normal"
    if not text.strip():
        return 0.0
    font = FontProperties(family=FONT, weight=weight)
    return float(TextPath((0, 0), text, size=size, prop=font).get_extents().x1)


def fitting(text: str, size: float, width: float, *, bold: bool = False) -> str:
    """Cut to the width, with an ellipsis."""
    if text_width(text, size, bold=bold) <= width:
        return text
    while text and text_width(text + "…", size, bold=bold) > width:
        text = text[:-1].rstrip()
    return text + "…"
