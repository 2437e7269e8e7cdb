"""A vector set as pictures: |Delta_l| relative to the state, and consistency, layer by layer.

Pure: numbers in, SVG out, with classes and attributes only, since the console's security policy
lets no inline style in. The colours are in static/console.css. Every word in the SVG is from this
file, everything else a number, so the template may take it as it is.
"""

import math
from collections.abc import Sequence
from html import escape

from server.admin.protocol import LayerView

# Units of the drawing. It is as wide as a phone's screen, so that its text is legible there.
WIDTH, HEIGHT = 400, 190
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 10, 34
_MAX_LAYER_TICKS = 9


def relative_norm_chart(numbers: Sequence[LayerView]) -> str:
    """Bars of |Delta_l| / |h_l|."""
    values = [each.relative_norm for each in numbers]
    scale = Scale(0.0, max(values), len(values))
    peak = max(numbers, key=lambda each: each.relative_norm)
    bars = []
    width = scale.slot * 0.7
    for each in numbers:
        x, y = scale.x(each.layer) - width / 2, scale.y(each.relative_norm)
        bars.append(
            f'<rect class="bar" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" '
            f'height="{HEIGHT - BOTTOM - y:.2f}"><title>layer {each.layer}: '
            f"{each.relative_norm:.3f}</title></rect>"
        )
    told = (
        f"Norm of the shift relative to the hidden state, {len(values)} layers; "
        f"largest {peak.relative_norm:.3f} at layer {peak.layer}"
    )
    return _picture(told, "|Δ| / |h|", scale, "".join(bars))


def consistency_chart(numbers: Sequence[LayerView]) -> str:
    """A line of the mean pairwise cosine: 1 where all prompts shift alike."""
    values = [each.consistency for each in numbers]
    scale = Scale(min(0.0, *values), 1.0, len(values))
    points = [(scale.x(each.layer), scale.y(each.consistency), each) for each in numbers]
    line = " ".join(f"{x:.2f},{y:.2f}" for x, y, _ in points)
    dots = "".join(
        f'<circle class="dot" cx="{x:.2f}" cy="{y:.2f}" r="2.5"><title>layer {each.layer}: '
        f"{each.consistency:.3f}</title></circle>"
        for x, y, each in points
    )
    told = (
        f"Consistency of the shift over the anchors, {len(values)} layers; "
        f"from {min(values):.3f} to {max(values):.3f}"
    )
    return _picture(told, "mean cosine", scale, f'<polyline class="line" points="{line}"/>{dots}')


class Scale:
    """Layers and values -> places in the drawing. The axis ends on a round tick at or above
    `highest`, and above 0."""

    def __init__(self, lowest: float, highest: float, num_layers: int) -> None:
        self.step = round_step((highest - lowest) / 4)
        self.low = math.floor(lowest / self.step + 1e-9) * self.step
        self.high = max(math.ceil(highest / self.step - 1e-9), 1) * self.step
        self.num_layers = num_layers
        self.slot = (WIDTH - LEFT - RIGHT) / num_layers

    def x(self, layer: int) -> float:
        return LEFT + (layer + 0.5) * self.slot

    def y(self, value: float) -> float:
        part = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    def value_ticks(self) -> list[float]:
        return [
            self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1)
        ]

    def layer_ticks(self) -> list[int]:
        step = max(1, math.ceil(round_step((self.num_layers - 1) / _MAX_LAYER_TICKS)))
        return list(range(0, self.num_layers, step))


def round_step(rough: float) -> float:
    """The next 1, 2 or 5 times a power of ten; 1 for nothing at all."""
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(
        (factor * power for factor in (1, 2, 5) if factor * power >= rough * (1 - 1e-9)), 10 * power
    )


def _picture(told: str, unit: str, scale: Scale, marks: str) -> str:
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(told)}">'
    ]
    for value in scale.value_ticks():
        y = scale.y(value)
        kind = "axis" if abs(value) < 1e-12 else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.2f}" ')
        parts.append(f'y2="{y:.2f}"/><text class="tick" x="{LEFT - 6}" y="{y + 3.5:.2f}" ')
        parts.append(f'text-anchor="end">{value + 0.0:.3g}</text>')
    for layer in scale.layer_ticks():
        parts.append(f'<text class="tick" x="{scale.x(layer):.2f}" y="{HEIGHT - BOTTOM + 13}" ')
        parts.append(f'text-anchor="middle">{layer}</text>')
    parts.append(marks)
    parts.append(f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" ')
    parts.append('text-anchor="middle">decoder layer</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="label" transform="translate(9 {middle}) rotate(-90)" ')
    parts.append(f'text-anchor="middle">{escape(unit)}</text></svg>')
    return "".join(parts)
