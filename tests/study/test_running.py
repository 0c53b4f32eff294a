"""Studies side by side: the same results, and no process left behind."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from multiprocessing import Pipe

import pytest

from gpu_layers.study import STUDIES, Lab, run_studies
from gpu_layers.study.running import PartError, _in_a_process
from tests.cli.commands import interrupt, started


def test_side_by_side_gives_the_same():
    studies, moved = [STUDIES["pooling"]], []
    (one,) = run_studies(studies, Lab(quick=True))
    (other,) = run_studies(studies, Lab(quick=True), jobs=2, progress=lambda name, done: moved.append((name, done)))
    assert one.findings == other.findings
    assert [outcome.printed for outcome in one.outcomes] == [outcome.printed for outcome in other.outcomes]
    assert moved[-1] == ("pooling", 1.0)
    assert multiprocessing.active_children() == []


def test_a_killed_process_is_an_error():
    def kill(*_):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(PartError, match=r"the process of study scaling, part '[a-z ]+', ended with status -9"):
        list(run_studies([STUDIES["scaling"]], Lab(quick=True), jobs=2, progress=kill))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("error", "starts", "ends"),
    [
        (ArithmeticError("lost count"), "lost count", "lost count"),
        (KeyError("a bug"), "Traceback (most recent call last)", "KeyError: 'a bug'"),
    ],
)
def test_what_a_part_raises_is_told(monkeypatch, error, starts, ends):
    def fails(lab):
        raise error

    monkeypatch.setitem(STUDIES, "pooling", replace(STUDIES["pooling"], parts={"all": fails}))
    ours, theirs = Pipe(duplex=False)
    _in_a_process("pooling", "all", Lab(), theirs)
    kind, message = ours.recv()
    assert kind == "error"
    assert message.startswith(starts)
    assert message.endswith(ends)


def gone(group):
    """Whether every process of the group has ended, or soon does."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("seconds", [0.2, 3])
def test_interrupt(seconds):
    """An interrupt reaches every process of a terminal; one line, status 130, nobody left."""
    with started("study", "scaling", "--jobs", 2, start_new_session=True) as process:
        process.stdout.readline()
        time.sleep(seconds)
        assert interrupt(process, group=True) == b"gpu-layers: interrupted\n"
        assert process.returncode == 130
        assert gone(process.pid)
