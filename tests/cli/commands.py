"""Running the command in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **changes}


def _program(before: str) -> list[str]:
    return [sys.executable, "-c", f"import sys\n{before}\nfrom gpu_layers.cli import command\ncommand()"]


def gpu_layers(*arguments: object, before: str = "", **options) -> subprocess.CompletedProcess:
    """Run the command; ``before`` is Python that runs first, in the same process."""
    return subprocess.run(
        [*_program(before), *map(os.fsdecode, map(_word, arguments))],
        **{"capture_output": True, "text": True, "timeout": 120, "check": False, "env": environment(), **options},
    )


@contextmanager
def started(*arguments: object, before: str | None = None, **options) -> Iterator[subprocess.Popen]:
    """The command while it runs; however the block ends, it does not outlive it.

    Interrupts reach it whether or not they reach this process: a shell's background jobs, and what they start, ignore
    them, and Python leaves that as it finds it.
    """
    command = [sys.executable, "-m", "gpu_layers"] if before is None else _program(before)
    process = subprocess.Popen(
        [*command, *map(os.fsdecode, map(_word, arguments))],
        **{
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "env": environment(),
            "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **options,
        },
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


def without(package: str) -> str:
    """What runs first where a package is not installed."""
    return f"""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "{package}" else find(name, *rest)
"""


def interrupt(process: subprocess.Popen, *, group: bool = False) -> bytes:
    """Interrupt the process until it ends; what it then said on standard error."""
    # Python loses an interrupt that falls into a callback of the garbage collector: as a person would, press again.
    for _ in range(5):
        if group:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=20)[1]
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("it does not end")


def _word(argument: object) -> str | bytes:
    return argument if isinstance(argument, bytes) else str(argument)


def assert_one_line_error(finished: subprocess.CompletedProcess, *parts: str, status: int = 2) -> None:
    """The exit status, and one line on standard error with all these parts; no traceback."""
    assert finished.returncode == status, finished.stderr
    lines = finished.stderr.splitlines()
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith("gpu-layers: ")
    for part in parts:
        assert part in lines[0]
