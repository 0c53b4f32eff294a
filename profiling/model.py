"""``python -m profiling.model``: what the kernels should cost on a GPU, counted with no GPU. Nothing is measured.

For every operation, pass and shape of the benchmark: the launches that the launchers make, registers and occupancy from
the compiled machine code, the bytes that must cross the memory bus (:mod:`profiling.traffic`), the instructions that
are issued, and the time that follows (:mod:`profiling.prediction`).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from gpu_layers.catalogue import OPERATIONS
from profiling.cases import DTYPES, Case, all_cases, selected
from profiling.charts import largest_rows
from profiling.devices import GPUS, MODELLED, Gpu
from profiling.environment import environment
from profiling.model_charts import save_model_chart
from profiling.occupancy import occupancy
from profiling.prediction import Counted, LaunchTime, Prediction, count_case, timed
from profiling.progress import Progress
from profiling.register_limits import most_registers
from profiling.results import Row, Run

_MOST_BYTES = 1.05
_SMALL = 4e6


def model(case: Case, gpu: Gpu = MODELLED) -> Row:
    """The modelled row of a case."""
    counted, note = count_case(case)
    prediction = timed(counted, case.floor_bytes, gpu, by_arrays=case.bytes_by_arrays, note=note)
    notes = [note] if note else []
    if case.bytes_by_arrays:
        size = case.bytes_by_arrays / 1e6
        notes.append(f"{size:.2f} MB of it by the array library, by the sizes of its arrays")
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
    moved = round(sum(launch.moved for launch in counted)) + case.bytes_by_arrays
    row.model = {
        "gpu": gpu.name,
        "bytes": moved,
        "instructions": round(sum(launch.thread_instructions for launch in counted)),
        "microseconds": 1e6 * prediction.seconds,
        "fraction": prediction.fraction,
        "limit": prediction.limit,
        "launches": [_described(*pair, gpu) for pair in zip(counted, prediction.times, strict=True)],
        "failed_gates": failed_gates(case, moved, prediction),
    }
    return row


def _described(counted: Counted, time: LaunchTime, gpu: Gpu) -> dict[str, Any]:
    launch, resources, execution = counted.launch, counted.kernel.resources, counted.execution
    return {
        "kernel": launch.kernel.name,
        "grid": list(launch.grid),
        "block": list(launch.block),
        "registers": resources.registers,
        "occupancy": occupancy(resources, math.prod(launch.block), launch.shared_bytes, gpu),
        "bytes": round(counted.moved),
        "instructions": round(counted.thread_instructions),
        "waits": execution.trips,
        "barriers": execution.barriers,
        "grid_barriers": execution.arrivals,
        "microseconds": 1e6 * time.seconds,
        "limit": time.limit,
    }


def failed_gates(case: Case, moved: int, prediction: Prediction) -> list[str]:
    """Which conditions for full speed do not hold, in words; tests/gates has those of single instructions."""
    failed = []
    if moved > _MOST_BYTES * case.floor_bytes:
        failed.append(f"moves {moved / case.floor_bytes:.2f} x the floor")
    for counted in prediction.counted:
        kernel, name = counted.kernel, counted.launch.kernel.name
        resources = kernel.resources
        if resources.stack or resources.local:
            failed.append(f"{name}: {resources.stack + resources.local} bytes of stack")
        if resources.registers > most_registers(name):
            failed.append(f"{name}: {resources.registers} registers")
        loops = kernel.loops()
        instructions = kernel.hot_loop().instructions_per_byte if loops else 0.0
        if instructions > prediction.gpu.instructions_per_byte:
            failed.append(f"{name}: up to {instructions:.1f} instructions a byte")
    # The launch with most blocks is the one that moves the arrays; others merge what it leaves.
    main = max(prediction.counted, key=lambda counted: counted.blocks, default=None)
    if main is not None and case.floor_bytes > _SMALL:
        held = prediction.gpu.multiprocessors * main.resident(prediction.gpu)
        if main.blocks < held:
            failed.append(f"{main.launch.kernel.name}: {main.blocks} blocks, {held} would fit at once")
    return list(dict.fromkeys(failed))


def model_table(run: Run) -> str:
    """One line a case."""
    width = max(len(row.case) for row in run.rows)
    gpu = (run.rows[0].model or {}).get("gpu")
    lines = [
        f"MODELLED for an {gpu}, with no GPU: bytes and instructions counted by emulation, no times measured. "
        f"Commit {run.environment['commit']}.",
        "of copy: a copy of the fewest bytes over the call, in modelled time; limit: what its longest launch needs",
        "most of; ours: bytes moved; instr/B: thread instructions for each of the fewest bytes; PyTorch: fewest bytes",
        "over those that its algorithms move, which it cannot be above.",
        f"{'case':<{width}} {'of copy':>7} {'limit':>8} {'us':>8} {'floor MB':>9} {'ours MB':>9} {'instr/B':>8} "
        f"{'PyTorch':>8} {'launches':>8} {'blocks':>9} {'registers':>9} {'occupancy':>9}  failed gates",
    ]
    for row in run.rows:
        assert row.model is not None
        launches, floor = row.model["launches"], row.floor_bytes
        main = max(launches, key=lambda launch: math.prod(launch["grid"]))
        lines.append(
            f"{row.case:<{width}} {row.model['fraction']:>7.2f} {row.model['limit']:>8} "
            f"{row.model['microseconds']:>8.1f} {floor / 1e6:>9.2f} {row.model['bytes'] / 1e6:>9.2f} "
            f"{row.model['instructions'] / floor:>8.1f} {floor / row.torch_bytes:>8.2f} {len(launches):>8} "
            f"{math.prod(main['grid']):>9} {max(launch['registers'] for launch in launches):>9} "
            f"{main['occupancy']:>9.0%}  {'; '.join(row.model['failed_gates'] + row.notes)}".rstrip()
        )
    return "\n".join(lines)


def _largest(cases: list[Case]) -> list[Case]:
    rows = {
        str(case): Row(
            str(case),
            case.operation.name,
            case.direction,
            case.dtype,
            list(case.shape),
            case.channels_last,
            case.floor_bytes,
            case.torch_bytes,
        )
        for case in cases
    }
    chosen = {row.case for row in largest_rows(list(rows.values()))}
    return [case for case in cases if str(case) in chosen]


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
    parser.add_argument("--gpu", choices=tuple(GPUS), default=MODELLED.name)
    parser.add_argument(
        "--largest", action="store_true", help="only what the README's table shows: bfloat16, the shape with most bytes"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture, e.g. model.png")
    options = parser.parse_args(arguments)
    try:
        modelled = [operation for operation in OPERATIONS if operation.is_modelled]
        cases = selected(all_cases(modelled, options.dtypes), options.only)
        if options.largest:
            cases = _largest(cases)
        run = Run("modelled", environment(gpu=False))
        progress = Progress(len(cases), sys.stderr)
        for number, case in enumerate(cases):
            progress.show(number, str(case))
            run.rows.append(model(case, GPUS[options.gpu]))
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
