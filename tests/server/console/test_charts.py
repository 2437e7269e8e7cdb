"""The pictures of a vector set: places are computed here by hand."""

import xml.etree.ElementTree as ElementTree

import pytest

from server.admin.protocol import LayerView
from server.console.charts import (
    BOTTOM,
    HEIGHT,
    TOP,
    Scale,
    consistency_chart,
    relative_norm_chart,
    round_step,
)

LAYERS = [
    LayerView(layer=i, norm=1.0, relative_norm=relative, consistency=cosine)
    for i, (relative, cosine) in enumerate([(0.1, -0.5), (0.4, 0.5), (0.2, 1.0)])
]


def test_bars_are_as_high_as_their_numbers() -> None:
    svg = ElementTree.fromstring(relative_norm_chart(LAYERS))
    heights = [float(bar.attrib["height"]) for bar in svg.iter("rect")]
    whole = HEIGHT - TOP - BOTTOM  # the axis goes to 0.4
    assert heights == pytest.approx([whole / 4, whole, whole / 2], abs=0.02)
    assert "largest 0.400 at layer 1" in svg.attrib["aria-label"]


def test_the_line_reaches_below_zero_where_shifts_disagree() -> None:
    svg = ElementTree.fromstring(consistency_chart(LAYERS))
    (line,) = svg.iter("polyline")
    heights = [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    whole = HEIGHT - TOP - BOTTOM
    # From -0.5 to 1 in steps of 0.5.
    assert heights == pytest.approx([HEIGHT - BOTTOM, TOP + whole / 3, TOP], abs=0.02)


@pytest.mark.parametrize("num_layers", [1, 2, 9, 10, 32, 80, 200])
def test_layer_ticks_are_few_and_start_at_zero(num_layers: int) -> None:
    ticks = Scale(0.0, 1.0, num_layers).layer_ticks()
    assert ticks[0] == 0 and len(ticks) <= 11 and ticks[-1] < num_layers


def test_steps_are_round() -> None:
    assert [round_step(each) for each in (0.0, 0.1, 0.11, 0.3, 6.0, 20.0)] == pytest.approx(
        [1.0, 0.1, 0.2, 0.5, 10.0, 20.0]
    )


def test_a_set_without_any_shift_can_be_drawn() -> None:
    nothing = [LayerView(layer=0, norm=0.0, relative_norm=0.0, consistency=0.0)]
    ElementTree.fromstring(relative_norm_chart(nothing))
    ElementTree.fromstring(consistency_chart(nothing))


def test_nothing_in_a_picture_needs_inline_style() -> None:
    for chart in (relative_norm_chart(LAYERS), consistency_chart(LAYERS)):
        assert "style" not in chart and "<script" not in chart
