"""``python -m profiling.bench``: every operation against PyTorch, JAX, CuPy's expressions, and a plain copy."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from profiling.cases import DTYPES, Case, all_cases, selected
from profiling.charts import save_charts
from profiling.comparison import compare
from profiling.devices import CudaDevice, Device, EmulatedDevice
from profiling.environment import environment
from profiling.implementations import COMPILED, JAX, PEERS, Implementation
from profiling.operations import OPERATIONS
from profiling.overhead import measure_overhead, overhead_table
from profiling.progress import Progress
from profiling.results import ResultsError, Run
from profiling.runner import Effort, Runner, copy_bandwidth
from profiling.table import table

_COPY_BYTES = 2**30
_QUICK = Effort(samples=20, seconds=0.4)
_TOY = Effort(samples=3, seconds=0.05)
_TOY_BLOCK = 2**16
_CALLS, _TOY_CALLS = 300, 20


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="python -m profiling.bench", description=__doc__, allow_abbrev=False)
    options.add_argument("--quick", action="store_true", help="two shapes of each operation, bfloat16 and float32")
    options.add_argument("--only", metavar="REGEX", help="cases whose name this finds, e.g. 'max_pool.*bfloat16'")
    options.add_argument(
        "--peers", metavar="REGEX", help=f"of {', '.join(peer.name for peer in PEERS)}; all if not given"
    )
    options.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), help="default: bfloat16 float32 float16")
    options.add_argument("--budget", type=_seconds, metavar="SECONDS", help="begin no case later than this")
    options.add_argument("--json", type=Path, metavar="FILE", help="write every number; kept up to date while running")
    options.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    options.add_argument("--plot", type=Path, metavar="FOLDER", help="draw bars.png and roofline.png there")
    options.add_argument("--compare", type=Path, metavar="OLD.json", help="say what became faster or slower since")
    options.add_argument("--no-overhead", action="store_true", help="do not time launches of tiny arrays")
    options.add_argument("--list", action="store_true", help="print the names of the cases, and end")
    options.add_argument(
        "--emulated", action="store_true", help="toy sizes on the CPU, to test the benchmark: never times of a GPU"
    )
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print the table.

    Returns
    -------
    int
        0; 1 if a result was wrong; 2 for bad usage, bad files, or no GPU.
    """
    options = parser().parse_args(arguments)
    try:
        cases, peers = _cases(options), _peers(options.peers)
        if options.list:
            print("\n".join(map(str, cases)))
            return 0
        old = Run.load(options.compare) if options.compare else None
        device: Device = EmulatedDevice() if options.emulated else CudaDevice()
    except (ValueError, RuntimeError) as error:
        print(f"profiling.bench: error: {error}", file=sys.stderr)
        return 2
    run = _measured(options, device, cases, peers)
    _write(options, run)
    print(table(run))
    if run.overhead:
        print(f"\n{overhead_table(run.overhead)}")
    if old is not None:
        try:
            print(f"\n{compare(old, run)}")
        except ResultsError as error:
            print(f"profiling.bench: error: {error}", file=sys.stderr)
            return 2
    return 1 if any(row.correct is False for row in run.rows) else 0


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {text}")
    return value


def _cases(options: argparse.Namespace) -> list[Case]:
    dtypes = options.dtypes or (("bfloat16", "float32") if options.quick else ("bfloat16", "float32", "float16"))
    cases = selected(all_cases(OPERATIONS, dtypes, options.quick), options.only)
    if options.emulated:
        cases = list({str(case.toy()): case.toy() for case in cases}.values())
    return cases


def _peers(only: str | None) -> list[type[Implementation]]:
    try:
        found = [peer for peer in PEERS if re.search(only or "", peer.name)]
    except re.error as error:
        raise ValueError(f"{only!r} is not a regular expression: {error}") from error
    if not found:
        raise ValueError(f"no peer is named like {only!r}: there are {', '.join(peer.name for peer in PEERS)}")
    return found


def _left_out(options: argparse.Namespace, case: Case) -> Callable[[type[Implementation]], str | None]:
    """Peers that compile for seconds are left out of a quick run, but for the cases that tell most."""
    first = case.shape == case.operation.shapes[0] and not case.channels_last

    def reason(peer: type[Implementation]) -> str | None:
        slow = options.quick and peer.name in (COMPILED, JAX) and not first
        return "left out of a quick run" if slow else None

    return reason


def _measured(options: argparse.Namespace, device: Device, cases: list[Case], peers: list[type[Implementation]]) -> Run:
    effort = _TOY if options.emulated else _QUICK if options.quick else Effort()
    runner = Runner(device, peers, effort, _TOY_BLOCK if options.emulated else None)
    run = Run(device.kind, environment(gpu=not options.emulated))
    begin = time.monotonic()
    size = _TOY_BLOCK if options.emulated else min(_COPY_BYTES, device.free_bytes() // 8)
    run.copy_gb_per_s = copy_bandwidth(device, size, effort)
    if not options.no_overhead:
        run.overhead = measure_overhead(device, _TOY_CALLS if options.emulated else _CALLS)
    progress = Progress(len(cases), sys.stderr)
    for number, case in enumerate(cases):
        if options.budget is not None and time.monotonic() - begin > options.budget:
            run.left_off = [str(left) for left in cases[number:]]
            break
        progress.show(number, str(case))
        run.rows.append(runner.run(case, _left_out(options, case)))
        if options.json:
            run.save(options.json)
    progress.end()
    return run


def _write(options: argparse.Namespace, run: Run) -> None:
    if options.json:
        run.save(options.json)
    if options.csv:
        run.save_csv(options.csv, [peer.name for peer in PEERS])
    if options.plot:
        save_charts(run, options.plot)


if __name__ == "__main__":
    sys.exit(main())
