"""What steering costs, by bench's own interleaved rounds: informative, unless a bound is given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
from rich.table import Table

from server.bench import load, summary, throughput
from server.bench.effort import Effort
from server.bench.load import Served
from server.bench.prompts import NUM_CODES, Prompts
from server.bench.summary import Comparison, Interval
from server.bench.target import BenchError, Target, resolved, variants
from server.verify.check import FailedError, Finding, SkippedError

MAX_TOKENS = 12
CONDITIONS = "off,off,dataset,sample-warm"


@dataclass(frozen=True)
class Overhead:
    """tables: for a person; figures: everything. The ratios are dataset level's over off's."""

    tables: list[Table]
    figures: dict[str, Any]
    time_to_first_token: Interval | None
    step: Interval | None


async def measure(
    client: httpx.AsyncClient,
    target: Target,
    prompts: Prompts,
    *,
    rounds: int,
    has_sample: bool,
    progress: Callable[[str], None],
) -> Overhead:
    """One stream, conditions in turn. Raises BenchError."""
    conditions = CONDITIONS if has_sample else "off,off,dataset"
    columns = [
        Served(client, await resolved(client, each, prompts.about_picture(NUM_CODES - 1 - number)))
        for number, each in enumerate(variants([target], {target.name: conditions}))
    ]
    effort = Effort(streams=[1], rounds=rounds, max_tokens=MAX_TOKENS)
    bursts = await load.measure(columns, prompts, effort, progress)
    if failed := next((r.error for burst in bursts for r in burst.records if r.error), None):
        raise BenchError(failed)
    base = columns[0].name
    compared: dict[str, Comparison] = {
        each.target: each for each in summary.comparisons(bursts, base)
    }
    dataset = compared[f"{target.name} dataset"]
    return Overhead(
        throughput.tables_of(bursts, base, MAX_TOKENS),
        throughput.figures_of(bursts, base),
        dataset.time_to_first_token,
        dataset.step,
    )


def judged(overhead: Overhead, max_overhead: float | None) -> Finding:
    """max_overhead: of dataset level, a share; None judges nothing. Only a cost that is surely
    beyond it fails: the whole interval is. Raises FailedError, SkippedError."""
    ratios = {"TTFT": overhead.time_to_first_token, "decode step": overhead.step}
    known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    if not known:
        raise SkippedError("too few tokens to tell a decode step")
    said = ", ".join(
        f"{name} {r.median:.3f} ({r.low:.3f}-{r.high:.3f})" for name, r in known.items()
    )
    if max_overhead is not None:
        for name, ratio in known.items():
            if ratio.low > 1 + max_overhead:
                raise FailedError(
                    f"{name} at dataset level is {ratio.median:.3f} times off's, the whole "
                    f"interval over {1 + max_overhead:g}",
                    **overhead.figures,
                )
    return f"dataset level over off: {said}", overhead.figures
