"""The server's own account, from /metrics of its admin listener, beside the requests sent."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from server.verify.check import FailedError, Finding, SkippedError, VerifyError
from server.verify.client import Asker

_SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
SUCCESSES = {"name": "deshift_requests_total", "outcome": "success"}


@dataclass(frozen=True)
class Counters:
    """Every sample of one scrape: its labels, the name among them, and its value."""

    samples: tuple[tuple[Mapping[str, str], float], ...]

    @classmethod
    def parse(cls, text: str) -> "Counters":
        """Of Prometheus' text format; other lines are passed over."""
        found = []
        for line in text.splitlines():
            match = None if line.startswith("#") else _SAMPLE.match(line)
            if match:
                labels = dict(_LABEL.findall(match["labels"] or ""))
                found.append(({"name": match["name"]} | labels, float(match["value"])))
        return cls(tuple(found))

    def total(self, **wanted: str) -> float | None:
        """The sum over the samples with these labels; None where there are none."""
        values = [value for labels, value in self.samples if wanted.items() <= labels.items()]
        return sum(values) if values else None

    def label(self, name: str, label: str) -> str | None:
        """What the first sample of that name has under a label."""
        found = (labels.get(label) for labels, _ in self.samples if labels["name"] == name)
        return next(found, None)


async def scrape(client: httpx.AsyncClient) -> Counters:
    """Raises VerifyError."""
    try:
        response = await client.get("/metrics", headers={"accept": "text/plain"})
    except httpx.RequestError as error:
        problem = str(error) or type(error).__name__
        raise VerifyError(f"no admin listener answers at {client.base_url}: {problem}") from None
    counters = Counters.parse(response.text) if response.status_code == 200 else Counters(())
    if counters.label("deshift_engine_up", "model_name") is None:
        raise VerifyError(f"{client.base_url}/metrics has no series of Deshift: is it --admin-url?")
    return counters


def counted(before: Counters, after: Counters, asker: Asker, *, is_alone: bool) -> Finding:
    """The counters moved by what was sent. is_alone: nobody else asks this server.

    Raises FailedError, SkippedError.
    """
    hooks = after.total(name="deshift_engine_failures_total", kind="hooks")
    canary = after.total(name="deshift_canary_passed")
    modes = ("off", "dataset", "sample")
    moved = {
        mode: int(after.total(**SUCCESSES, mode=mode) or 0)
        - int(before.total(**SUCCESSES, mode=mode) or 0)
        for mode in modes
    }
    sent = {mode: asker.answered[mode] for mode in modes}
    figures = {"sent": sent, "counted": moved, "hook_failures": hooks, "canary_passed": canary}
    if hooks != 0:
        raise FailedError(f"steering missed its turn {hooks} times", **figures)
    if canary != 1:
        raise FailedError("the canary at start has not passed", **figures)
    if missing := [mode for mode in modes if moved[mode] < sent[mode]]:
        mode = missing[0]
        raise FailedError(
            f"{sent[mode]} answers said mode {mode}, counted are {moved[mode]}", **figures
        )
    if moved != sent:
        more = sum(moved.values()) - sum(sent.values())
        if is_alone:
            raise FailedError(f"{more} requests more are counted than were sent", **figures)
        raise SkippedError(
            f"{more} requests more are counted than were sent: others ask this server too; canary "
            "and hooks are well",
            **figures,
        )
    return f"{sum(sent.values())} answers counted by mode, canary passed, no hook missed", figures
