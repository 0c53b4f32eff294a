"""Progress: of a training run, a bar on a terminal and plain lines elsewhere; of other work, how much is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gpu_layers.core.array import Facts
from gpu_layers.training.extras import import_extra
from gpu_layers.training.trainer import Progress

_SECONDS_A_LINE = 10


class Count:
    """How much is done: on a terminal in one place, else a line now and then, known even if the process is ended.

    Parameters
    ----------
    what : str
        What is counted.
    """

    def __init__(self, what: str) -> None:
        self._what, self._last, self._in_place = what, time.monotonic(), sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        """Show it, on the standard error."""
        now, text = time.monotonic(), f"{done} of {total} {self._what}"
        if self._in_place:
            print(text, end="\r" if done < total else f"\r{'':{len(text)}}\r", file=sys.stderr, flush=True)
        elif now - self._last >= _SECONDS_A_LINE:
            self._last = now
            print(text, file=sys.stderr, flush=True)


class PlainProgress:
    """One line for each epoch."""

    def begin_epoch(self, epoch: int) -> Callable[[Progress], None]:
        """A function to call after each batch of an epoch."""
        return lambda progress: None

    def line(self, text: str) -> None:
        """Print a line at once, so that it is in a log file even if the process is killed."""
        print(text, flush=True)


class BarProgress:
    """A bar for the running epoch, below one line for each finished epoch.

    Parameters
    ----------
    bar : rich.progress.Progress
    images : int
        In an epoch.
    """

    def __init__(self, bar: Any, images: int) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=images, numbers="")

    def begin_epoch(self, epoch: int) -> Callable[[Progress], None]:
        """A function to call after each batch of an epoch."""
        self._bar.reset(self._task, description=f"epoch {epoch}", numbers="")

        def report(progress: Progress) -> None:
            numbers = (
                f"loss {progress.loss:.4f}  accuracy {100 * progress.accuracy:.2f} %  "
                f"{progress.images_per_second:,.0f} images/s"
            )
            self._bar.update(self._task, completed=progress.images, numbers=numbers)

        return report

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_display(images: int) -> Iterator[PlainProgress | BarProgress]:
    """The display for the standard output.

    Parameters
    ----------
    images : int
        In an epoch.
    """
    if not sys.stdout.isatty():
        yield PlainProgress()
        return
    rich = import_extra("rich.progress")
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[numbers]}"),
    )
    with rich.Progress(*columns, transient=True) as bar:
        yield BarProgress(bar, images)


def epoch_line(entry: Facts, epochs: int) -> str:
    """One entry of a run's history as text."""
    return (
        f"epoch {entry['epoch']:>{len(str(epochs))}}/{epochs}"
        f"  loss {entry['train_loss']:.4f}  accuracy {100 * entry['train_accuracy']:6.2f} %"
        f"  test loss {entry['test_loss']:.4f}  test accuracy {100 * entry['test_accuracy']:6.2f} %"
        f"  {entry['images_per_second']:,.0f} images/s"
    )
