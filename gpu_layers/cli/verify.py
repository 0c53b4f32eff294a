"""``gpu-layers verify``: every kernel against the reference, on this machine."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from gpu_layers.runtime.cuda import require_gpu
from gpu_layers.verification import Backend, cuda_backend, emulated_backend
from gpu_layers.verification.report import table, verify


def add_command(commands: Any) -> None:
    """Add this command to the parser's."""
    parser = commands.add_parser(
        "verify",
        help="compare every kernel with the NumPy reference on this machine",
        description="Compares every kernel with the NumPy reference: on this machine's GPU, or, where there is none, "
        "by CPU emulation of the source. Exit status 1 if a result is wrong.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--backend", choices=("auto", "cuda", "emulated"), default="auto", help="default: auto")
    parser.add_argument("--only", metavar="REGEX", help="only the cases whose name this finds, e.g. 'dropout float16'")
    parser.add_argument(
        "--check",
        action="store_true",
        help="emulated: also watch every memory access for overruns, uninitialised reads and data races (slower)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify and print a table.

    Returns
    -------
    int
        0 if every result is right, else 1.
    """
    backend, where = _backend(arguments)
    print(f"Every kernel against the NumPy reference, on {where}.")
    rows = verify(backend, arguments.only, _show_progress if sys.stderr.isatty() else lambda done, total: None)
    print(table(rows))
    failures = [message for row in rows for message in row.failures]
    for message in failures:
        print(f"WRONG {message}")
    cases = sum(row.cases for row in rows)
    print(f"{cases} cases, {len(failures)} wrong results." if failures else f"{cases} cases, all right.")
    return 1 if failures else 0


def _backend(arguments: argparse.Namespace) -> tuple[Backend, str]:
    if arguments.backend != "emulated":
        try:
            cupy = require_gpu()
        except RuntimeError as error:
            if arguments.backend == "cuda":
                raise
            print(f"No GPU here ({error}).")
        else:
            if arguments.check:
                raise ValueError("--check is for the emulated backend: add --backend emulated")
            name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
            return cuda_backend(), name
    return emulated_backend(check=arguments.check), "the CPU: CPU emulation of the source, not a GPU"


def _show_progress(done: int, total: int) -> None:
    end = "\r" if done < total else "\r" + " " * 20 + "\r"
    print(f"{done} of {total} cases", end=end, file=sys.stderr, flush=True)
