"""Running the command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


def gpu_layers(*arguments: object, before: str = "", **options) -> subprocess.CompletedProcess:
    """Run the command; ``before`` is Python that runs first, in the same process."""
    program = f"import sys\n{before}\nfrom gpu_layers.cli import main\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(),
        **options,
    )


def assert_one_line_error(finished: subprocess.CompletedProcess, *parts: str, status: int = 2) -> None:
    """The exit status, and one line on standard error with all these parts; no traceback."""
    assert finished.returncode == status, finished.stderr
    lines = finished.stderr.splitlines()
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith("gpu-layers: ")
    for part in parts:
        assert part in lines[0]
