"""Time by the clock, and by a device's events: these are fakes, no GPU is needed."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from steering.stopwatch import ClockStopwatch, EventStopwatch, Seconds, stopwatch_of


@dataclass
class Device:
    """Comes to an event when told to, a millisecond after the one before it; notes every call."""

    calls: list[str] = field(default_factory=list)
    recorded: list["Event"] = field(default_factory=list)
    num_done: int = 0

    def new_event(self) -> "Event":
        return Event(self)


class Event:
    """What `torch.cuda.Event` offers; to wait for it is refused."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.number = -1

    def record(self, stream: object) -> None:
        assert stream == "the stream"
        self.number = len(self._device.recorded)
        self._device.recorded.append(self)
        self._device.calls.append(f"record {self.number}")

    def query(self) -> bool:
        self._device.calls.append(f"query {self.number}")
        return self.number < self._device.num_done

    def elapsed_time(self, end: "Event") -> float:
        assert end.number < self._device.num_done, "torch raises for what is not done"
        self._device.calls.append(f"elapsed {self.number} {end.number}")
        return float(end.number - self.number)

    def synchronize(self) -> None:
        raise AssertionError("nothing may wait for the device")


def timed(stopwatch: EventStopwatch, times: int) -> None:
    for _ in range(times):
        stopwatch.start()
        stopwatch.stop()


def test_the_clock_adds_up_what_lies_between_start_and_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([1.0, 1.5, 10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr("steering.stopwatch.time", SimpleNamespace(perf_counter=lambda: next(now)))
    stopwatch = ClockStopwatch()
    for _ in range(2):
        stopwatch.start()
        stopwatch.stop()
    assert stopwatch.take().seconds() == 2.5
    assert stopwatch.take().seconds() == 0.0
    stopwatch.start()
    stopwatch.stop()
    assert stopwatch.take().seconds() == 1.0


def test_events_are_read_once_the_device_has_come_to_the_last_and_nothing_waits() -> None:
    device = Device()
    stopwatch = EventStopwatch(device.new_event, "the stream")
    timed(stopwatch, times=2)
    reading = stopwatch.take()
    assert device.calls == ["record 0", "record 1", "record 2", "record 3"]
    assert reading.seconds() is None
    device.num_done = 3
    assert reading.seconds() is None
    device.num_done = 4
    device.calls.clear()
    assert reading.seconds() == pytest.approx(0.002)
    assert device.calls == ["query 3", "elapsed 0 1", "elapsed 2 3"]


def test_each_reading_holds_what_came_since_the_last() -> None:
    device = Device()
    stopwatch = EventStopwatch(device.new_event, "the stream")
    timed(stopwatch, times=3)
    first = stopwatch.take()
    timed(stopwatch, times=1)
    second = stopwatch.take()
    device.num_done = 6
    assert first.seconds() == pytest.approx(0.003) and second.seconds() is None
    device.num_done = 8
    assert second.seconds() == pytest.approx(0.001)


def test_where_nothing_was_timed_no_event_is_made_and_the_time_is_known() -> None:
    device = Device()
    assert EventStopwatch(device.new_event, "the stream").take().seconds() == 0.0
    assert device.calls == []
    assert Seconds().seconds() == 0.0


def test_what_was_begun_and_not_stopped_is_forgotten() -> None:
    device = Device()
    stopwatch = EventStopwatch(device.new_event, "the stream")
    stopwatch.start()
    stopwatch.take()
    timed(stopwatch, times=1)
    device.num_done = 3
    assert stopwatch.take().seconds() == pytest.approx(0.001)


def test_a_cpu_is_timed_by_the_clock() -> None:
    assert isinstance(stopwatch_of(torch.device("cpu")), ClockStopwatch)
