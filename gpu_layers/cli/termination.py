"""SIGTERM, by which a scheduler, a container or an administrator asks a run to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(Exception):  # noqa: N818 (not an error)
    """The run ended early on request; the message says what it wrote."""


@contextmanager
def termination_requests() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM is only noted; a second one ends the process at once.

    Yields
    ------
    callable
        Whether SIGTERM has come.
    """
    came: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def deaf_to_termination() -> Iterator[None]:
    """Within the block SIGTERM is ignored: another process of the run handles it for all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
