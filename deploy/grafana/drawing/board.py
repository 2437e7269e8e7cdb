"""A picture of a dashboard: chosen panels in rows, under its title, above a line that says what the
picture is."""

from collections.abc import Sequence

from deploy.grafana.drawing.kinds import draw_panel, height_of
from deploy.grafana.drawing.results import Result
from deploy.grafana.drawing.sheet import INK, SOFT, Box, Sheet

WIDTH = 1280.0
ORIGIN = (
    "Drawn by deploy/grafana/pictures.py: the dashboard's own queries and panels over a run's data "
    "in Prometheus. Not a screenshot of Grafana."
)
_GAP, _HEAD, _FOOT = 8.0, 40.0, 30.0


def drawn(title: str, rows: Sequence[Sequence[Result]]) -> Sheet:
    """Panels of a row share its width as they share it in Grafana, and have one height."""
    placed, y = [], _HEAD
    for row in rows:
        widths = _widths(row)
        height = max(height_of(*each) for each in zip(row, widths, strict=True))
        x = _GAP
        for result, width in zip(row, widths, strict=True):
            placed.append((Box(x, y, width, height), result))
            x += width + _GAP
        y += height + _GAP
    sheet = Sheet(WIDTH, y + _FOOT - _GAP)
    sheet.text(_GAP + 4, _HEAD / 2, title, 15, INK, bold=True)
    for box, result in placed:
        draw_panel(sheet, box, result)
    sheet.text(_GAP + 4, sheet.height - _FOOT / 2, ORIGIN, 11, SOFT)
    return sheet


def _widths(row: Sequence[Result]) -> list[float]:
    parts = [result.panel["gridPos"]["w"] for result in row]
    room = WIDTH - _GAP * (len(row) + 1)
    return [room * part / sum(parts) for part in parts]
