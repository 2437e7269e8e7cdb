"""Scenario `second-turn`: how much sooner the second answer about the same picture begins."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from server.bench import tables
from server.bench.effort import Effort, Outcome, Progress
from server.bench.load import Column, Served, Switch, in_turn, servers_of
from server.bench.prompts import FOLLOW_UP, Prompts
from server.bench.stream import StreamRecord
from server.bench.summary import Interval, Spread

SECOND_TOKENS = 4


@dataclass(frozen=True)
class SecondTurn:
    """One server, one conversation at a time; first, second: time to first token in seconds.

    ratio: second over first within each conversation. cached_tokens of second_prompt_tokens: what
    the server says it had kept of the second prompt.
    """

    target: str
    first: Spread | None
    second: Spread | None
    ratio: Interval | None
    cached_tokens: Spread | None
    second_prompt_tokens: Spread | None
    num_failed: int
    first_error: str


def num_steps(columns: Sequence[Column], effort: Effort) -> int:
    return effort.num_rounds * len(columns)


async def run(
    columns: Sequence[Column], prompts: Prompts, effort: Effort, progress: Progress
) -> Outcome:
    rows = await measure(servers_of("second-turn", columns), prompts, effort, progress)
    figures = {"second_turn": [asdict(row) for row in rows]}
    return Outcome([table_of(rows)], figures, sum(row.num_failed for row in rows))


async def measure(
    columns: Sequence[Served], prompts: Prompts, effort: Effort, progress: Progress
) -> list[SecondTurn]:
    """A question about a photograph, an answer of `max_tokens`, then a second question."""
    numbers, switch = itertools.count(), Switch(effort.pause_s)
    turns: dict[str, list[tuple[StreamRecord, StreamRecord]]] = {c.name: [] for c in columns}
    for round_ in range(-effort.warmup, effort.rounds):
        for column in in_turn(columns, round_):
            progress(column.name)
            messages = prompts.about_picture(next(numbers), round_, new_size=column.new_sizes)
            await switch.to(column)
            [first] = await column.answer([messages], effort.max_tokens)
            answer = {"role": "assistant", "content": first.text}
            question = {"role": "user", "content": FOLLOW_UP}
            [second] = await column.answer([[*messages, answer, question]], SECOND_TOKENS)
            if round_ >= 0:
                turns[column.name].append((first, second))
    return [_result(name, pairs) for name, pairs in turns.items()]


def _result(name: str, pairs: Sequence[tuple[StreamRecord, StreamRecord]]) -> SecondTurn:
    good = [(a, b) for a, b in pairs if not (a.error or b.error)]
    errors = [record.error for pair in pairs for record in pair if record.error]
    return SecondTurn(
        target=name,
        first=Spread.of(a.time_to_first_token_s for a, _ in good),
        second=Spread.of(b.time_to_first_token_s for _, b in good),
        ratio=Interval.of(b.time_to_first_token_s / a.time_to_first_token_s for a, b in good),
        cached_tokens=Spread.of(b.cached_tokens for _, b in good),
        second_prompt_tokens=Spread.of(b.prompt_tokens for _, b in good),
        num_failed=len(pairs) - len(good),
        first_error=errors[0] if errors else "",
    )


def table_of(rows: Sequence[SecondTurn]) -> Table:
    table = tables.table(
        "Time to first token of two questions about one picture: median (interquartile range)\n"
        "Ratio within conversations: median (95 % interval of the median)",
        ("server", "first ms", "second ms", "second / first", "conversations")
        + ("cached of second prompt",),
        num_names=1,
    )
    for row in rows:
        table.add_row(
            tables.name(row.target, row.num_failed, row.first_error),
            tables.spread(row.first, 1000, "{:.1f}"),
            tables.spread(row.second, 1000, "{:.1f}"),
            tables.interval(row.ratio, 1, "{:.3f}"),
            str(row.ratio.n if row.ratio else 0),
            f"{tables.median(row.cached_tokens)} of {tables.median(row.second_prompt_tokens)}",
        )
    return table
