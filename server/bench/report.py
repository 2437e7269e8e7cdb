"""The figures as tables for a terminal and as JSON for a file."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from server.bench.load import Burst, Load
from server.bench.summary import Cell, Comparison, Spread, cells, comparisons
from server.bench.target import Target


def tables(bursts: Sequence[Burst], baseline: str, max_tokens: int) -> Group:
    """Medians with interquartile ranges; a second table of ratios when there is a choice."""
    compared = comparisons(bursts, baseline)
    parts = [_cell_table(cells(bursts), max_tokens)]
    if compared:
        parts.append(_comparison_table(compared, baseline))
    return Group(*parts)


def as_json(
    bursts: Sequence[Burst],
    targets: Sequence[Target],
    load: Load,
    baseline: str,
    machine: Mapping[str, object],
    settings: Mapping[str, object],
) -> str:
    """Everything that was measured, to the single chat; keys of targets left out."""
    return json.dumps(
        {
            "machine": dict(machine),
            "command": sys.argv,
            "settings": {
                **settings,
                "max_tokens": load.max_tokens,
                "seed": load.seed,
                "load_digest": load.digest,
                "image_size": load.image.size,
            },
            "targets": [asdict(replace(target, api_key="")) for target in targets],
            "cells": [asdict(cell) for cell in cells(bursts)],
            "comparisons": [asdict(each) for each in comparisons(bursts, baseline)],
            "bursts": [asdict(burst) | {"tokens_per_s": burst.tokens_per_s} for burst in bursts],
        },
        indent=1,
    )


def _cell_table(rows: Sequence[Cell], max_tokens: int) -> Table:
    table = Table(title="Streaming chats with a picture: median (interquartile range)")
    table.add_column("streams", justify="right")
    table.add_column("server")
    for name in ("tokens/s", "TTFT s", "inter-token ms", "longest gap ms", "tokens per chat"):
        table.add_column(name, justify="right")
    for index, row in enumerate(rows):
        last_of_group = index + 1 == len(rows) or rows[index + 1].num_streams != row.num_streams
        failed = f" {row.num_failed} failed: {row.first_error}" if row.num_failed else ""
        table.add_row(
            str(row.num_streams),
            escape(row.target + failed),
            _spread(row.tokens_per_s, 1, "{:.1f}"),
            _spread(row.time_to_first_token_s, 1, "{:.3f}"),
            _spread(row.inter_token_latency_s, 1000, "{:.1f}"),
            _spread(row.longest_gap_s, 1000, "{:.0f}"),
            _tokens(row, max_tokens),
            end_section=last_of_group,
        )
    return table


def _comparison_table(rows: Sequence[Comparison], baseline: str) -> Table:
    table = Table(title=f"Ratio to {baseline} in the same round: median (interquartile range)")
    table.add_column("streams", justify="right")
    table.add_column("server")
    for name in ("tokens/s", "TTFT", "inter-token"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.num_streams),
            escape(row.target),
            _spread(row.tokens_per_s, 1, "{:.3f}"),
            _spread(row.time_to_first_token, 1, "{:.3f}"),
            _spread(row.inter_token_latency, 1, "{:.3f}"),
        )
    return table


def _spread(value: Spread | None, scale: float, form: str) -> str:
    if value is None:
        return "-"
    median, low, high = (form.format(scale * v) for v in (value.median, value.low, value.high))
    return f"{median} ({low}-{high})"


def _tokens(row: Cell, max_tokens: int) -> str:
    """Marked when the server stopped early or the number is only that of the chunks."""
    if row.tokens_per_chat is None:
        return "-"
    short = "" if row.tokens_per_chat.low == max_tokens else f" of {max_tokens}"
    chunks = " (chunks)" if "chunks" in row.counted_by else ""
    return f"{row.tokens_per_chat.median:.0f}{short}{chunks}"
