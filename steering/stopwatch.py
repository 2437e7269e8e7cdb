"""How long parts of the work took: by the clock on a CPU, by the device's own events on CUDA.

A clock around work that a GPU is only told to do measures how long the telling took. Does not know
what is timed, nor for whom.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Reading(Protocol):
    """What a stopwatch has timed."""

    def seconds(self) -> float | None:
        """None as long as the device has not done it all; never waits for it."""
        ...


class Stopwatch(Protocol):
    """Adds up what lies between each `start` and the `stop` that follows it."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def take(self) -> Reading:
        """What was timed since the last call; what was begun and not stopped is forgotten."""
        ...


@dataclass(frozen=True)
class Seconds:
    """A reading that is known."""

    value: float = 0.0

    def seconds(self) -> float:
        return self.value


class ClockStopwatch:
    """For a device whose work is done when a call returns."""

    def __init__(self) -> None:
        self._started = 0.0
        self._total = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._total += time.perf_counter() - self._started

    def take(self) -> Reading:
        taken, self._total = Seconds(self._total), 0.0
        return taken


class EventStopwatch:
    """By pairs of events that the device stamps when it comes to them; no call here waits.

    What it reads includes the time in which the device, between two events, has to wait for its
    next work, so where the host is the slower of the two it is an upper bound. Has not run on a
    GPU: tests drive it with events of their own.
    """

    def __init__(self, new_event: Callable[[], Any], stream: Any = None) -> None:
        """new_event: makes a `torch.cuda.Event` with timing; recorded on `stream`, None for the
        current device's current one."""
        self._new_event = new_event
        self._stream = stream
        self._started: Any = None
        self._pairs: list[tuple[Any, Any]] = []

    def start(self) -> None:
        self._started = self._new_event()
        self._started.record(self._stream)

    def stop(self) -> None:
        stopped = self._new_event()
        stopped.record(self._stream)
        self._pairs.append((self._started, stopped))

    def take(self) -> Reading:
        taken, self._pairs = EventReading(self._pairs), []
        return taken


class EventReading:
    """Known once the device has come to the last event: a stream does its work in order."""

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        self._pairs = pairs

    def seconds(self) -> float | None:
        if self._pairs and not self._pairs[-1][1].query():
            return None
        milliseconds = sum(started.elapsed_time(stopped) for started, stopped in self._pairs)
        return float(milliseconds) / 1000


def stopwatch_of(device: torch.device) -> Stopwatch:
    """The one that tells the truth about a device's work."""
    if device.type != "cuda":
        return ClockStopwatch()
    return EventStopwatch(
        lambda: torch.cuda.Event(enable_timing=True), torch.cuda.current_stream(device)
    )
