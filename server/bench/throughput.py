"""Scenario `throughput`: tokens/s, times to first tokens, gaps, and what steering costs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from server.bench import load, tables
from server.bench.effort import Effort, Outcome, Progress
from server.bench.load import Burst, Column
from server.bench.prompts import Prompts
from server.bench.summary import Cell, Comparison, cells, comparisons


async def run(
    columns: Sequence[Column], prompts: Prompts, effort: Effort, progress: Progress
) -> Outcome:
    bursts = await load.measure(columns, prompts, effort, progress)
    return Outcome(
        tables_of(bursts, effort.baseline, effort.max_tokens),
        figures_of(bursts, effort.baseline),
        load.num_failed(bursts),
    )


def tables_of(bursts: Sequence[Burst], baseline: str, max_tokens: int) -> list[Table]:
    """What was measured, and against the baseline where there is a choice."""
    rows, compared = cells(bursts), comparisons(bursts, baseline)
    result = [_cell_table(rows, max_tokens)]
    if compared:
        result.append(_ratio_table(compared, baseline))
        result += _overhead_table(rows, compared, baseline)
    return result


def figures_of(bursts: Sequence[Burst], baseline: str) -> dict[str, Any]:
    """Everything that was measured, to the single chat."""
    return {
        "cells": [asdict(cell) for cell in cells(bursts)],
        "comparisons": [asdict(each) for each in comparisons(bursts, baseline)],
        "bursts": [asdict(burst) | {"tokens_per_s": burst.tokens_per_s} for burst in bursts],
    }


def _cell_table(rows: Sequence[Cell], max_tokens: int) -> Table:
    table = tables.table(
        "Streaming chats with a photograph each: median (interquartile range)",
        ("streams", "server", "tokens/s", "TTFT ms", "inter-token ms", "gap p50 / p99 ms")
        + ("decode step ms", "cached of prompt", "tokens"),
    )
    for index, row in enumerate(rows):
        table.add_row(
            str(row.num_streams),
            tables.name(row.target, row.num_failed, row.first_error),
            tables.spread(row.tokens_per_s, 1, "{:.1f}"),
            tables.spread(row.time_to_first_token_s, 1000, "{:.0f}"),
            tables.spread(row.inter_token_latency_s, 1000, "{:.1f}"),
            tables.median_and_p99(row.gap_s),
            tables.spread(row.step_s, 1000, "{:.1f}"),
            f"{tables.median(row.cached_tokens)} of {tables.median(row.prompt_tokens)}",
            _tokens(row, max_tokens),
            end_section=_ends_group(rows, index),
        )
    return table


def _ratio_table(rows: Sequence[Comparison], baseline: str) -> Table:
    table = tables.table(
        f"Ratio to {baseline} within rounds: median (95 % interval of the median)",
        ("streams", "server", "rounds", "tokens/s", "TTFT", "inter-token", "decode step"),
    )
    for index, row in enumerate(rows):
        ratios = (row.tokens_per_s, row.time_to_first_token, row.inter_token_latency, row.step)
        table.add_row(
            str(row.num_streams),
            escape(row.target),
            str(row.tokens_per_s.n if row.tokens_per_s else 0),
            *(tables.interval(ratio, 1, "{:.3f}") for ratio in ratios),
            end_section=_ends_group(rows, index),
        )
    return table


def _overhead_table(
    rows: Sequence[Cell], compared: Sequence[Comparison], baseline: str
) -> list[Table]:
    """The servers' own account of steering beside the difference that a client sees."""
    told = {(row.num_streams, row.target): row for row in rows if row.overhead_ms}
    table = tables.table(
        f"What steering costs a chat, ms: the server's account, and the difference to {baseline}",
        ("streams", "server", "it says: overhead", "it says: shift", "TTFT more", "whole more"),
    )
    for each in compared:
        cell = told.get((each.num_streams, each.target))
        if cell is None:
            continue
        table.add_row(
            str(each.num_streams),
            escape(each.target),
            tables.spread(cell.overhead_ms, 1, "{:.2f}"),
            tables.spread(cell.shift_ms, 1, "{:.2f}"),
            tables.interval(each.time_to_first_token_more_s, 1000, "{:+.1f}"),
            tables.interval(each.e2e_more_s, 1000, "{:+.1f}"),
        )
    return [table] if table.row_count else []


def _ends_group(rows: Sequence[Cell] | Sequence[Comparison], index: int) -> bool:
    return index + 1 == len(rows) or rows[index + 1].num_streams != rows[index].num_streams


def _tokens(row: Cell, max_tokens: int) -> str:
    """Marked when the server stopped early or the number is only that of the chunks."""
    if row.tokens_per_chat is None:
        return "-"
    short = "" if row.tokens_per_chat.low == max_tokens else f" of {max_tokens}"
    chunks = " (chunks)" if "chunks" in row.counted_by else ""
    return f"{row.tokens_per_chat.median:.0f}{short}{chunks}"
