"""One streaming chat, timed. Bytes are stamped as they arrive and parsed when all is over,
so that the client takes as little as it can of the machine that it measures.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from server.bench.target import Target

Arrival = tuple[float, bytes]


@dataclass(frozen=True)
class StreamRecord:
    """Seconds from sending the request, which was at `start_s` of the monotonic clock.

    `tokens` by the server's own usage when it sends one, else the number of content chunks
    (`counted_by`). `gaps_s`: between content chunks, which are those with text or a token's
    log-probability. `overhead_ms` and `shift_ms`: what the server says steering cost this chat,
    None where it says nothing. `revisions`: of the policy, each different one that a chunk names,
    in order; None among them for a chunk that names none.
    """

    start_s: float = 0.0
    time_to_first_token_s: float = 0.0
    e2e_s: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    counted_by: str = "chunks"
    gaps_s: tuple[float, ...] = ()
    text: str = ""
    steering: str = ""
    overhead_ms: float | None = None
    shift_ms: float | None = None
    revisions: tuple[int | None, ...] = ()
    error: str = ""

    @property
    def inter_token_latency_s(self) -> float:
        """Mean gap between tokens after the first, however the server packs them in chunks."""
        return sum(self.gaps_s) / (self.tokens - 1) if self.tokens > 1 else 0.0


async def chat(client: httpx.AsyncClient, target: Target, body: dict[str, Any]) -> StreamRecord:
    """Send one streaming chat and record it; a failure is a record with `error`."""
    arrivals: list[Arrival] = []
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json", **target.headers}
    start = time.perf_counter()
    try:
        async with client.stream(
            "POST", f"{target.url}/v1/chat/completions", content=content, headers=headers
        ) as response:
            async for part in response.aiter_raw():
                arrivals.append((time.perf_counter() - start, part))
    except httpx.HTTPError as error:
        return StreamRecord(start, error=f"{type(error).__name__}: {error}")
    if response.status_code != 200:
        message = b"".join(part for _, part in arrivals).decode(errors="replace")
        return StreamRecord(start, error=f"{response.status_code}: {message[:300]}")
    steering = response.headers.get("x-deshift-steering", "")
    return record(arrivals, start_s=start, steering=steering)


def record(
    arrivals: Sequence[Arrival], *, start_s: float = 0.0, steering: str = ""
) -> StreamRecord:
    """What a stream's stamped bytes say."""
    read = _Read()
    for moment, data in _events(arrivals):
        if data != "[DONE]":
            read.add(moment, json.loads(data))
    if not read.is_finished:
        read.fail("the stream broke off: a choice has no finish_reason")
    times, usage, applied = read.times, read.usage, read.applied
    if not times:
        read.fail("the stream held no text")
        return StreamRecord(start_s, steering=steering, error=read.error)
    return StreamRecord(
        start_s=start_s,
        time_to_first_token_s=times[0],
        e2e_s=arrivals[-1][0],
        tokens=usage.get("completion_tokens", len(times)),
        prompt_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        counted_by="usage" if "completion_tokens" in usage else "chunks",
        gaps_s=tuple(after - before for before, after in zip(times, times[1:], strict=False)),
        text="".join(read.texts),
        steering=steering,
        overhead_ms=applied.get("overhead_ms"),
        shift_ms=applied.get("shift_ms"),
        revisions=tuple(read.revisions),
        error=read.error,
    )


@dataclass
class _Read:
    """What the events so far have said; `times` and `texts` of the content chunks."""

    times: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    applied: dict[str, Any] = field(default_factory=dict)
    revisions: dict[int | None, None] = field(default_factory=dict)  # a set that keeps the order
    error: str = ""
    finished: dict[int, bool] = field(default_factory=dict)  # of each choice seen

    @property
    def is_finished(self) -> bool:
        return bool(self.finished) and all(self.finished.values())

    def add(self, moment: float, event: dict[str, Any]) -> None:
        self.usage = event.get("usage") or self.usage
        self.applied = event.get("steering") or self.applied
        self.revisions[event.get("steering_revision")] = None
        self.fail(str(event.get("error") or ""))
        choices = event.get("choices") or []
        for choice in choices:
            number = choice.get("index", 0)
            is_finished = bool(choice.get("finish_reason"))
            self.finished[number] = is_finished or self.finished.get(number, False)
        text = "".join((choice.get("delta") or {}).get("content") or "" for choice in choices)
        if text or any((choice.get("logprobs") or {}).get("content") for choice in choices):
            self.times.append(moment)
            self.texts.append(text)

    def fail(self, error: str) -> None:
        """The first error counts."""
        self.error = self.error or error


def _events(arrivals: Sequence[Arrival]) -> Iterator[tuple[float, str]]:
    """Each event's data with the moment its last byte came."""
    buffer = b""
    for moment, part in arrivals:
        buffer = (buffer + part).replace(b"\r\n", b"\n")
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            for line in event.decode().split("\n"):  # splitlines() takes U+2028 for a line's end
                if line.startswith("data:"):
                    yield moment, line[len("data:") :].strip()
