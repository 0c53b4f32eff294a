"""``gpu-layers compile``: the kernels compiled ahead of their first launch, with no GPU needed."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import numpy as np

import gpu_layers.kernels  # noqa: F401 - declares the kernels
from gpu_layers.cli.arguments import Commands, integer
from gpu_layers.cli.progress import Count
from gpu_layers.core.cache import cache_folder
from gpu_layers.core.cuda import require_gpu
from gpu_layers.runtime.kernel import FLOAT_DTYPES, Kernel, all_kernels
from gpu_layers.runtime.nvrtc import Architecture, architecture_for, cached_module, compiled_module
from gpu_layers.verification.selection import named_like

_DTYPES = {str(dtype): dtype for dtype in FLOAT_DTYPES}


def add_command(commands: Commands) -> None:
    """Add this command to the parser's."""
    parser = commands.add_parser(
        "compile",
        help="compile the kernels now, so that no first call waits for the compiler",
        description="Compiles the kernels into the cache folder, as their first launches would. Needs CuPy with NVRTC; "
        "a GPU only where --arch is not given. Exit status 1 if a kernel does not compile.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--arch",
        nargs="+",
        type=integer(10, 999),
        metavar="90",
        help="10 times the compute capability of each GPU to compile for; default: those of this machine",
    )
    parser.add_argument("--only", metavar="REGEX", help="only the kernels whose name this finds, e.g. 'max_pool'")
    parser.add_argument("--dtype", nargs="+", choices=tuple(_DTYPES), help="only what arrays of these dtypes need")
    parser.add_argument("--jobs", type=integer(1, 1024), metavar="N", help="processes; default: one a processor")


def run(arguments: argparse.Namespace) -> int:
    """Compile what the cache does not hold, and print what was done.

    Returns
    -------
    int
        0; 1 if a kernel does not compile.

    Raises
    ------
    ValueError
        If ``--only`` is no regular expression, or finds no kernel.
    RuntimeError
        Without CuPy, NVRTC or the CUDA headers, or, unless ``--arch`` is given, without a GPU.
    """
    begin = time.monotonic()
    kernels = chosen_kernels(arguments.only, arguments.dtype)
    capabilities = arguments.arch or _capabilities_here()
    architectures = list(dict.fromkeys(architecture_for(capability) for capability in capabilities))
    jobs = [(kernel, architecture) for architecture in architectures for kernel in kernels]
    missing = [(kernel, target) for kernel, target in jobs if not cached_module(kernel.source, (kernel.name,), target)]
    processes = min(len(missing), arguments.jobs or len(os.sched_getaffinity(0)))
    failures = 0
    progress = Count("kernels")
    for done, (kernel, architecture, reason) in enumerate(_compiled(missing, processes), 1):
        progress(done, len(missing))
        if reason is not None:
            failures += 1
            print(f"FAILED {kernel} ({_named(architecture)}): {reason}", flush=True)
    print(
        f"{len(kernels)} kernels for {', '.join(map(_named, architectures))}: {len(missing) - failures} compiled, "
        f"{len(jobs) - len(missing)} were there, {failures} failed; {time.monotonic() - begin:.0f} s; {cache_folder()}"
    )
    return 1 if failures else 0


def chosen_kernels(only: str | None, dtypes: Sequence[str] | None) -> list[Kernel]:
    """The kernels whose C++ name a regular expression finds, of those that arrays of some dtypes need.

    Raises
    ------
    ValueError
        If it is no regular expression, or finds no kernel.
    """
    kernels = all_kernels(None if dtypes is None else [np.dtype(_DTYPES[name]) for name in dtypes])
    return named_like(kernels, only, "kernel", lambda kernel: kernel.name)


def _capabilities_here() -> list[int]:
    try:
        cupy = require_gpu()
    except RuntimeError as error:
        raise RuntimeError(f"{error}; to compile for another machine's GPU, name it: --arch 90") from error
    count = cupy.cuda.runtime.getDeviceCount()
    return sorted({int(cupy.cuda.Device(number).compute_capability) for number in range(count)})


def _named(architecture: Architecture) -> str:
    code = "PTX for compute capability" if architecture.ptx else "compute capability"
    return f"{code} {architecture.capability / 10}"


def _compiled(
    jobs: list[tuple[Kernel, Architecture]], processes: int
) -> Iterator[tuple[Kernel, Architecture, str | None]]:
    """Each job as it is done, with the reason if it failed."""
    if not jobs:
        return
    # Processes of their own: NVRTC compiles one program at a time in each.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _ignore_interrupts)
    try:
        futures = {
            pool.submit(_compile, kernel.source, kernel.name, architecture): (kernel, architecture)
            for kernel, architecture in jobs
        }
        for future in as_completed(futures):
            yield (*futures[future], future.result())
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal: it is the first one's to say what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _compile(source: str, name: str, architecture: Architecture) -> str | None:
    try:
        compiled_module(source, (name,), architecture)
    except Exception as error:  # whatever a compiler says, the other kernels are compiled
        return f"{type(error).__name__}: {error}"
    return None
