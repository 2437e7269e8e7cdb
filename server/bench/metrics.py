"""Scenario `metrics`: what is exported of steering's cost, beside the difference clients measure.

Around each burst the sum of the exported overhead is read; what it rose by is held against the same
round's burst without steering. Does not cover what else is exported.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.markup import escape
from rich.table import Table

from server.bench import exposition, load, tables
from server.bench.effort import Effort, Outcome, Progress
from server.bench.load import Burst, Column, Served, servers_of
from server.bench.prompts import Message, Prompts
from server.bench.stream import StreamRecord
from server.bench.summary import Comparison, Spread, cells, comparisons
from server.bench.target import BenchError

OVERHEAD = "deshift_steering_overhead_seconds"


@dataclass(frozen=True)
class Exported:
    """Of the server since it started: seconds of overhead, and over how many requests."""

    seconds: float
    num: float

    def per_request_since(self, before: "Exported") -> float:
        """0.0 where no request was steered."""
        num = self.num - before.num
        return (self.seconds - before.seconds) / num if num else 0.0


@dataclass(frozen=True)
class Account:
    """One steered condition at one number of streams, by request.

    exported_s: of each burst; told_ms: of each answer. more: what the client measured beyond the
    baseline. agrees: whether the exported median lies within the interval of that.
    """

    target: str
    num_streams: int
    exported_s: Spread
    told_ms: Spread | None
    more: Comparison

    @property
    def agrees(self) -> bool:
        more = self.more.e2e_more_s
        return more is not None and more.low <= self.exported_s.median <= more.high


class Scraped:
    """A column whose server is scraped before and after each burst."""

    def __init__(self, served: Served) -> None:
        if not served.target.admin_url:
            raise BenchError(
                f"--scenario metrics reads /metrics of servers that it starts itself, and "
                f"{served.name} is a URL: use --serve, --demo or --shape"
            )
        self._served = served
        self.exported: list[tuple[int, float]] = []  # streams and seconds a request, by burst

    @property
    def name(self) -> str:
        return self._served.name

    @property
    def new_sizes(self) -> bool:
        return self._served.new_sizes

    @property
    def process(self) -> str:
        return self._served.process

    async def answer(
        self, chats: Sequence[Sequence[Message]], max_tokens: int
    ) -> list[StreamRecord]:
        before = await self._read()
        records = await self._served.answer(chats, max_tokens)
        after = await self._read()
        self.exported.append((len(chats), after.per_request_since(before)))
        return records

    async def _read(self) -> Exported:
        return exported(await exposition.read(self._served))


async def run(
    columns: Sequence[Column], prompts: Prompts, effort: Effort, progress: Progress
) -> Outcome:
    scraped = [Scraped(each) for each in servers_of("metrics", columns)]
    bursts = await load.measure(scraped, prompts, effort, progress)
    num_warmups = effort.warmup * len(effort.streams)
    rows = accounts(scraped, bursts, effort.baseline, num_warmups)
    figures = {"metrics": [asdict(row) | {"agrees": row.agrees} for row in rows]}
    return Outcome([table_of(rows, effort.baseline)], figures, load.num_failed(bursts))


def exported(text: str) -> Exported:
    """Of all tenants and modes together, from Prometheus' text format."""
    seconds, num = (exposition.total(text, f"{OVERHEAD}_{part}") for part in ("sum", "count"))
    return Exported(seconds or 0.0, num or 0.0)  # no series before the first steered request


def accounts(
    columns: Sequence[Scraped], bursts: Sequence[Burst], baseline: str, num_warmups: int
) -> list[Account]:
    """Every condition but the baseline. num_warmups: bursts of each column that do not count."""
    of_column = {column.name: column.exported[num_warmups:] for column in columns}
    told = {(cell.target, cell.num_streams): cell.overhead_ms for cell in cells(bursts)}
    result = []
    for more in comparisons(bursts, baseline):
        values = [s for num, s in of_column[more.target] if num == more.num_streams]
        found = Spread.of(values)
        if found is None:
            continue
        answers = told[more.target, more.num_streams]
        result.append(Account(more.target, more.num_streams, found, answers, more))
    return result


def table_of(rows: Sequence[Account], baseline: str) -> Table:
    table = tables.table(
        "What steering costs a chat, ms: as /metrics exports it and answers say it, median "
        f"(interquartile range);\nthe difference to {baseline} within rounds, median (95 % "
        "interval); and whether the exported median lies in that of the whole chat",
        ("streams", "server", "exported", "answers", "TTFT more", "whole more", "within"),
    )
    for row in rows:
        table.add_row(
            str(row.num_streams),
            escape(row.target),
            tables.spread(row.exported_s, 1000, "{:.2f}"),
            tables.spread(row.told_ms, 1, "{:.2f}"),
            tables.interval(row.more.time_to_first_token_more_s, 1000, "{:+.1f}"),
            tables.interval(row.more.e2e_more_s, 1000, "{:+.1f}"),
            "yes" if row.agrees else "no",
        )
    return table
