"""Few of the verification's cases that launch every kernel that any of them launches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from gpu_layers.catalogue.case import Arrays, Case
from gpu_layers.runtime.backend import use_executor
from gpu_layers.runtime.kernel import Kernel, Parameter, all_kernels
from gpu_layers.runtime.limits import force_limits


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
