"""``python -m profiling.small_run``: launch every kernel on small arrays, under a sanitizer for example."""

from __future__ import annotations

import argparse
import sys

from gpu_layers.runtime.kernel import all_kernels
from gpu_layers.verification import all_cases, cuda_backend, emulated_backend
from profiling.covering import covering

_CASES_A_LINE = 25


def main(arguments: list[str] | None = None) -> int:
    """Launch, and say how many kernels were.

    Returns
    -------
    int
        0; 1 if a case raised an error; 2 without a GPU.
    """
    parser = argparse.ArgumentParser(prog="python -m profiling.small_run", description=__doc__, allow_abbrev=False)
    parser.add_argument("--backend", choices=("cuda", "emulated"), default="cuda")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    options = parser.parse_args(arguments)
    try:
        backend = cuda_backend() if options.backend == "cuda" else emulated_backend()
    except RuntimeError as error:
        print(f"profiling.small_run: error: {error}", file=sys.stderr)
        return 2
    if options.backend == "cuda":
        _separate_allocations()
    cases, names = covering(case for case in all_cases() if options.only in str(case))
    failed = 0
    for number, case in enumerate(cases, 1):
        try:
            placed = {name: backend.place(array) for name, array in case.inputs().items()}
            with backend.activate():
                case.run(placed)
            lost = backend.is_lost()  # which waits for the case: an error is that of the case under way
        except Exception as error:  # whatever a case raises, the others are run
            failed += 1
            print(f"FAILED {case}: {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
            lost = backend.is_lost()
        if lost:
            print(f"STOPPED: the device does no more work since the case {case} ({number} of {len(cases)})")
            return 1
        if number % _CASES_A_LINE == 0:
            print(f"{number} of {len(cases)} cases", flush=True)
    never = sorted({kernel.name for kernel in all_kernels()} - names)
    print(f"{len(cases)} cases launched {len(names)} kernels; {len(never)} more are declared that no case launches")
    for name in never:
        print(f"not launched: {name}")
    return 1 if failed else 0


def _separate_allocations() -> None:
    """One allocation of the driver for each array: within a pool's blocks no sanitizer sees where an array ends."""
    import cupy

    cupy.cuda.set_allocator(None)


if __name__ == "__main__":
    sys.exit(main())
