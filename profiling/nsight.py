"""``python -m profiling.nsight``: where the time of one operation goes, by NVIDIA's profilers.

``ncu OP [OUT_DIR]`` writes what the hardware counters say of its kernels (DRAM bytes, throughput, occupancy, stalls) to
OUT_DIR/OP.ncu-raw.csv and, in short, OUT_DIR/OP.ncu.csv, and prints a table. The GPU's clocks are left as they are.
``nsys OP [OUT]`` or ``nsys OUT -- COMMAND`` writes a time line, OUT.nsys-rep, with a range around every layer's passes,
and prints the time in each kernel. ``calls OP`` is what both look at; ``table RAW.csv`` makes the table once more.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_layers.catalogue import HEADLINE, OPERATIONS
from profiling.cases import DTYPES, Case, InputMaker
from profiling.devices import CudaDevice, Device, EmulatedDevice
from profiling.implementations import Ours
from profiling.results import ResultsError

_MODULE = "profiling.nsight"
_ROOT = Path(__file__).resolve().parents[1]

# ---- The calls that are looked at ------------------------------------------------------------------------------------

#: In place of an operation: those that matter most, in both layouts unless channels last are asked for.
ALL_HEADLINE = "headline"


def chosen(text: str, dtype: str, channels_last: bool) -> list[Case]:
    """The cases of ``OP`` or ``OP/forward`` or ``OP/backward`` at the operation's first shape, or of ``headline``.

    Raises
    ------
    ResultsError
        If there is no such operation, pass or layout.
    """
    if text == ALL_HEADLINE:
        return [
            Case(operation, direction, operation.shapes[0], dtype, layout)
            for layout in sorted({channels_last, True})
            for operation in HEADLINE
            if layout in operation.layouts
            for direction in operation.passes
        ]
    name, _, direction = text.partition("/")
    operations = [operation for operation in OPERATIONS if operation.name == name]
    if not operations:
        names = ", ".join(operation.name for operation in OPERATIONS)
        raise ResultsError(f"there is no operation {name!r}: the operations are {names}, or {ALL_HEADLINE}")
    (operation,) = operations
    if direction and direction not in operation.passes:
        raise ResultsError(f"{name} has no pass {direction!r}: {', '.join(operation.passes)}")
    if channels_last not in operation.layouts:
        raise ResultsError(f"{name} is not measured with channels last")
    directions = (direction,) if direction else operation.passes
    return [Case(operation, one, operation.shapes[0], dtype, channels_last) for one in directions]


def call_under_profiler(case: Case, device: Device, calls: int, nvtx: Any | None) -> None:
    """Warm up, and then call within a range of the case's name, within the one that Nsight Compute is asked for."""
    with device.activate():
        call = Ours(case, device).prepare(InputMaker(device).inputs(case))
        call()
        device.timer.synchronize()
        if nvtx is not None:
            nvtx.RangePush("profile")
            nvtx.RangePush(f"{case.operation.name}.{case.direction}")
        for _ in range(calls):
            call()
        device.timer.synchronize()
        if nvtx is not None:
            nvtx.RangePop()
            nvtx.RangePop()


# ---- Nsight Compute's numbers ----------------------------------------------------------------------------------------

#: Column of the table, and Nsight Compute's name.
COMMON = {
    "us": "gpu__time_duration.sum",
    "DRAM read MB": "dram__bytes_read.sum",
    "DRAM written MB": "dram__bytes_write.sum",
    "DRAM %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 hit %": "lts__t_sector_hit_rate.pct",
    "issue %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "memory stall": "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
}
_BARRIER = {"barrier stall": "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"}
_BANKS = {"bank conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum"}
_INTEGER = {"integer pipe %": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active"}
_MATH = {"special functions %": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active"}
#: What else limits an operation, by the beginning of its name.
SPECIAL = {
    "batch_norm": _BARRIER | _BANKS,
    "dropout": _INTEGER,
    "max_pool": _INTEGER,
    "avg_pool": _INTEGER,
    "activation_dropout": _INTEGER | _MATH,
}
# Of the units that Nsight Compute writes, in those of the table.
_UNITS = {
    "byte": 1e-6,
    "Kbyte": 1e-3,
    "Mbyte": 1.0,
    "Gbyte": 1e3,
    "nsecond": 1e-3,
    "ns": 1e-3,
    "usecond": 1.0,
    "us": 1.0,
    "msecond": 1e3,
    "ms": 1e3,
    "second": 1e6,
    "s": 1e6,
}


def metrics_of(op: str) -> dict[str, str]:
    """Columns and metrics for an operation; for ``headline``, which is several, those of each."""
    if op == "headline":
        return {name: metric for columns in (COMMON, *SPECIAL.values()) for name, metric in columns.items()}
    own = [extra for name, extra in SPECIAL.items() if op.startswith(name)]
    return COMMON | (own[-1] if own else {})


def read(path: Path | str) -> list[dict[str, str | float | None]]:
    """One entry a kernel launch: ``kernel``, ``grid``, ``block``, and the columns that the file has.

    Raises
    ------
    ResultsError
        If it is not the CSV of ``ncu --page raw --csv``.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from error
    # The program's own output and ncu's messages stand before the table.
    begin = next((number for number, line in enumerate(lines) if line.startswith('"ID",')), None)
    if begin is None:
        said = next((line for line in lines if line.startswith("==ERROR==")), "no kernel was profiled")
        raise ResultsError(f"{path} has no table of ncu --page raw --csv: {said}")
    rows = list(csv.DictReader(line for line in lines[begin:] if line.startswith('"')))
    units, launches = rows[0], rows[1:]
    columns = {
        name: metric for names in (COMMON, *SPECIAL.values()) for name, metric in names.items() if metric in units
    }
    entries: list[dict[str, str | float | None]] = []
    for launch in launches:
        entry: dict[str, str | float | None] = {
            "kernel": _short(launch["Kernel Name"]),
            "grid": launch.get("Grid Size", ""),
            "block": launch.get("Block Size", ""),
        }
        entry |= {name: _number(launch[metric], units[metric]) for name, metric in columns.items()}
        entries.append(entry)
    return entries


def _number(text: str, unit: str) -> float | None:
    try:
        return float(text.replace(",", "")) * _UNITS.get(unit, 1.0)
    except ValueError:  # "n/a" where the GPU does not count it
        return None


def _short(kernel: str) -> str:
    """The kernel's name without its parameters."""
    return re.sub(r"^void ", "", kernel).split("(")[0]


def table(entries: Sequence[dict[str, str | float | None]]) -> str:
    """The entries as aligned text."""
    cells = [list(entries[0])] + [[_cell(value) for value in entry.values()] for entry in entries]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def _cell(value: str | float | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:,.4g}"


# ---- The tools -------------------------------------------------------------------------------------------------------


def _start(tool: str, *arguments: str, **variables: str) -> None:
    """Run a tool to its end, with this tree's modules within reach.

    Raises
    ------
    ResultsError
        If it is not there.
    """
    path = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if path is None:
        raise ResultsError(f"{tool} was not found: it comes with the CUDA toolkit and with NVIDIA's Nsight")
    modules = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    subprocess.run([path, *arguments], env=os.environ | {"PYTHONPATH": modules} | variables, check=True)


def _calls(op: str, options: argparse.Namespace, *more: str) -> list[str]:
    layout = ["--channels-last"] if options.channels_last else []
    return [sys.executable, "-m", _MODULE, "calls", op, "--dtype", options.dtype, *layout, *more]


def _run_calls(options: argparse.Namespace) -> None:
    cases = chosen(options.op, options.dtype, options.channels_last)
    device: Device = EmulatedDevice() if options.emulated else CudaDevice()
    nvtx = None if options.emulated else device.xp.cuda.nvtx
    for case in cases:
        call_under_profiler(case.toy() if options.emulated else case, device, options.calls, nvtx)
        print(case)


def _run_ncu(options: argparse.Namespace) -> None:
    chosen(options.op, options.dtype, options.channels_last)
    options.out.mkdir(parents=True, exist_ok=True)
    name = options.op.replace("/", "-")
    options.raw, options.csv = options.out / f"{name}.ncu-raw.csv", options.out / f"{name}.ncu.csv"
    metrics = ",".join(metrics_of(options.op.split("/")[0]).values())
    # The range begins after the first call, which compiles and warms up.
    asked = ("--clock-control", "none", "--nvtx", "--nvtx-include", "profile/", "--metrics", metrics)
    _start("ncu", *asked, "--page", "raw", "--csv", "--log-file", str(options.raw), *_calls(options.op, options))
    _run_table(options)


def _run_nsys(options: argparse.Namespace) -> None:
    command, out = options.command, options.op
    if command is None:
        chosen(options.op, options.dtype, options.channels_last)
        command, out = _calls(options.op, options, "--calls", "10"), options.out or options.op.replace("/", "-")
    asked = ("--trace=cuda,nvtx", "--sample=none", "--cpuctxsw=none", "--force-overwrite=true", f"--output={out}")
    _start("nsys", "profile", *asked, *command, GPU_LAYERS_PROFILE_RANGES="1")
    _start("nsys", "stats", "--report", "cuda_gpu_kern_sum,nvtx_sum", f"{out}.nsys-rep")


def _run_table(options: argparse.Namespace) -> None:
    entries = read(options.raw)
    print(table(entries))
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(entries[0]))
            writer.writeheader()
            writer.writerows(entries)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="{ncu,nsys,calls,table}")
    for name, run, text in (
        ("ncu", _run_ncu, "hardware counters of each kernel, as a table and CSV"),
        ("nsys", _run_nsys, "a time line of an operation; OUT -- COMMAND: of any program"),
        ("calls", _run_calls, "a few calls of an operation, for a profiler to look at"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        command.add_argument(
            "op", metavar="OP", help="e.g. max_pool, batch_norm/backward, or headline: those that matter most"
        )
        if name != "calls":
            default, kind = (Path(), Path) if name == "ncu" else (None, str)
            command.add_argument("out", metavar="OUT", nargs="?", default=default, type=kind)
        command.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
        command.add_argument("--channels-last", action="store_true")
    calls = commands.choices["calls"]
    calls.add_argument("--calls", type=int, default=1)
    calls.add_argument("--emulated", action="store_true", help="toy sizes on the CPU")
    again = commands.add_parser("table", help="the table of a file that ncu wrote", allow_abbrev=False)
    again.set_defaults(run=_run_table)
    again.add_argument("raw", type=Path, metavar="RAW.csv", help="from ncu --page raw --csv")
    again.add_argument("--csv", type=Path, metavar="FILE")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns
    -------
    int
        0; 2 for an unknown operation, a file that is something else, without the tool or without a GPU; the tool's own
        status if it fails.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _parser()
    options = parser.parse_args(arguments[:end])
    options.command = arguments[end + 1 :] or None
    if options.command and options.run is not _run_nsys:
        parser.error("only nsys takes a command")
    try:
        options.run(options)
    except (ResultsError, RuntimeError) as error:
        print(f"{_MODULE}: error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
