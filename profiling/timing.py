"""Timing calls on a device that works while the host goes on.

A sample is some calls in a row between two events. Before the first event the device is kept busy, long enough that
the host has issued every call by the time the device gets to it: what the events see is the device alone. Whether that
worked is checked, not assumed: if the first event has passed when the last call has been issued, the sample is thrown
away and the device is kept busy for longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

import numpy as np


class Timer(Protocol):
    """A device's time line."""

    def stall(self, seconds: float) -> None:
        """Keep the device busy for about this long, beginning when it gets there."""

    def mark(self) -> Any:
        """An event: the moment at which the device gets here."""

    def passed(self, event: Any) -> bool:
        """Whether the device has got to an event."""

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds between two events, after waiting for both."""

    def synchronize(self) -> None:
        """Wait until the device has done everything."""

    def now(self) -> float:
        """The host's clock, in seconds."""


class HostTimer:
    """The time line of a device that works while the host waits: an emulated one."""

    def stall(self, seconds: float) -> None:
        """Nothing: there is no one to keep busy."""

    def mark(self) -> float:
        """The time."""
        return time.perf_counter()

    def passed(self, event: float) -> bool:
        """False: no event lies in the past of work that is still to come."""
        return False

    def elapsed(self, start: float, end: float) -> float:
        """Seconds between two events."""
        return end - start

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def now(self) -> float:
        """The host's clock, in seconds."""
        return time.perf_counter()


_LONGEST_STALL = 0.2
_TRIES = 4
_LEAST_SAMPLES = 3


class Subject:
    """What is timed.

    Parameters
    ----------
    name : str
    call : callable
        Runs on the buffers of the given number, and returns what it makes.
    wait : callable, optional
        For what runs on a time line of its own, where the device's events do not see it: waits for a result of
        ``call``. Such a subject is timed by the host's clock.
    """

    def __init__(self, name: str, call: Callable[[int], Any], wait: Callable[[Any], None] | None = None) -> None:
        self.name = name
        self._call, self._wait = call, wait
        self._results: dict[int, Any] = {}
        self._next = 0
        self._stall = 0.0
        self._steady = True
        self._seconds: list[float] = []

    def warm_up(self, timer: Timer, buffers: int, calls: int) -> None:
        """Run on every buffer, and find out for how long the device must be kept busy."""
        self._issue(max(buffers, calls), buffers)
        self._wait_for_all()
        timer.synchronize()
        begin = timer.now()
        self._issue(calls, buffers)
        self._stall = min(2 * (timer.now() - begin) + 100e-6, _LONGEST_STALL)
        self._wait_for_all()
        timer.synchronize()

    def sample(self, timer: Timer, buffers: int, calls: int) -> None:
        """Take one sample."""
        self._seconds.append((self._by_host if self._wait else self._by_events)(timer, buffers, calls) / calls)

    def timing(self) -> Timing:
        """What the samples say of one call; lets go of results."""
        self._results.clear()
        return summarize(self._seconds, "host" if self._wait else "events", self._steady)

    def _issue(self, calls: int, buffers: int) -> None:
        # Results stay alive until their buffers' next turn, so that they lie at other addresses each time too.
        for _ in range(calls):
            self._results[self._next] = self._call(self._next)
            self._next = (self._next + 1) % buffers

    def _wait_for_all(self) -> None:
        if self._wait is not None:
            for result in self._results.values():
                self._wait(result)

    def _by_host(self, timer: Timer, buffers: int, calls: int) -> float:
        begin = timer.now()
        self._issue(calls, buffers)
        self._wait_for_all()
        return timer.now() - begin

    def _by_events(self, timer: Timer, buffers: int, calls: int) -> float:
        for _ in range(_TRIES):
            timer.stall(self._stall)
            start = timer.mark()
            self._issue(calls, buffers)
            end = timer.mark()
            ahead = not timer.passed(start)
            seconds = timer.elapsed(start, end)
            if ahead or not self._steady:
                return seconds
            self._stall = min(2 * self._stall, _LONGEST_STALL)
        self._steady = False
        return seconds


def measure(
    subjects: list[Subject], timer: Timer, *, buffers: int, calls: int, samples: int, seconds: float
) -> dict[str, Timing]:
    """Time subjects in turn, so that a device that slows down or speeds up does so for all.

    Parameters
    ----------
    subjects : list of Subject
    timer : Timer
    buffers : int
        Number of buffers that calls rotate through.
    calls : int
        A sample.
    samples : int
        A subject, at most.
    seconds : float
        Stop when this long has gone into all samples together; every subject has at least three then.

    Returns
    -------
    dict of str to Timing
        Of one call.
    """
    for subject in subjects:
        subject.warm_up(timer, buffers, calls)
    begin = timer.now()
    for done in range(samples):
        if done >= _LEAST_SAMPLES and timer.now() - begin > seconds:
            break
        for subject in subjects:
            subject.sample(timer, buffers, calls)
    return {subject.name: subject.timing() for subject in subjects}


# ---- How far a run is ------------------------------------------------------------------------------------------------


_WIDTH = 24


class Progress:
    """One line that is written over; on a file or a pipe a line now and then.

    Parameters
    ----------
    total : int
    stream : file
    clock : callable
        Seconds.
    """

    def __init__(self, total: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._stream, self._clock = total, stream, clock
        self._begin = clock()
        self._last = -1e9
        self._longest = 0

    def show(self, done: int, what: str) -> None:
        """Say that so many are done, and what is next."""
        now = self._clock()
        line = f"{self._bar(done)} {done}/{self._total} {self._left(done, now)}  {what}"
        if self._stream.isatty():
            self._longest = max(self._longest, len(line))
            self._stream.write(f"\r{line:<{self._longest}}")
        elif now - self._last >= 10:
            self._last = now
            self._stream.write(f"{line}\n")
        self._stream.flush()

    def end(self) -> None:
        """Remove the line."""
        if self._stream.isatty():
            self._stream.write(f"\r{'':<{self._longest}}\r")
            self._stream.flush()

    def _bar(self, done: int) -> str:
        full = _WIDTH * done // max(self._total, 1)
        return f"[{'=' * full}{' ' * (_WIDTH - full)}]"

    def _left(self, done: int, now: float) -> str:
        if not done:
            return "  ?:?? left"
        seconds = round((now - self._begin) / done * (self._total - done))
        return f"{seconds // 60:>3}:{seconds % 60:02} left"


# ---- Samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Repeated timings of one call, in microseconds.

    Attributes
    ----------
    median, low, high : float
        Half of the samples are below the median, a tenth below ``low``, a tenth above ``high``.
    samples : int
    clock : {"events", "host"}
        Events on the device's own time line, or the host's clock around synchronised calls.
    steady : bool
        Whether the host was ahead of the device in every sample, so that no waiting for the host is in the numbers.
    """

    median: float
    low: float
    high: float
    samples: int
    clock: str = "events"
    steady: bool = True

    @property
    def spread(self) -> float:
        """Distance from ``low`` to ``high``, as a part of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def summarize(seconds: Sequence[float], clock: str = "events", steady: bool = True) -> Timing:
    """Middle and spread of samples in seconds.

    Raises
    ------
    ValueError
        If there are none.
    """
    if not seconds:
        raise ValueError("no samples")
    median, low, high = map(float, 1e6 * np.quantile(seconds, (0.5, 0.1, 0.9)))
    return Timing(median, low, high, len(seconds), clock, steady)


def verdict(old: Timing, new: Timing, at_least: float = 0.03) -> str:
    """``"faster"``, ``"slower"`` or ``"same"``: beyond the spread of both, and by 3 % or more.

    Two runs of one version differ by a few percent whatever their samples say (clocks, other memory addresses).
    """
    if abs(new.median - old.median) < at_least * old.median:
        return "same"
    if new.high < old.low:
        return "faster"
    return "slower" if new.low > old.high else "same"
