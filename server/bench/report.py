"""The figures as tables for a terminal and as JSON for a file."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.markup import escape
from rich.table import Table

from server.bench.footprint import Budget, Footprint
from server.bench.load import Burst
from server.bench.metrics import Account
from server.bench.scrapes import Scrapes
from server.bench.second_turn import SecondTurn
from server.bench.soak import Soak
from server.bench.stalls import Stalls
from server.bench.summary import Cell, Comparison, Interval, Spread, cells, comparisons
from server.bench.target import Target
from server.bench.toggle import Change, Latency, Toggle

MIB = 1024 * 1024


def throughput_tables(bursts: Sequence[Burst], baseline: str, max_tokens: int) -> list[Table]:
    """What was measured, and against the baseline where there is a choice."""
    rows, compared = cells(bursts), comparisons(bursts, baseline)
    tables = [_cell_table(rows, max_tokens)]
    if compared:
        tables.append(_ratio_table(compared, baseline))
        tables += _overhead_table(rows, compared, baseline)
    return tables


def throughput_json(bursts: Sequence[Burst], baseline: str) -> dict[str, Any]:
    """Everything that was measured, to the single chat."""
    return {
        "cells": [asdict(cell) for cell in cells(bursts)],
        "comparisons": [asdict(each) for each in comparisons(bursts, baseline)],
        "bursts": [asdict(burst) | {"tokens_per_s": burst.tokens_per_s} for burst in bursts],
    }


def stalls_table(rows: Sequence[Stalls]) -> Table:
    table = _table(
        "Gaps between tokens of running answers, alone and while long prompts arrive: "
        "median / p99, ms\nRatio within rounds: median (95 % interval of the median)",
        ("streams", "server", "alone", "with arrivals", "p99 with / median alone", "rounds")
        + ("at once", "arrivals answered"),
    )
    for row in rows:
        table.add_row(
            str(row.num_streams),
            _name(row.target, row.num_failed, row.first_error),
            _median_and_p99(row.quiet),
            _median_and_p99(row.disturbed),
            _interval(row.worst, 1, "{:.2f}"),
            str(row.worst.n if row.worst else 0),
            str(row.arrivals_at_once),
            f"{row.num_arrivals} of {_median(row.arrival_tokens)} tokens"
            if row.num_arrivals
            else "none",
        )
    return table


def second_turn_table(rows: Sequence[SecondTurn]) -> Table:
    table = _table(
        "Time to first token of two questions about one picture: median (interquartile range)\n"
        "Ratio within conversations: median (95 % interval of the median)",
        ("server", "first ms", "second ms", "second / first", "conversations")
        + ("cached of second prompt",),
        num_names=1,
    )
    for row in rows:
        table.add_row(
            _name(row.target, row.num_failed, row.first_error),
            _spread(row.first, 1000, "{:.1f}"),
            _spread(row.second, 1000, "{:.1f}"),
            _interval(row.ratio, 1, "{:.3f}"),
            str(row.ratio.n if row.ratio else 0),
            f"{_median(row.cached_tokens)} of {_median(row.second_prompt_tokens)}",
        )
    return table


def soak_table(rows: Sequence[Soak]) -> Table:
    table = _table(
        "Memory of the server's process over unlike requests, MiB\n"
        "Budget: weights + KV cache + other caches. Serving: median (interquartile range) of "
        "readings between requests. Growth: over the second half",
        ("server", "requests", "cancelled", "ready", "peak", "budget", "peak / budget")
        + ("serving / budget", "readings", "growth per 1000"),
        num_names=1,
    )
    for row in rows:
        table.add_row(
            _name(row.target, row.num_failed, row.first_error),
            str(row.num_requests),
            str(row.num_cancelled),
            _mib(row.ready_bytes),
            _mib(row.peak_bytes),
            _budget(row.budget) if row.budget else "-",
            f"{row.ratio:.2f}" if row.ratio else "-",
            _spread(row.serving_ratio, 1, "{:.2f}"),
            str(len(row.samples)),
            f"{1000 * row.slope_bytes / MIB:+.1f}",
        )
    return table


def toggle_tables(result: Toggle) -> list[Table]:
    """How soon changes were in force, what became of the load, what many tenants cost."""
    changes = _table(
        "A tenant's alpha in force on every replica: median / p99 / maximum, ms\n"
        "Not in `all`: processes of their own, whose start is in their time from sending",
        ("changes", "by", "from sending", "from the store's commit"),
    )
    for way, made in result.by_way.items():
        times = (Latency.of(c.from_sent_s for c in made), Latency.of(c.from_commit_s for c in made))
        changes.add_row(str(len(made)), escape(way), *map(_latency, times))
    load = _table(
        "Answers meanwhile. Mixed: more than one revision in an answer's chunks. Behind: an older "
        "one than was in force when the chat was sent",
        ("streams", "seconds", "answered", "dropped", "mixed", "behind"),
        num_names=0,
    )
    dropped = f"{result.num_failed}: {result.first_error}" if result.num_failed else "0"
    load.add_row(
        str(result.num_streams),
        f"{result.load_s:.0f}",
        str(result.num_answered),
        escape(dropped),
        str(result.num_mixed),
        str(result.num_behind),
    )
    tenants = _table(
        "What tenants cost. In the bench's own process, median / p99 in microseconds: to admit a "
        "request, to take up a change\nRedis for a change, to all replicas and the operator, "
        f"without load, mean of {result.store_costs[0].num_changes}",
        ("tenants", "admit", "take up", "Redis: commands", "Redis: bytes sent"),
        num_names=0,
    )
    for there, cost in zip(result.admissions, result.store_costs, strict=True):
        micro = [f"{1e6 * s.median:.1f} / {1e6 * s.p99:.1f}" for s in (there.admit, there.take_up)]
        redis = (f"{cost.commands:.1f}", f"{cost.sent_bytes:.0f}")
        tenants.add_row(str(there.num_tenants), *micro, *redis)
    return [changes, load, tenants]


def toggle_json(result: Toggle) -> dict[str, Any]:
    """Every change, and the figures of the tables."""

    def figures(made: Sequence[Change]) -> dict[str, Any]:
        sent, commit = (c.from_sent_s for c in made), (c.from_commit_s for c in made)
        both = {"from_sent_s": Latency.of(sent), "from_commit_s": Latency.of(commit)}
        return {name: latency and asdict(latency) for name, latency in both.items()}

    ways = {way: figures(made) for way, made in result.by_way.items()}
    return {"toggle": asdict(result) | {"in_force": ways}}


def accounts_table(rows: Sequence[Account], baseline: str) -> Table:
    table = _table(
        "What steering costs a chat, ms: as /metrics exports it and answers say it, median "
        f"(interquartile range);\nthe difference to {baseline} within rounds, median (95 % "
        "interval); and whether the exported median lies in that of the whole chat",
        ("streams", "server", "exported", "answers", "TTFT more", "whole more", "within"),
    )
    for row in rows:
        table.add_row(
            str(row.num_streams),
            escape(row.target),
            _spread(row.exported_s, 1000, "{:.2f}"),
            _spread(row.told_ms, 1, "{:.2f}"),
            _interval(row.more.time_to_first_token_more_s, 1000, "{:+.1f}"),
            _interval(row.more.e2e_more_s, 1000, "{:+.1f}"),
            "yes" if row.agrees else "no",
        )
    return table


def scrapes_tables(result: Scrapes) -> list[Table]:
    """What a scrape takes, and what it does to the answers beside it."""
    scrape = _table(
        "A scrape of /metrics in OpenMetrics, ms: the first after every tenant's first traffic, "
        "the others;\nmedian (interquartile range) / p99",
        ("tenants", "lines", "KiB", "first", "idle", "beside answers"),
        num_names=0,
    )
    scrape.add_row(
        str(result.num_tenants),
        str(result.num_lines),
        f"{result.num_bytes / 1024:.0f}",
        f"{1000 * result.first_s:.1f}",
        *(
            f"{_spread(each, 1000, '{:.1f}')} / {1000 * each.p99:.1f}" if each else "-"
            for each in (result.idle, result.beside)
        ),
    )
    answers = _table(
        "Gaps between tokens of running answers, without and with a scrape each second: "
        "median / p99, ms\nRatios within rounds: median (95 % interval of the median)",
        ("streams", "server", "without", "with", "mean with / without", "p99 with / without")
        + ("rounds",),
    )
    answers.add_row(
        str(result.num_streams),
        _name("deshift", result.num_failed, result.first_error),
        _median_and_p99(result.quiet),
        _median_and_p99(result.scraped),
        _interval(result.slower, 1, "{:.3f}"),
        _interval(result.worst, 1, "{:.3f}"),
        str(result.slower.n if result.slower else 0),
    )
    return [scrape, answers]


def footprint_table(footprints: Mapping[str, Footprint]) -> Table:
    """One row for each server that was started here."""
    table = _table(
        "Host memory of each server's process since it started (loading included), MiB",
        ("server", "peak", "at the end"),
        num_names=1,
    )
    for name, footprint in footprints.items():
        table.add_row(escape(name), _mib(footprint.peak_bytes), _mib(footprint.now_bytes))
    return table


def as_json(
    figures: Mapping[str, Any],
    targets: Sequence[Target],
    machine: Mapping[str, object],
    settings: Mapping[str, object],
) -> str:
    """One object; keys of targets left out."""
    return json.dumps(
        {
            "machine": dict(machine),
            "command": sys.argv,
            "settings": dict(settings),
            "targets": [asdict(replace(target, api_key="", pid=0)) for target in targets],
            **figures,
        },
        indent=1,
    )


def _cell_table(rows: Sequence[Cell], max_tokens: int) -> Table:
    table = _table(
        "Streaming chats with a photograph each: median (interquartile range)",
        ("streams", "server", "tokens/s", "TTFT ms", "inter-token ms", "gap p50 / p99 ms")
        + ("decode step ms", "cached of prompt", "tokens"),
    )
    for index, row in enumerate(rows):
        table.add_row(
            str(row.num_streams),
            _name(row.target, row.num_failed, row.first_error),
            _spread(row.tokens_per_s, 1, "{:.1f}"),
            _spread(row.time_to_first_token_s, 1000, "{:.0f}"),
            _spread(row.inter_token_latency_s, 1000, "{:.1f}"),
            _median_and_p99(row.gap_s),
            _spread(row.step_s, 1000, "{:.1f}"),
            f"{_median(row.cached_tokens)} of {_median(row.prompt_tokens)}",
            _tokens(row, max_tokens),
            end_section=_ends_group(rows, index),
        )
    return table


def _ratio_table(rows: Sequence[Comparison], baseline: str) -> Table:
    table = _table(
        f"Ratio to {baseline} within rounds: median (95 % interval of the median)",
        ("streams", "server", "rounds", "tokens/s", "TTFT", "inter-token", "decode step"),
    )
    for index, row in enumerate(rows):
        table.add_row(
            str(row.num_streams),
            escape(row.target),
            str(row.tokens_per_s.n if row.tokens_per_s else 0),
            *(
                _interval(ratio, 1, "{:.3f}")
                for ratio in (
                    row.tokens_per_s,
                    row.time_to_first_token,
                    row.inter_token_latency,
                    row.step,
                )
            ),
            end_section=_ends_group(rows, index),
        )
    return table


def _overhead_table(
    rows: Sequence[Cell], compared: Sequence[Comparison], baseline: str
) -> list[Table]:
    """The servers' own account of steering beside the difference that a client sees."""
    told = {(row.num_streams, row.target): row for row in rows if row.overhead_ms}
    table = _table(
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
            _spread(cell.overhead_ms, 1, "{:.2f}"),
            _spread(cell.shift_ms, 1, "{:.2f}"),
            _interval(each.time_to_first_token_more_s, 1000, "{:+.1f}"),
            _interval(each.e2e_more_s, 1000, "{:+.1f}"),
        )
    return [table] if table.row_count else []


def _table(title: str, columns: Sequence[str], *, num_names: int = 2) -> Table:
    """The last of the first `num_names` columns is a name, the rest are numbers."""
    table = Table(title=title)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == num_names - 1 else "right")
    return table


def _name(target: str, num_failed: int, first_error: str) -> str:
    return escape(target + (f" {num_failed} failed: {first_error}" if num_failed else ""))


def _ends_group(rows: Sequence[Cell] | Sequence[Comparison], index: int) -> bool:
    return index + 1 == len(rows) or rows[index + 1].num_streams != rows[index].num_streams


def _spread(value: Spread | None, scale: float, form: str) -> str:
    return _three(value, scale, form.format)


def _interval(value: Interval | None, scale: float, form: str) -> str:
    """Marked where too few rounds make it less than a 95 % interval."""
    short = "" if value is None or value.level >= 0.95 else f", {value.level:.0%}"
    return _three(value, scale, form.format, short)


def _three(
    value: Spread | Interval | None, scale: float, form: Callable[[float], str], note: str = ""
) -> str:
    if value is None:
        return "-"
    median, low, high = (form(scale * each) for each in (value.median, value.low, value.high))
    between = " to " if low.startswith(("+", "-")) or high.startswith(("+", "-")) else "-"
    return f"{median} ({low}{between}{high}{note})"


def _median(value: Spread | None) -> str:
    return "-" if value is None else f"{value.median:.0f}"


def _median_and_p99(value: Spread | None) -> str:
    return "-" if value is None else f"{1000 * value.median:.1f} / {1000 * value.p99:.1f}"


def _latency(value: Latency | None) -> str:
    if value is None:
        return "-"
    return " / ".join(f"{1000 * each:.1f}" for each in (value.median, value.p99, value.maximum))


def _tokens(row: Cell, max_tokens: int) -> str:
    """Marked when the server stopped early or the number is only that of the chunks."""
    if row.tokens_per_chat is None:
        return "-"
    short = "" if row.tokens_per_chat.low == max_tokens else f" of {max_tokens}"
    chunks = " (chunks)" if "chunks" in row.counted_by else ""
    return f"{row.tokens_per_chat.median:.0f}{short}{chunks}"


def _budget(budget: Budget) -> str:
    parts = (budget.weights_bytes, budget.kv_bytes, budget.caches_bytes)
    return " + ".join(map(_mib, parts))


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:.0f}"
