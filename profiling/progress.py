"""A progress line with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

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
