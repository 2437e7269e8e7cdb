"""The load: bursts of chats about photographs, the columns taking turns round by round."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import httpx

from server.bench.effort import Effort, Progress
from server.bench.prompts import Message, Prompts
from server.bench.stream import StreamRecord, chat
from server.bench.target import BenchError, Target

BETWEEN_BURSTS_S = 0.05  # in which a server puts away what the last burst left
AnyColumn = TypeVar("AnyColumn")


class Column(Protocol):
    """One way to answer: a server, or a library in this process (generate.py)."""

    @property
    def name(self) -> str: ...

    @property
    def new_sizes(self) -> bool:
        """Whether every photograph has a size of its own."""
        ...

    @property
    def process(self) -> str:
        """Equal for columns that one process answers, as a server's steering conditions."""
        ...

    async def answer(
        self, chats: Sequence[Sequence[Message]], max_tokens: int
    ) -> list[StreamRecord]:
        """Start all chats at the same moment and wait for all."""
        ...


@dataclass(frozen=True)
class Served:
    """A server behind a URL."""

    client: httpx.AsyncClient
    target: Target

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def new_sizes(self) -> bool:
        return self.target.new_sizes

    @property
    def process(self) -> str:
        return self.target.url

    async def answer(
        self, chats: Sequence[Sequence[Message]], max_tokens: int, *, every_token: bool = False
    ) -> list[StreamRecord]:
        """`every_token`: ask for log-probabilities, with which a token that has no text of its own
        comes in a chunk of its own, too."""
        extra = {"logprobs": True} if every_token else {}
        bodies = [self.target.body(messages, max_tokens) | extra for messages in chats]
        return list(
            await asyncio.gather(*(chat(self.client, self.target, body) for body in bodies))
        )


@dataclass(frozen=True)
class Burst:
    """One round of one column: `num_streams` chats that started at the same moment."""

    target: str
    num_streams: int
    round: int
    wall_s: float
    records: tuple[StreamRecord, ...]

    @property
    def is_failed(self) -> bool:
        return any(record.error for record in self.records)

    @property
    def tokens_per_s(self) -> float:
        return sum(record.tokens for record in self.records) / self.wall_s

    @property
    def time_to_first_token_s(self) -> float:
        return statistics.median(record.time_to_first_token_s for record in self.records)

    @property
    def inter_token_latency_s(self) -> float:
        return statistics.median(record.inter_token_latency_s for record in self.records)

    @property
    def e2e_s(self) -> float:
        return statistics.median(record.e2e_s for record in self.records)

    @property
    def step_s(self) -> float:
        """Median gap while all chats were decoding: a decode step at this batch size, without
        the prefills of the burst's beginning. 0.0 when they never all were at once.
        """
        return statistics.median(steady_gaps(self.records) or [0.0])


def steady_gaps(records: Sequence[StreamRecord]) -> list[float]:
    """The gaps, in seconds, that begin after the last chat's first token and end before the first
    chat's last token; failed chats count for nothing.
    """
    times = [
        list(itertools.accumulate(r.gaps_s, initial=r.start_s + r.time_to_first_token_s))
        for r in records
        if not r.error
    ]
    if not times:
        return []
    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
    return [
        after - before
        for each in times
        for before, after in itertools.pairwise(each)
        if before >= begin and after <= end
    ]


def in_turn(columns: Sequence[AnyColumn], round_: int) -> list[AnyColumn]:
    """The order within a round: each column takes each place, before and after each other, so
    that neither a machine's drift nor what the last one left behind favours any of them.
    """
    first = round_ // 2 % len(columns)
    order = [*columns[first:], *columns[:first]]
    return order[::-1] if round_ % 2 else order


class Switch:
    """Lets the last process come to rest before another one is measured.

    Some go on spinning for a while after their last answer (OpenMP workers of vLLM, for one) and
    would take the processor from whoever comes next.
    """

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._process: str | None = None

    async def to(self, column: Column) -> None:
        """Call before each burst: waits where its process is not the last one's, and at first."""
        if column.process != self._process:
            self._process = column.process
            await asyncio.sleep(self._pause_s)


def servers_of(scenario: str, columns: Sequence[Column]) -> list[Served]:
    """The columns, if all are servers. Raises BenchError."""
    for column in columns:
        if not isinstance(column, Served):
            raise BenchError(f"--scenario {scenario} measures servers, not {column.name}")
    return [column for column in columns if isinstance(column, Served)]


async def measure(
    columns: Sequence[Column],
    prompts: Prompts,
    effort: Effort,
    progress: Progress = lambda _: None,
) -> list[Burst]:
    """All bursts after the warm-up. Every chat of every column has a picture and a text of its
    own; the questions of a round are the same for all columns.
    """
    switch = Switch(effort.pause_s)
    bursts: list[Burst] = []
    numbers = itertools.count()
    for round_ in range(-effort.warmup, effort.rounds):
        for num_streams in effort.streams:
            for column in in_turn(columns, round_):
                progress(f"{column.name}, {num_streams} at once")
                chats = [
                    prompts.about_picture(next(numbers), round_ + stream, new_size=column.new_sizes)
                    for stream in range(num_streams)
                ]
                await switch.to(column)
                start = time.perf_counter()
                records = await column.answer(chats, effort.max_tokens)
                wall_s = time.perf_counter() - start
                if round_ >= 0:
                    bursts.append(Burst(column.name, num_streams, round_, wall_s, tuple(records)))
                await asyncio.sleep(BETWEEN_BURSTS_S)
    return bursts


def num_steps(columns: Sequence[Column], effort: Effort) -> int:
    """How often `measure` reports progress."""
    return effort.num_rounds * len(effort.streams) * len(columns)


def num_failed(bursts: Sequence[Burst]) -> int:
    """Of their chats."""
    return sum(bool(record.error) for burst in bursts for record in burst.records)
