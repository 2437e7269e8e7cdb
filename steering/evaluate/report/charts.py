"""The report's charts, each of a part of its document. Numbers in, SVG out; reads no files."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from steering.evaluate.report.svg import INK, MARKERS, SERIES, SHEET, SOFT, axes, finished
from steering.evaluate.states import CORRUPTED, IMAGE, PLAIN, TEXT

_TEN = [0, 20, 40, 60, 80, 100]
_BY_ALPHA = ("harmful_refused", "harmless_lost", "pictures_right", "degenerate")
_OFFSETS = ((9, 0), (-9, 0), (0, 10), (0, -10), (9, 9), (-9, 9), (9, -9), (-9, -9), (18, 0))


def frontier(document: Mapping[str, Any], cost: str, mark: str) -> str | None:
    """Harmful refusals against `cost`, one numbered point a condition with intervals both ways."""
    points = [
        point
        for point in document["points"]
        if "harmful_refused" in point["rates"] and cost in point["rates"]
    ]
    if not points:
        return None
    words = document["measures"][cost]
    figure, frame = axes(6.4, 4.4, f"{words}, %", "harmful prompts refused, %")
    line = sorted(
        (100 * p["rates"][cost]["share"], 100 * p["rates"]["harmful_refused"]["share"])
        for p in points
        if p[mark]
    )
    if len(line) > 1:
        frame.plot(*zip(*line, strict=True), color=SERIES[0], lw=1.2, ls="--", zorder=2)
    for point in points:
        _point(frame, point, cost, mark)
    _percent_axes(frame)
    frame.set_xlim(-4, 104)
    _number_points(frame, points, cost)
    told = "; ".join(
        f"{p['number']}: {p['condition']}, {100 * p['rates'][cost]['share']:.1f} and "
        f"{100 * p['rates']['harmful_refused']['share']:.1f}"
        for p in points
    )
    return finished(
        figure, f"frontier{cost.replace('_', '')}", f"{words} and harmful prompts refused: {told}"
    )


def _point(frame: Axes, point: Mapping[str, Any], cost: str, mark: str) -> None:
    across, up = point["rates"][cost], point["rates"]["harmful_refused"]
    x, y = 100 * across["share"], 100 * up["share"]
    is_best = bool(point[mark])
    colour = SERIES[0] if is_best else SERIES[1] if point["is_setting"] else SOFT
    frame.errorbar(
        x,
        y,
        xerr=_either_way(across),
        yerr=_either_way(up),
        fmt="o" if point["is_setting"] else "s",
        ms=7,
        mfc=colour if is_best else SHEET,
        mec=colour,
        mew=1.5,
        ecolor=colour,
        elinewidth=0.8,
        zorder=4 if is_best else 3,
    )


def _number_points(frame: Axes, points: Sequence[Mapping[str, Any]], cost: str) -> None:
    """Each number beside its point, where the fewest others are."""
    places = [
        (100 * p["rates"][cost]["share"], 100 * p["rates"]["harmful_refused"]["share"])
        for p in points
    ]
    taken = list(places)
    for point, (x, y) in zip(points, places, strict=True):

        def crowd(offset: tuple[int, int], x: float = x, y: float = y) -> float:
            at = (x + offset[0] / 3.6, y + offset[1] / 2.6)  # units of the axes in a point
            inside = 0 <= at[0] <= 100 and -2 <= at[1] <= 102
            return sum(
                1 / (0.3 + (at[0] - a) ** 2 + (at[1] - b) ** 2)
                for a, b in taken
                if (a, b) != (x, y)
            ) + (0 if inside else 10)

        offset = min(_OFFSETS, key=crowd)
        taken.append((x + offset[0] / 3.6, y + offset[1] / 2.6))
        frame.annotate(
            str(point["number"]),
            (x, y),
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            fontweight="bold",
            color=INK,
            zorder=6,
        )


def by_alpha(document: Mapping[str, Any], family: Mapping[str, Any], number: int) -> str:
    """Pooled rates of one kind of steering over alpha, with their intervals."""
    rates = {point["condition"]: point["rates"] for point in document["points"]}
    figure, frame = axes(6.4, 3.6, "alpha", "share, %")
    told = []
    for place, measure in enumerate(_BY_ALPHA):
        drawn = [
            (alpha, rates[name][measure])
            for alpha, name in family["alphas"]
            if measure in rates.get(name, {})
        ]
        if not drawn:
            continue
        alphas = [alpha for alpha, _ in drawn]
        low, high = ([100 * rate[end] for _, rate in drawn] for end in ("low", "high"))
        shares = [100 * rate["share"] for _, rate in drawn]
        words = document["measures"][measure]
        frame.fill_between(alphas, low, high, color=SERIES[place], alpha=0.14, lw=0)
        frame.plot(
            alphas, shares, color=SERIES[place], marker=MARKERS[place], ms=5, lw=1.6, label=words
        )
        told.append(f"{words}: " + ", ".join(f"{s:.1f}" for s in shares))
    _percent_axes(frame, across=False)
    frame.set_xticks(sorted({alpha for alpha, _ in family["alphas"]}))
    figure.legend(loc="outside upper left", ncols=2, fontsize=9, frameon=False, labelcolor=INK)
    return finished(figure, f"alpha{number}", f"{family['name']}: {'; '.join(told)}")


def planes(states: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Each steered condition, or nothing steered, with one chart a kept layer."""
    steered = states["about"]["groups"][len(PLAIN) :] or [""]
    for row, condition in enumerate(steered):
        yield (
            condition,
            [
                (plane["layer"], _plane(states, plane, condition, f"plane{row}x{place}"))
                for place, plane in enumerate(states["planes"])
            ],
        )


def _plane(states: Mapping[str, Any], plane: Mapping[str, Any], condition: str, name: str) -> str:
    first, second = (100 * share for share in plane["variance_explained"])
    figure, frame = axes(
        3.1, 2.7, f"component 1 ({first:.0f} % of variance)", f"component 2 ({second:.0f} %)"
    )
    kinds = states["about"]["kinds"]
    shown = [TEXT, IMAGE, CORRUPTED, *([condition] if condition else [])]
    for place, group in enumerate(shown):
        for kind, marker in (("harmful", "^"), ("harmless", "o")):
            here = [p for p, k in zip(plane["points"][group], kinds, strict=True) if k == kind]
            if here:
                frame.scatter(
                    [x for x, _ in here],
                    [y for _, y in here],
                    s=15,
                    marker=marker,
                    facecolor=SERIES[place] if kind == "harmful" else SHEET,
                    edgecolor=SERIES[place],
                    linewidth=0.9,
                    zorder=3 + place,
                )
    frame.set_aspect("equal", adjustable="datalim")  # distances count alike both ways
    frame.set_xticks([])
    frame.set_yticks([])
    told = f"{', '.join(shown)} after layer {plane['layer']}, first two principal components"
    return finished(figure, name, told)


def lines(
    layers: Mapping[str, Any], parts: Mapping[str, Sequence[float]], y: str, name: str
) -> str:
    """One line a part over the decoder layers."""
    figure, frame = axes(6.4, 3.1, "decoder layer", y)
    num = len(layers["consistency"])
    for place, (label, values) in enumerate(parts.items()):
        frame.plot(
            range(num),
            values,
            color=SERIES[place % len(SERIES)],
            marker=MARKERS[place % len(MARKERS)],
            ms=3.5,
            markevery=(place % 3, 3),
            lw=1.5,
            ls="-" if place < len(SERIES) else ":",
            label=label,
        )
    frame.set_xlim(-0.5, num - 0.5)
    frame.set_ylim(bottom=min(0.0, *(min(values) for values in parts.values())))
    if len(parts) > 1:
        figure.legend(loc="outside upper left", ncols=2, fontsize=9, frameon=False, labelcolor=INK)
    told = "; ".join(
        f"{label} from {min(values):.3g} to {max(values):.3g}" for label, values in parts.items()
    )
    return finished(figure, name, f"{y} by decoder layer: {told}")


def _percent_axes(frame: Axes, across: bool = True) -> None:
    frame.set_ylim(-4, 104)
    frame.set_yticks(_TEN)
    if across:
        frame.set_xticks(_TEN)


def _either_way(rate: Mapping[str, Any]) -> list[list[float]]:
    low, share, high = (100 * rate[key] for key in ("low", "share", "high"))
    return [[max(0.0, share - low)], [max(0.0, high - share)]]
