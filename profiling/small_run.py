"""``python -m profiling.small_run``: launch every kernel on small arrays, under a sanitizer for example.

Few of the verification's cases launch all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from gpu_layers.catalogue.case import Arrays, Case
from gpu_layers.runtime.backend import use_executor
from gpu_layers.runtime.kernel import Kernel, Parameter, all_kernels
from gpu_layers.runtime.limits import force_limits
from gpu_layers.verification import all_cases, cuda_backend, emulated_backend

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


# ---- Few cases that launch every kernel ------------------------------------------------------------------------------


class _Names:
    """Takes launches: keeps the kernel's name, and writes zeros where the kernel would have written."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def launch(self, kernel: Kernel, grid: Any, block: Any, values: list[Any], *rest: Any) -> None:
        self.names.add(kernel.name)
        for parameter, value in zip(kernel.parameters, values, strict=True):
            if _is_written(parameter) and value is not None:
                value.reshape(-1).view(np.uint8)[...] = 0


def _is_written(parameter: Parameter) -> bool:
    return parameter.is_pointer and not parameter.is_const


def kernels_of(case: Case) -> set[str]:
    """Names of the kernels that a case launches."""
    executor = _Names()
    inputs = case.inputs()
    # Zeros may be what no kernel gives, and the host may refuse to go on with them: what was launched counts.
    with use_executor(executor), contextlib.suppress(Exception):
        case.run(inputs)
    return executor.names


def with_index64(case: Case) -> Case:
    """The same case, by the kernels that arrays of 2**31 elements and more need."""

    return _limited(case, "64-bit indices", index64=True)


def with_one_block(case: Case) -> Case:
    """The same case, by the kernels for arrays of which a GPU does not hold enough blocks at once."""
    return _limited(case, "one block", max_blocks=1)


def _limited(case: Case, label: str, **limits: Any) -> Case:
    def run(arrays: Arrays) -> Arrays:
        with force_limits(**limits):
            return case.run(arrays)

    return replace(case, label=f"{case.label}, {label}", run=run)


def covering(cases: Iterable[Case]) -> tuple[list[Case], set[str]]:
    """The cases that launch a kernel that none before them does: as they are, with 64-bit indices, with one block.

    Returns
    -------
    list of Case
    set of str
        Names of the kernels that they launch.
    """
    chosen: list[Case] = []
    covered: set[str] = set()
    cases, everything = list(cases), {kernel.name for kernel in all_kernels()}
    for case in (*cases, *map(with_index64, cases), *map(with_one_block, cases)):
        if covered >= everything:
            break
        names = kernels_of(case)
        if not names <= covered:
            covered |= names
            chosen.append(case)
    return chosen, covered


if __name__ == "__main__":
    sys.exit(main())
