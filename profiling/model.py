"""``python -m profiling.model``: what the kernels should cost on a GPU, counted with no GPU.

For every operation, pass and shape of the benchmark: the launches that the launchers make, registers and occupancy from
the compiled machine code, the bytes that must cross the memory bus (:mod:`profiling.traffic`), the instructions that
are issued, and the time that follows. It can be wrong.

A launch takes about as long as what it needs most of, and the launches of a call follow each other:

- the memory: bytes that cross the bus, over the rate of a large copy;
- issue: instructions that warps issue, each for 32 lanes whether they have work or not, over the issue rate. They are
  counted by executing the machine code of a sample of the launch's own blocks, with its own arguments
  (:mod:`profiling.machine`), so that what comes before the loop, ragged ends and idle lanes are in it;
- access: lines of 128 bytes that the loads and stores of warps touch, one a cycle of each multiprocessor, and lanes
  that ask for something to be brought to the L2 cache, which take a cycle each;
- waiting: how often a warp waits for memory and at barriers, one after the other, for as many rounds of blocks as there
  are. By Little's law this is the same as too few bytes in flight.

The first three are shared by the blocks of a round (what the GPU holds at once), and the last round is one even if it
is not full. What a call's fewest bytes take as a copy, over the call's time, is its fraction of the copy; a copy is 1.

Bytes and instructions are counted, and agree with the hardware's counters. What a wait takes, and how much of the issue
rate is reached, were fitted to the times of 108 calls on an H200.

Not in the model: what stays in the L2 cache between launches, instructions that only a part of the lanes of a
multiprocessor can execute, and conflicts in shared memory.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gpu_layers.catalogue import OPERATIONS
from gpu_layers.catalogue.operation import FORWARD, Shape
from gpu_layers.runtime.kernel import Kernel, all_kernels
from gpu_layers.runtime.nvrtc import Architecture, compiled_module
from profiling.cases import DTYPES, Case, all_cases, selected
from profiling.charts import largest_rows, save_model_chart
from profiling.compiled_code import CompiledKernel, most_registers, occupancy, read_cubin, resident_blocks
from profiling.devices import GPUS, MODELLED, Gpu, environment
from profiling.machine import Execution, execute
from profiling.results import Row, Run
from profiling.timing import Progress
from profiling.traffic import Launch, launches_of, modelled_bytes

_MOST_BYTES = 1.05
_SMALL = 4e6
# Of the blocks that fit at once: what a grid that is there all at once, and equal shares, may leave.
_LEAST_FILLED = 0.95


def model(case: Case, gpu: Gpu = MODELLED) -> Row:
    """The modelled row of a case."""
    counted, note = count_case(case)
    prediction = timed(counted, case.floor_bytes, gpu, note)
    row = Row.of(case, notes=[note] if note else [])
    moved = round(sum(launch.moved for launch in counted))
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
        if main.blocks < _LEAST_FILLED * held:
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
    chosen = {row.case for row in largest_rows([Row.of(case) for case in cases])}
    return [
        case
        for case in cases
        if str(case) in chosen or (case.dtype == "bfloat16" and case.shape == case.operation.shapes[0])
    ]


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
        "--largest", action="store_true", help="only bfloat16, the shape with most bytes and the one that is measured"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture, e.g. model.png")
    options = parser.parse_args(arguments)
    try:
        cases = selected(all_cases(OPERATIONS, options.dtypes), options.only)
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


# ---- The modelled time of an operation -------------------------------------------------------------------------------


#: The machine code that is counted, whatever the GPU.
_CAPABILITY = 90
_LANES = 32
# Threads that are executed to count a launch; NumPy takes some ten thousand instructions of them a second.
_SAMPLE = 4096
# These were fitted to the times of 108 calls in profiling/results/2026-11-29T194400Z-nvidia-h200-2e45b3d: half of them
# are predicted within 8 %, nine of ten within 30 %. Fitted to one half, they predict the other as well.
#: Seconds: between the end of a launch and the work of the next one; a read that hits a cache; a barrier of a block;
#: one of all blocks, with the memory that stands still meanwhile.
LAUNCH, CACHED, BARRIER, GRID_BARRIER = 2.5e-6, 220e-9, 350e-9, 8e-6
#: A read from an idle memory, as a part of one from a busy memory.
IDLE = 0.7
#: What is reached of the rate of issue at the highest clock: 0.94 of that clock, and 0.8 of its slots.
ISSUED = 0.75
#: Of the highest clock, at which accesses go.
ACCESSED = 0.94
#: How well the needs of a launch overlap: their times are added as powers. Without end they would overlap wholly;
#: with 3.5, two that are equal take 1.22 times as long as one of them.
OVERLAP = 3.5
MEMORY, ISSUE, ACCESS, WAITING = "memory", "issue", "access", "waiting"


@dataclass(frozen=True)
class Counted:
    """What was counted of a launch. It does not depend on the GPU.

    Attributes
    ----------
    launch : Launch
    kernel : CompiledKernel
    moved : float
        Bytes that must cross the memory bus.
    execution : Execution
        Of the blocks that were executed.
    """

    launch: Launch
    kernel: CompiledKernel
    moved: float
    execution: Execution

    @property
    def blocks(self) -> int:
        """Of the whole launch."""
        return math.prod(self.launch.grid)

    @property
    def thread_instructions(self) -> float:
        """Of the whole launch, with those of idle lanes."""
        return _LANES * self.execution.warp_instructions / self.execution.blocks * self.blocks

    def resident(self, gpu: Gpu) -> int:
        """Blocks that a multiprocessor holds at once."""
        return resident_blocks(self.kernel.resources, math.prod(self.launch.block), self.launch.shared_bytes, gpu)


@dataclass(frozen=True)
class LaunchTime:
    """The modelled time of a launch.

    Attributes
    ----------
    seconds : float
    limit : {"memory", "issue", "access", "waiting"}
        What it needs most of.
    """

    seconds: float
    limit: str


@dataclass(frozen=True)
class Prediction:
    """The modelled time of a call.

    Attributes
    ----------
    gpu : Gpu
    counted : tuple of Counted
        Its launches.
    times : tuple of LaunchTime
    seconds : float
        Of the call.
    copy_seconds : float
        Of a copy of the fewest bytes that the call must move.
    note : str
        Empty, or what was not counted.
    """

    gpu: Gpu
    counted: tuple[Counted, ...]
    times: tuple[LaunchTime, ...]
    seconds: float
    copy_seconds: float
    note: str = ""

    @property
    def fraction(self) -> float:
        """The call's speed, as a part of a copy's: 1 is perfect."""
        return self.copy_seconds / self.seconds

    @property
    def limit(self) -> str:
        """What the longest launch needs most of."""
        return max(self.times, key=lambda time: time.seconds).limit if self.times else MEMORY


def predict(
    operation: str,
    shape: Shape,
    dtype: str = "bfloat16",
    *,
    direction: str = FORWARD,
    channels_last: bool = False,
    gpu: str = MODELLED.name,
) -> Prediction:
    """The modelled time of an operation of the benchmark, e.g. ``predict("dropout", (8192, 4096)).fraction``.

    Parameters
    ----------
    operation : str
        A name of ``gpu_layers.catalogue``.
    shape : tuple of int
        (N, C, *spatial) of x.
    dtype : {"bfloat16", "float16", "float32", "float64"}
    direction : {"forward", "backward"}
    channels_last : bool
    gpu : {"A100", "H100", "H200", "B200"}

    Raises
    ------
    ValueError
        If there is no such operation, pass or GPU.
    """
    found = [candidate for candidate in OPERATIONS if candidate.name == operation]
    if not found or direction not in found[0].passes:
        names = ", ".join(f"{o.name} ({' and '.join(o.passes)})" for o in OPERATIONS)
        raise ValueError(f"there is no operation {operation!r} {direction}: there are {names}")
    if gpu not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {gpu!r}")
    return predict_case(Case(found[0], direction, tuple(shape), dtype, channels_last), GPUS[gpu])


def predict_case(case: Case, gpu: Gpu = MODELLED) -> Prediction:
    """The modelled time of a case."""
    counted, note = count_case(case)
    return timed(counted, case.floor_bytes, gpu, note)


def count_case(case: Case) -> tuple[list[Counted], str]:
    """What there is to count of a case's launches, and a note on what could not be counted."""
    launches = launches_of(case, filled=True)
    moved, note = modelled_bytes(case, launches)
    return [count_launch(*pair) for pair in zip(launches, moved, strict=True)], note


def count_launch(launch: Launch, moved: float) -> Counted:
    """Execute a sample of a launch's blocks: all of them if they are few, else one at a random place of equal parts."""
    kernel, blocks = compiled(launch.kernel), math.prod(launch.grid)
    wanted = max(4, _SAMPLE // math.prod(launch.block))
    chosen: Sequence[int] = range(blocks)
    if blocks > wanted:
        # Random, so that no period of the work (an image has so many blocks, say) meets one of the sample.
        places = np.random.default_rng(2026).random(wanted)
        chosen = sorted({int((part + place) * blocks / wanted) for part, place in enumerate(places)})
    execution = execute(
        kernel, launch.grid, launch.block, launch.values, dynamic_shared=launch.shared_bytes, blocks=chosen
    )
    return Counted(launch, kernel, moved, execution)


def timed(counted: Sequence[Counted], floor_bytes: int, gpu: Gpu = MODELLED, note: str = "") -> Prediction:
    """The time that counted launches should take, one after the other.

    Parameters
    ----------
    counted : sequence of Counted
    floor_bytes : int
        The fewest bytes that the call must move.
    gpu : Gpu
    note : str
        Of the result.
    """
    times = tuple(launch_time(launch, gpu) for launch in counted)
    seconds = sum(time.seconds for time in times)
    return Prediction(gpu, tuple(counted), times, seconds, copy_seconds(floor_bytes, gpu), note)


def copy_seconds(size: float, gpu: Gpu = MODELLED) -> float:
    """What a copy of so many bytes, read and written, takes: one launch, which waits for the memory at least once."""
    return LAUNCH + max(size / gpu.copy_rate, gpu.latency)


def launch_time(counted: Counted, gpu: Gpu = MODELLED) -> LaunchTime:
    """The time of one launch."""
    execution, blocks = counted.execution, counted.blocks
    held = max(1, counted.resident(gpu)) * gpu.multiprocessors
    barriers = execution.cached_trips * CACHED + execution.barriers * BARRIER + execution.arrivals * GRID_BARRIER
    issued = execution.warp_instructions / execution.blocks * _LANES / (ISSUED * gpu.lanes * gpu.clock)
    accessed = execution.pipe_cycles / execution.blocks / (ACCESSED * gpu.clock)
    needs = dict.fromkeys((MEMORY, ISSUE, ACCESS, WAITING), 0.0)
    seconds = 0.0
    rounds, rest = divmod(blocks, held)
    for count, repeated in ((held, rounds), (rest, 1)):
        if not count or not repeated:
            continue
        memory = counted.moved * count / blocks / gpu.copy_rate
        issue, access = (one * math.ceil(count / gpu.multiprocessors) for one in (issued, accessed))
        waiting = barriers + _trips(execution.trips, max(memory, issue, access), memory, gpu)
        of_round = {MEMORY: memory, ISSUE: issue, ACCESS: access, WAITING: waiting}
        seconds += repeated * sum(need**OVERLAP for need in of_round.values()) ** (1 / OVERLAP)
        for name, need in of_round.items():
            needs[name] += repeated * need
    return LaunchTime(LAUNCH + seconds, max(needs, key=lambda name: needs[name]))


def _trips(trips: float, least: float, memory: float, gpu: Gpu) -> float:
    """Seconds of so many reads one after the other; each takes the longer, the busier the memory is meanwhile.

    Busy is the part of the round's time in which the memory works, and that time is at least ``least``: what is looked
    for is the time t = trips * (idle + (loaded - idle) * memory / max(t, least)).
    """
    idle, loaded = IDLE * gpu.latency, gpu.latency
    alone = (idle + math.sqrt(idle**2 + 4 * (loaded - idle) * memory / trips)) / 2 * trips if trips else 0.0
    return alone if alone >= least else trips * (idle + (loaded - idle) * memory / least)


@cache
def compiled(kernel: Kernel) -> CompiledKernel:
    """The machine code of a kernel."""
    names = tuple(other.name for other in all_kernels() if other.source == kernel.source)
    module = compiled_module(kernel.source, names, Architecture(_CAPABILITY), warnings_as_errors=True)
    return read_cubin(module.path)[module.symbols[kernel.name]]


if __name__ == "__main__":
    sys.exit(main())
