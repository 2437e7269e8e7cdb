"""A report's document -> one HTML page that loads nothing.

The template says what stands where; this file lays the document's parts out for it. Nothing is
computed here, so that page and report.json say the same.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from steering.evaluate.report import charts, words

_HERE = Path(__file__).parent
PICTURES = {
    "own": "the prompt's own or dealt",
    "none": "none",
    "caption": "its caption, as text",
    "blank": "blank, of its size",
    "noise": "noise, of its size",
}


def render(document: Mapping[str, Any]) -> str:
    """The page. Text from prompts, answers and names is escaped; no part of it is a script."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=words.percent,
        interval=words.interval,
        points_of=words.points_of,
        p_value=words.p_value,
        number=words.number,
    )
    states = document["states"]
    return environment.get_template("report.html.jinja").render(
        doc=document,
        css=(_HERE / "report.css").read_text("utf-8"),
        title=f"Evaluation of {document['run']['settings'].get('model') or 'a model'}",
        pictures=PICTURES,
        overview=overview(document),
        suites=list(suites(document)),
        frontiers=_frontiers(document),
        families=[
            (family, charts.by_alpha(document, family, number))
            for number, family in enumerate(document["families"])
        ],
        rates={point["condition"]: point["rates"] for point in document["points"]},
        planes=[] if states is None else list(charts.planes(states)),
        by_layer=[] if states is None else _by_layer(states["layers"]),
        groups=_by_condition(document["samples"]["groups"]),
    )


def overview(document: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions down, suites across; of each suite what it is there for: right answers where
    there are any on pictures, else refusals."""
    cells = document["summary"]["cells"]
    places = list(dict.fromkeys((cell["suite"], cell["kind"]) for cell in cells))
    columns = []
    for suite, kind in places:
        here = [cell for cell in cells if (cell["suite"], cell["kind"]) == (suite, kind)]
        is_right = kind == "visual" and any("right" in cell["rates"] for cell in here)
        columns.append(
            {"suite": suite, "kind": kind, "outcome": "right" if is_right else "refused"}
        )
    by_place = {(c["condition"], c["suite"], c["kind"]): c for c in cells}
    rows = [
        {
            "condition": condition["name"],
            "cells": [
                by_place.get((condition["name"], column["suite"], column["kind"]))
                for column in columns
            ],
        }
        for condition in document["conditions"]
    ]
    return {"columns": columns, "rows": rows}


def suites(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each suite and kind with a row a condition: the cell, and the comparisons by outcome."""
    summary = document["summary"]
    compared = {
        (each["condition"], each["suite"], each["kind"], each["outcome"]): each
        for each in summary["comparisons"]
    }
    for column in overview(document)["columns"]:
        suite, kind = column["suite"], column["kind"]
        cells = [
            cell for cell in summary["cells"] if (cell["suite"], cell["kind"]) == (suite, kind)
        ]
        outcomes = [
            outcome
            for outcome in ("refused", "right", "unsafe", "degenerate")
            if any(outcome in cell["rates"] for cell in cells)
        ]
        rows = [
            (cell, {o: compared.get((cell["condition"], suite, kind, o)) for o in outcomes})
            for cell in cells
        ]
        yield {"suite": suite, "kind": kind, "outcomes": outcomes, "rows": rows}


def _frontiers(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for cost, mark in (
        ("harmless_lost", "on_frontier"),
        ("pictures_right", "on_picture_frontier"),
    ):
        chart = charts.frontier(document, cost, mark)
        if chart is not None:
            found.append({"words": document["measures"][cost], "chart": chart})
    return found


def _by_layer(layers: Mapping[str, Any]) -> list[tuple[str, str]]:
    shares = {"consistency": layers["consistency"], "relative shift": layers["relative_shift"]}
    found = [
        (
            "Norm of the last token's state, and of the shift between a blank picture and none "
            "(medians)",
            charts.lines(
                layers, {**layers["norm"], "shift": layers["shift_norm"]}, "norm", "norms"
            ),
        ),
        (
            "The shift: consistency, the mean cosine between two prompts' shifts, and its norm "
            "relative to the state's",
            charts.lines(layers, shares, "cosine, share of the norm", "shift"),
        ),
    ]
    if layers["dose"]:
        found.append(
            (
                "Relative dose: what is subtracted at a layer, as a share of the state's norm "
                "(medians)",
                charts.lines(layers, layers["dose"], "share of the norm", "doses"),
            )
        )
    if layers["distance"]:
        found.append(
            (
                "Distance to the same prompt without a picture; 1 is the unsteered distance",
                charts.lines(layers, layers["distance"], "relative distance", "distances"),
            )
        )
    return found


def _by_condition(groups: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        if group["samples"]:
            found.setdefault(group["condition"], []).append(group)
    return found
