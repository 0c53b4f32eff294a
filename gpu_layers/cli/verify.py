"""``gpu-layers verify``: every kernel against the reference, on this machine."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from gpu_layers.cli.arguments import Commands
from gpu_layers.cli.progress import Count
from gpu_layers.core.cuda import require_gpu
from gpu_layers.emulator import sanitizer_environment
from gpu_layers.verification import Backend, cuda_backend, emulated_backend
from gpu_layers.verification.report import DeviceLostError, table, verify
from gpu_layers.verification.traffic import count_all, traffic_table


def add_command(commands: Commands) -> None:
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
    parser.add_argument(
        "--traffic",
        action="store_true",
        help="count the bytes that the kernels move, emulated, against the fewest possible, instead of their results",
    )
    parser.add_argument(
        "--sanitizer",
        choices=("asan", "ubsan"),
        help="emulated: run under AddressSanitizer or UndefinedBehaviorSanitizer, in a process of their own",
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify and print a table.

    Returns
    -------
    int
        0 if every result is right, else 1.
    """
    if arguments.traffic:
        return _count_traffic(arguments)
    if arguments.sanitizer and os.environ.get("GPU_LAYERS_SANITIZER") != arguments.sanitizer:
        return _verify_in_sanitized_process(arguments)
    backend, where = _backend(arguments)
    print(f"Every kernel against the NumPy reference, on {where}.")
    lost = None
    try:
        # Said at once, so that it is known even if the process is ended.
        rows = verify(backend, arguments.only, Count("cases"), lambda message: print(f"WRONG {message}", flush=True))
    except DeviceLostError as error:
        rows, lost = error.rows, error
    print(table(rows))
    failures = [message for row in rows for message in row.failures]
    cases = sum(row.cases for row in rows)
    if lost is not None:
        print(f"{cases} cases, {len(failures)} wrong results. STOPPED: {lost}.")
        return 1
    print(f"{cases} cases, {len(failures)} wrong results." if failures else f"{cases} cases, all right.")
    return 1 if failures else 0


def _count_traffic(arguments: argparse.Namespace) -> int:
    if arguments.backend == "cuda" or arguments.check or arguments.sanitizer:
        raise ValueError("--traffic is counted by the emulator in its own way: use it with --only at most")
    print("Bytes that each pass moves, counted by CPU emulation of the source over whole launches.")
    rows = count_all(arguments.only, Count("cases"))
    print(traffic_table(rows))
    return 0 if all(row.is_good for row in rows) else 1


def _backend(arguments: argparse.Namespace) -> tuple[Backend, str]:
    if arguments.backend != "emulated":
        try:
            cupy = require_gpu()
        except RuntimeError as error:
            if arguments.backend == "cuda":
                raise
            print(f"No GPU here ({' '.join(str(error).split())}).")
        else:
            if arguments.check or arguments.sanitizer:
                raise ValueError("--check and --sanitizer are for the emulated backend: add --backend emulated")
            name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
            return cuda_backend(), name
    backend = emulated_backend(check=arguments.check, sanitizer=arguments.sanitizer)
    under = f" under {arguments.sanitizer}" if arguments.sanitizer else ""
    return backend, f"the CPU{under}: CPU emulation of the source, not a GPU"


def _verify_in_sanitized_process(arguments: argparse.Namespace) -> int:
    """A sanitizer must be in a process from its start. It ends the process at the first error that it finds."""
    command = [sys.executable, "-m", "gpu_layers", "verify", "--backend", "emulated"]
    command += ["--sanitizer", arguments.sanitizer, *(["--only", arguments.only] if arguments.only else [])]
    status = subprocess.run(command, env=sanitizer_environment(arguments.sanitizer), check=False).returncode
    if status not in (0, 2):
        print(f"{arguments.sanitizer} ended the process with status {status}", file=sys.stderr)
        return 1
    return status
