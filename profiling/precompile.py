"""``python -m profiling.precompile``: compile every kernel on all processors, so that nothing later waits for it."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import gpu_layers.kernels  # noqa: F401 - declares the kernels
from gpu_layers.runtime.cuda import require_gpu
from gpu_layers.runtime.emulation import emulated_module
from gpu_layers.runtime.kernel import Kernel, all_kernels
from gpu_layers.runtime.nvrtc import Architecture, compiled_module


def compile_for_gpu(kernel: Kernel, capability: int) -> str | None:
    """Compile one kernel into the cache, as its first launch would; the reason if that fails."""
    return _tried(lambda: compiled_module(kernel.source, (kernel.name,), Architecture(capability)))


def build_for_emulator(kernel: Kernel) -> str | None:
    """Build the emulated module of one kernel and its kin into the cache; the reason if that fails."""
    return _tried(lambda: emulated_module(kernel, "fast"))


def _tried(build: Callable[[], object]) -> str | None:
    try:
        build()
    except Exception as error:  # whatever a compiler says, the other kernels are compiled
        return f"{type(error).__name__}: {error}"
    return None


def kernel_families(kernels: list[Kernel]) -> list[Kernel]:
    """One kernel of each file and element type: an emulated module holds all of those."""
    families = {(kernel.source, kernel.name.split("<", 1)[-1].split(",")[0].rstrip(">")): kernel for kernel in kernels}
    return list(families.values())


def main(arguments: list[str] | None = None) -> int:
    """Compile, and say what does not.

    Returns
    -------
    int
        0; 1 if a kernel does not compile; 2 without a GPU and no ``--capability``.
    """
    parser = argparse.ArgumentParser(prog="python -m profiling.precompile", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--capability", type=int, metavar="90", help="10 times the compute capability; default: the GPU's"
    )
    parser.add_argument("--emulator", action="store_true", help="build the emulated modules too")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name contains this")
    options = parser.parse_args(arguments)
    try:
        capability = options.capability or int(require_gpu().cuda.Device(0).compute_capability)
    except RuntimeError as error:
        print(f"profiling.precompile: error: {error}", file=sys.stderr)
        return 2
    kernels = [kernel for kernel in all_kernels() if options.only in kernel.name]
    begin = time.monotonic()
    # Processes of their own: NVRTC compiles one program at a time in each.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        jobs = {}
        if options.emulator:  # these take longest
            jobs = {
                f"{kernel} (emulated)": pool.submit(build_for_emulator, kernel) for kernel in kernel_families(kernels)
            }
        jobs |= {str(kernel): pool.submit(compile_for_gpu, kernel, capability) for kernel in kernels}
        failures = {name: job.result() for name, job in jobs.items() if job.result() is not None}
    for name, reason in failures.items():
        print(f"FAILED {name}: {reason}")
    seconds = time.monotonic() - begin
    print(f"{len(jobs)} builds, {len(failures)} failed, {seconds:.0f} s, compute capability {capability / 10}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
