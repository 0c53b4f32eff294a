"""Running studies: part after part in this process, or side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from gpu_layers.study.claims import Report, Study, judge
from gpu_layers.study.lab import Lab
from gpu_layers.study.snippets import run_snippet
from gpu_layers.training.extras import import_extra

#: The part that every study has: the claims' code.
_CODE = "code"
_Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class _Done:
    """What a part returned, and how long that took."""

    value: Any
    seconds: float


class PartError(RuntimeError):
    """A part ended without a result: its process was killed, or it raised. The message says which and why."""


def run_studies(
    studies: Sequence[Study], lab: Lab, *, jobs: int = 1, progress: _Progress = lambda study, done: None
) -> Iterator[Report]:
    """Run studies.

    Parameters
    ----------
    studies : sequence of Study
    lab : Lab
        Its own progress is not called.
    jobs : int
        Parts to run at a time, each in a process of its own; 1 runs them in this one.
    progress : callable
        Takes the name of a study and the done part of it, from 0 to 1.

    Yields
    ------
    Report
        In the order in which studies end.

    Raises
    ------
    PartError
        If a process ended without a result.
    """
    tracker = _Tracker(studies, progress)
    tasks = [(study, part) for study in studies for part in (*study.parts, _CODE)]
    run = _one_by_one if jobs == 1 else _side_by_side
    for study, part, done in run(tasks, lab, jobs, tracker.moved):
        parts = tracker.finish(study, part, done)
        if parts is not None:
            values = {name: one.value for name, one in parts.items()}
            seconds = sum(one.seconds for one in parts.values())
            yield judge(study, study.conclude(values), values[_CODE], seconds)


class _Tracker:
    """Which parts are done, and how far the others are."""

    def __init__(self, studies: Sequence[Study], progress: _Progress) -> None:
        self._done: dict[str, dict[str, _Done]] = {study.name: {} for study in studies}
        self._fractions: dict[str, dict[str, float]] = {
            study.name: dict.fromkeys((*study.parts, _CODE), 0.0) for study in studies
        }
        self._progress = progress

    def moved(self, study: Study, part: str, fraction: float) -> None:
        fractions = self._fractions[study.name]
        fractions[part] = fraction
        self._progress(study.name, sum(fractions.values()) / len(fractions))

    def finish(self, study: Study, part: str, done: _Done) -> Mapping[str, _Done] | None:
        """All parts of the study, if this was its last."""
        self._done[study.name][part] = done
        self.moved(study, part, 1.0)
        complete = len(self._done[study.name]) == len(self._fractions[study.name])
        return self._done[study.name] if complete else None


def _measure(study: Study, part: str, lab: Lab) -> _Done:
    began = time.perf_counter()
    # One BLAS thread: how sums are divided among threads would decide the last bits.
    with import_extra("threadpoolctl", extra="study").threadpool_limits(1, user_api="blas"):
        if part == _CODE:
            value: Any = {claim.name: run_snippet(claim.code) for claim in study.claims}
        else:
            value = study.parts[part](lab)
    return _Done(value, time.perf_counter() - began)


_Task = tuple[Study, str]
_Moved = Callable[[Study, str, float], None]


def _one_by_one(tasks: Sequence[_Task], lab: Lab, jobs: int, moved: _Moved) -> Iterator[tuple[Study, str, _Done]]:
    for study, part in tasks:

        def report(fraction: float, study: Study = study, part: str = part) -> None:
            moved(study, part, fraction)

        yield study, part, _measure(study, part, replace(lab, progress=report))


def _side_by_side(tasks: Sequence[_Task], lab: Lab, jobs: int, moved: _Moved) -> Iterator[tuple[Study, str, _Done]]:
    waiting = list(tasks)
    running: dict[Connection, tuple[Any, Study, str]] = {}
    # A clean start: a fork would inherit the threads' locks of a BLAS, and a GPU's context.
    context = multiprocessing.get_context("spawn")
    bare = replace(lab, progress=Lab.progress)
    with _ended_at_last(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                study, part = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_in_a_process, args=(study.name, part, bare, theirs), daemon=True)
                with _interrupts_waiting():
                    process.start()
                theirs.close()
                running[ours] = (process, study, part)
            for connection in cast("list[Connection]", wait(list(running))):
                process, study, part = running[connection]
                try:
                    kind, content = connection.recv()
                except EOFError:
                    process.join()
                    raise PartError(
                        f"the process of study {study.name}, part {part!r}, ended with status {process.exitcode}"
                    ) from None
                if kind == "progress":
                    moved(study, part, content)
                    continue
                process.join()
                del running[connection]
                connection.close()
                if kind == "error":
                    raise PartError(f"study {study.name}, part {part!r}: {content}")
                yield study, part, content


@contextmanager
def _interrupts_waiting() -> Iterator[None]:
    """Processes that start here never see an interrupt, which goes to all of a terminal: this one sees it, later."""
    # It unblocks interrupts when it starts: let that be before.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def _ended_at_last(running: Mapping[Any, tuple[Any, Study, str]]) -> Iterator[None]:
    """However the block ends, an interrupt included, no process outlives it."""
    try:
        yield
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for connection, (process, _, _) in running.items():
            process.join()
            connection.close()


def _in_a_process(name: str, part: str, lab: Lab, connection: Connection) -> None:
    from gpu_layers.study import STUDIES  # its modules import this one

    try:
        report = replace(lab, progress=lambda done: connection.send(("progress", done)))
        connection.send(("result", _measure(STUDIES[name], part, report)))
    except BrokenPipeError:
        pass  # the parent is gone
    except (OSError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        connection.send(("error", str(error) or type(error).__name__))
    except BaseException:
        connection.send(("error", traceback.format_exc().strip()))
