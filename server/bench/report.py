"""A run on a terminal, and as JSON for a file. Not its scenario's own tables and figures."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.bench import machine, tables
from server.bench.footprint import Footprint
from server.bench.run import Run


def show(run: Run, console: Console) -> None:
    """The scenario's tables, the memory of servers that were started, and how it was measured."""
    for table in run.outcome.tables:
        console.print(table)
    if run.footprints and run.scenario != "memory":  # its own table has that
        console.print(_footprint_table(run.footprints))
    console.print(_how(run), markup=False)


def as_json(run: Run) -> str:
    """One object; keys of targets left out."""
    effort, prompts = run.effort, run.prompts
    settings = {
        "scenario": run.scenario,
        "rounds": effort.rounds,
        "warmup": effort.warmup,
        "streams": effort.streams,
        "max_tokens": effort.max_tokens,
        "requests": effort.num_requests,
        "changes": effort.num_changes,
        "arrivals": effort.arrivals,
        "pause_s": effort.pause_s,
        "seed": prompts.first,
        "dtype": run.wanted.dtype,
        "baseline": effort.baseline,
        "server": dict(run.wanted.settings),
        "load_digest": prompts.digest,
        "image_size": prompts.image.size,
        "checkpoint": run.checkpoint and machine.checkpoint_digest(run.checkpoint.model),
    }
    document = {
        "machine": run.machine,
        "command": sys.argv,
        "settings": settings,
        "targets": [asdict(replace(target, api_key="", pid=0)) for target in run.targets],
        **run.outcome.figures,
        "footprints": {name: asdict(each) for name, each in run.footprints.items()},
    }
    return json.dumps(document, indent=1)


def _footprint_table(footprints: Mapping[str, Footprint]) -> Table:
    """One row for each server that was started here."""
    table = tables.table(
        "Host memory of each server's process since it started (loading included), MiB",
        ("server", "peak", "at the end"),
        num_names=1,
    )
    for name, footprint in footprints.items():
        peak, now = tables.mib(footprint.peak_bytes), tables.mib(footprint.now_bytes)
        table.add_row(escape(name), peak, now)
    return table


def _how(run: Run) -> str:
    """In one line; `memory` and `toggle` have no rounds."""
    effort, image = run.effort, run.prompts.image
    parts = [f"picture {image.width} x {image.height}. {machine.summary(run.machine)}"]
    if run.scenario != "toggle":
        parts.insert(0, f"{effort.pause_s:g} s of rest before each change of server")
    if run.scenario != "memory":
        parts.insert(0, f"{effort.max_tokens} tokens each")
    if run.scenario not in ("memory", "toggle"):
        parts.insert(0, f"{effort.rounds} rounds after {effort.warmup} of warm-up")
    return ", ".join(parts)
