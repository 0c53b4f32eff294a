"""``python -m profiling.model``: what the kernels should cost on an H100, counted with no GPU. Nothing is measured.

For every operation, pass and shape of the benchmark: the launches that the launchers make, registers and occupancy
from the compiled machine code, and the bytes that must cross the memory bus, from the emulator's counters. What is
counted is a smaller shape that takes the same kernels: of each array of each launch, which part of it crosses the bus,
and how often; that is applied to the array's size in the whole shape. The modelled fraction is floor bytes over
modelled bytes: what the kernels reach at best if memory is all that limits them and every launch reads its arrays anew.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gpu_layers.kernels.arrays import empty
from gpu_layers.runtime.backend import use_backend, use_executor
from gpu_layers.runtime.emulator import Trace
from gpu_layers.runtime.kernel import Kernel, all_kernels
from gpu_layers.runtime.nvrtc import Architecture, compiled_module
from profiling.cases import DTYPES, Case, all_cases, selected
from profiling.compiled_code import CompiledKernel, read_cubin
from profiling.data import InputMaker
from profiling.devices import EmulatedDevice
from profiling.environment import environment
from profiling.launches import Launch, NoLaunches, listed_launches
from profiling.model_charts import save_model_chart
from profiling.occupancy import MULTIPROCESSORS, occupancy, resident_blocks
from profiling.operation import FORWARD, Arrays
from profiling.operations import OPERATIONS
from profiling.progress import Progress
from profiling.register_limits import most_registers
from profiling.results import Row, Run

_SECTOR = 32
_CAPABILITY = 90
# Elements of what is counted; the emulator takes some million a second.
_COUNTED, _MOST_COUNTED = 2**17, 2**22
_CHANNELS, _VECTOR = 64, 8
_MOST_BYTES = 1.05
_MOST_INSTRUCTIONS = 10.0
_SMALL = 4e6


def model(case: Case) -> Row:
    """The modelled row of a case."""
    launches = launches_of(case)
    moved, note = modelled_bytes(case, launches)
    by_arrays = case.bytes_by_arrays
    notes = [note] if note else []
    if by_arrays:
        notes.append(f"{by_arrays / 1e6:.2f} MB of it by the array library, by the sizes of its arrays")
    described = [_described(launch) for launch in launches]
    row = Row(
        case=str(case),
        op=case.operation.name,
        direction=case.direction,
        dtype=case.dtype,
        shape=list(case.shape),
        channels_last=case.channels_last,
        floor_bytes=case.floor_bytes,
        torch_bytes=case.torch_bytes,
        notes=notes,
    )
    row.model = {
        "bytes": moved,
        "fraction": case.floor_bytes / moved,
        "launches": described,
        "failed_gates": failed_gates(case, moved, launches),
    }
    return row


@cache
def _compiled(kernel: Kernel) -> CompiledKernel:
    names = tuple(other.name for other in all_kernels() if other.source == kernel.source)
    module = compiled_module(kernel.source, names, Architecture(_CAPABILITY), warnings_as_errors=True)
    return read_cubin(module.path)[module.symbols[kernel.name]]


def _described(launch: Launch) -> dict[str, Any]:
    resources = _compiled(launch.kernel).resources
    threads = math.prod(launch.block)
    return {
        "kernel": launch.kernel.name,
        "grid": list(launch.grid),
        "block": list(launch.block),
        "registers": resources.registers,
        "occupancy": occupancy(resources, threads, launch.shared_bytes),
    }


def failed_gates(case: Case, moved: int, launches: list[Launch]) -> list[str]:
    """Which conditions for full speed do not hold, in words; tests/gates has those of single instructions."""
    failed = []
    if moved > _MOST_BYTES * case.floor_bytes:
        failed.append(f"moves {moved / case.floor_bytes:.2f} x the floor")
    for launch in launches:
        kernel, name = _compiled(launch.kernel), launch.kernel.name
        resources = kernel.resources
        if resources.stack or resources.local:
            failed.append(f"{name}: {resources.stack + resources.local} bytes of stack")
        if resources.registers > most_registers(name):
            failed.append(f"{name}: {resources.registers} registers")
        loops = kernel.loops()
        instructions = kernel.hot_loop().instructions_per_byte if loops else 0.0
        if instructions > _MOST_INSTRUCTIONS:
            failed.append(f"{name}: up to {instructions:.1f} instructions a byte")
    # The launch with most blocks is the one that moves the arrays; others merge what it leaves.
    main = max(launches, key=lambda launch: math.prod(launch.grid), default=None)
    if main is not None and case.floor_bytes > _SMALL:
        threads = math.prod(main.block)
        resident = resident_blocks(_compiled(main.kernel).resources, threads, main.shared_bytes)
        blocks = math.prod(main.grid)
        if blocks < MULTIPROCESSORS * resident:
            failed.append(f"{main.kernel.name}: {blocks} blocks, {MULTIPROCESSORS * resident} would fit at once")
    return list(dict.fromkeys(failed))


def model_table(run: Run) -> str:
    """One line a case."""
    width = max(len(row.case) for row in run.rows)
    lines = [
        f"MODELLED for an H100, with no GPU: bytes counted by emulation, no times. Commit {run.environment['commit']}.",
        "Fractions: floor bytes over modelled bytes, the most that can be reached; PyTorch's by its algorithms.",
        f"{'case':<{width}} {'floor MB':>9} {'ours MB':>9} {'fraction':>8} {'PyTorch':>8} {'launches':>8} "
        f"{'blocks':>9} {'registers':>9} {'occupancy':>9}  failed gates",
    ]
    for row in run.rows:
        assert row.model is not None
        launches = row.model["launches"]
        main = max(launches, key=lambda launch: math.prod(launch["grid"]))
        lines.append(
            f"{row.case:<{width}} {row.floor_bytes / 1e6:>9.2f} {row.model['bytes'] / 1e6:>9.2f} "
            f"{row.model['fraction']:>8.2f} {row.floor_bytes / row.torch_bytes:>8.2f} {len(launches):>8} "
            f"{math.prod(main['grid']):>9} {max(launch['registers'] for launch in launches):>9} "
            f"{main['occupancy']:>9.0%}  {'; '.join(row.model['failed_gates'] + row.notes)}".rstrip()
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Model every case, and print the table.

    Returns
    -------
    int
        0; 2 for bad usage or a missing compiler.
    """
    parser = argparse.ArgumentParser(prog="python -m profiling.model", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--only", metavar="REGEX", help="cases whose name this finds")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=("bfloat16", "float32"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture, e.g. model.png")
    options = parser.parse_args(arguments)
    try:
        cases = selected(all_cases(OPERATIONS, options.dtypes), options.only)
        run = Run("modelled", environment(gpu=False))
        progress = Progress(len(cases), sys.stderr)
        for number, case in enumerate(cases):
            progress.show(number, str(case))
            run.rows.append(model(case))
        progress.end()
        if options.plot:
            save_model_chart(run, options.plot)
    except (ValueError, RuntimeError) as error:
        print(f"profiling.model: error: {error}", file=sys.stderr)
        return 2
    if options.json:
        run.save(options.json)
    print(model_table(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
