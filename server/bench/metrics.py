"""What the server exports of steering's cost, beside the difference that its clients measure.

Around each burst the sum of the exported overhead is read; what it rose by is held against the same
round's burst without steering. Does not cover what else is exported.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from server.bench.load import Burst, Served
from server.bench.prompts import Message
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
        url = f"{self._served.target.admin_url}/metrics"
        try:
            response = await self._served.client.get(url)
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise BenchError(f"{url}: {error!r}") from error
        return exported(response.text)


def exported(text: str) -> Exported:
    """Of all tenants and modes together, from Prometheus' text format."""

    def total(name: str) -> float:
        lines = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    return Exported(total(f"{OVERHEAD}_sum"), total(f"{OVERHEAD}_count"))


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
