"""Scenario `stalls`: what arriving long prompts do to the answers that are being written."""

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from server.bench import load, tables
from server.bench.effort import Effort, Outcome, Progress
from server.bench.load import Column, Served, Switch, in_turn, servers_of, steady_gaps
from server.bench.prompts import Message, Prompts
from server.bench.stream import StreamRecord, chat
from server.bench.summary import Interval, Spread
from server.bench.target import BenchError

ARRIVAL_TOKENS = 2000
_HEAD_START_S = 0.1  # of the answers before the first arrivals, so that they get rows first
_PROBE_WORDS = (100, 400)


@dataclass(frozen=True)
class Stalls:
    """One server at one number of running answers; seconds.

    quiet, disturbed: gaps between tokens while all answers were being written, without and with
    the arrivals. worst: p99 with over median without, per pair of rounds. arrivals_at_once: the
    prompts under way at any moment; arrival_tokens: their length by the server's own count;
    num_arrivals: those answered while measuring.
    """

    target: str
    num_streams: int
    quiet: Spread | None
    disturbed: Spread | None
    worst: Interval | None
    arrivals_at_once: int
    arrival_tokens: Spread | None
    num_arrivals: int
    num_failed: int
    first_error: str


@dataclass(frozen=True)
class _Half:
    records: Sequence[StreamRecord]
    arrivals: Sequence[StreamRecord]

    @property
    def gaps(self) -> list[float]:
        return steady_gaps(self.records)


def num_steps(columns: Sequence[Column], effort: Effort) -> int:
    return 2 * load.num_steps(columns, effort)


async def run(
    columns: Sequence[Column], prompts: Prompts, effort: Effort, progress: Progress
) -> Outcome:
    rows = await measure(servers_of("stalls", columns), prompts, effort, progress)
    figures = {"stalls": [asdict(row) for row in rows]}
    return Outcome([table_of(rows)], figures, sum(row.num_failed for row in rows))


async def measure(
    columns: Sequence[Served], prompts: Prompts, effort: Effort, progress: Progress
) -> list[Stalls]:
    """Answers about photographs, once left alone and once while prompts of 2,000 tokens without a
    picture arrive: `effort.arrivals` at first, then each as soon as one of them is answered.
    Raises BenchError.
    """
    numbers, switch = itertools.count(), Switch(effort.pause_s)
    num_words = {
        column.name: await _words_for(column, prompts, numbers, ARRIVAL_TOKENS)
        for column in columns
    }
    pairs: dict[tuple[str, int], list[tuple[_Half, _Half]]] = defaultdict(list)
    rounds = range(-effort.warmup, effort.rounds)
    for round_, num_streams in itertools.product(rounds, effort.streams):
        for column in in_turn(columns, round_):
            await switch.to(column)
            halves: dict[bool, _Half] = {}
            for disturb in (round_ % 2 == 0, round_ % 2 == 1):
                progress(f"{column.name}, {num_streams} at once")
                chats = [
                    prompts.about_picture(next(numbers), stream, new_size=column.new_sizes)
                    for stream in range(num_streams)
                ]
                words = num_words[column.name]
                arriving = (prompts.text(number, words) for number in numbers)
                halves[disturb] = await _half(
                    column, chats, effort.max_tokens, arriving, effort.arrivals if disturb else 0
                )
            if round_ >= 0:
                pairs[column.name, num_streams].append((halves[False], halves[True]))
    return [
        _result(column.name, num_streams, effort.arrivals, pairs[column.name, num_streams])
        for num_streams in effort.streams
        for column in columns
    ]


async def _half(
    column: Served,
    chats: Sequence[Sequence[Message]],
    max_tokens: int,
    arriving: Iterator[Sequence[Message]],
    at_once: int,
) -> _Half:
    running = asyncio.create_task(column.answer(chats, max_tokens, every_token=True))
    arrivals: list[StreamRecord] = []

    async def arrive() -> None:
        """One prompt after the other, until one is refused. The last is waited for, not counted:
        abandoned, some servers would go on with it while the next answers are measured.
        """
        while not running.done():
            body = column.target.body(next(arriving), 2)
            record = await chat(column.client, column.target, body)
            if record.error or not running.done():
                arrivals.append(record)
            if record.error:
                break

    await asyncio.sleep(_HEAD_START_S)
    await asyncio.gather(*(arrive() for _ in range(at_once)))
    return _Half(await running, arrivals)


async def _words_for(
    column: Served, prompts: Prompts, numbers: Iterator[int], num_tokens: int
) -> int:
    """How many words make a prompt of that many tokens, from two short ones."""
    lens = []
    for num_words in _PROBE_WORDS:
        body = column.target.body(prompts.text(next(numbers), num_words), 2)
        record = await chat(column.client, column.target, body)
        if record.error or not record.prompt_tokens:
            raise BenchError(
                f"{column.name}: a prompt of {num_words} words without a picture: "
                f"{record.error or 'the server does not say how many tokens it has'}"
            )
        lens.append(record.prompt_tokens)
    per_word = (lens[1] - lens[0]) / (_PROBE_WORDS[1] - _PROBE_WORDS[0])
    if per_word <= 0:
        raise BenchError(f"{column.name}: a longer prompt has no more tokens, by its own usage")
    return round(_PROBE_WORDS[1] + (num_tokens - lens[1]) / per_word)


def _result(
    name: str, num_streams: int, arrivals_at_once: int, pairs: Sequence[tuple[_Half, _Half]]
) -> Stalls:
    arrivals = [record for _, disturbed in pairs for record in disturbed.arrivals]
    every = [r for pair in pairs for half in pair for r in [*half.records, *half.arrivals]]
    spreads = [(Spread.of(quiet.gaps), Spread.of(disturbed.gaps)) for quiet, disturbed in pairs]
    return Stalls(
        target=name,
        num_streams=num_streams,
        quiet=Spread.of(gap for quiet, _ in pairs for gap in quiet.gaps),
        disturbed=Spread.of(gap for _, disturbed in pairs for gap in disturbed.gaps),
        worst=Interval.of(
            disturbed.p99 / quiet.median for quiet, disturbed in spreads if quiet and disturbed
        ),
        arrivals_at_once=arrivals_at_once,
        arrival_tokens=Spread.of(r.prompt_tokens for r in arrivals if not r.error),
        num_arrivals=sum(not record.error for record in arrivals),
        num_failed=sum(bool(record.error) for record in every),
        first_error=next((record.error for record in every if record.error), ""),
    )


def table_of(rows: Sequence[Stalls]) -> Table:
    table = tables.table(
        "Gaps between tokens of running answers, alone and while long prompts arrive: "
        "median / p99, ms\nRatio within rounds: median (95 % interval of the median)",
        ("streams", "server", "alone", "with arrivals", "p99 with / median alone", "rounds")
        + ("at once", "arrivals answered"),
    )
    for row in rows:
        answered = f"{row.num_arrivals} of {tables.median(row.arrival_tokens)} tokens"
        table.add_row(
            str(row.num_streams),
            tables.name(row.target, row.num_failed, row.first_error),
            tables.median_and_p99(row.quiet),
            tables.median_and_p99(row.disturbed),
            tables.interval(row.worst, 1, "{:.2f}"),
            str(row.worst.n if row.worst else 0),
            str(row.arrivals_at_once),
            answered if row.num_arrivals else "none",
        )
    return table
