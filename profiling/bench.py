"""``python -m profiling.bench``: every operation against PyTorch, JAX, CuPy's expressions, and a plain copy."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gpu_layers.catalogue import HEADLINE, OPERATIONS
from gpu_layers.verification.selection import named_like
from profiling.cases import DTYPES, Case, all_cases, in_rounds, selected
from profiling.charts import save_charts
from profiling.devices import CudaDevice, Device, EmulatedDevice, environment
from profiling.implementations import COMPILED, JAX, PEERS, Implementation
from profiling.results import ResultsError, Run, compare, table
from profiling.runner import DeviceLostError, Effort, Runner, copy_bandwidth
from profiling.timing import Progress

_COPY_BYTES = 2**30
_QUICK = Effort(samples=20, seconds=0.4)
_TOY = Effort(samples=3, seconds=0.05)
_TOY_BLOCK = 2**16


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="python -m profiling.bench", description=__doc__, allow_abbrev=False)
    options.add_argument("--quick", action="store_true", help="two shapes of each operation, bfloat16 and float32")
    options.add_argument("--first", action="store_true", help="only the first shape of each operation")
    options.add_argument("--headline", action="store_true", help="only the operations that matter most")
    options.add_argument("--only", metavar="REGEX", help="cases whose name this finds, e.g. 'max_pool.*bfloat16'")
    options.add_argument(
        "--peers", metavar="REGEX", help=f"of {', '.join(peer.name for peer in PEERS)}; all if not given"
    )
    options.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), help="default: bfloat16 float32 float16")
    options.add_argument("--budget", type=_seconds, metavar="SECONDS", help="begin no case later than this")
    options.add_argument("--json", type=Path, metavar="FILE", help="write every number; kept up to date while running")
    options.add_argument(
        "--resume", action="store_true", help="go on with the run in the JSON file: leave out what it has"
    )
    options.add_argument("--csv", type=Path, metavar="FILE", help="write the table; kept up to date too")
    options.add_argument("--plot", type=Path, metavar="FOLDER", help="draw bars.png and roofline.png there")
    options.add_argument("--compare", type=Path, metavar="OLD.json", help="say what became faster or slower since")
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
        0; 1 if a result was wrong, or the GPU does no more work; 2 for bad usage, bad files, or no GPU.
    """
    options = parser().parse_args(arguments)
    try:
        if options.resume and not options.json:
            raise ValueError("--resume needs the file of the run to go on with: --json FILE")
        cases, peers = _cases(options), _peers(options.peers)
        if options.list:
            print("\n".join(map(str, cases)))
            return 0
        old = Run.load(options.compare) if options.compare else None
        device: Device = EmulatedDevice() if options.emulated else CudaDevice()
        run = _begun(options, device)
    except (ValueError, RuntimeError) as error:
        print(f"profiling.bench: error: {error}", file=sys.stderr)
        return 2
    lost = _measure(options, run, device, cases, peers)
    _write(options, run)
    if options.plot:
        save_charts(run, options.plot)
    print(table(run))
    if lost is not None:
        print(f"STOPPED: {lost}")
    if old is not None:
        try:
            print(f"\n{compare(old, run)}")
        except ResultsError as error:
            print(f"profiling.bench: error: {error}", file=sys.stderr)
            return 2
    return 1 if lost is not None or any(row.correct is False for row in run.rows) else 0


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {text}")
    return value


def _cases(options: argparse.Namespace) -> list[Case]:
    dtypes = options.dtypes or (("bfloat16", "float32") if options.quick else ("bfloat16", "float32", "float16"))
    every = list(all_cases(HEADLINE if options.headline else OPERATIONS, dtypes, options.quick))
    if options.first:
        every = [case for case in every if case.shape == case.operation.shapes[0]]
    cases = in_rounds(selected(every, options.only), HEADLINE)
    if options.emulated:
        cases = list({str(case.toy()): case.toy() for case in cases}.values())
    return cases


def _peers(only: str | None) -> list[type[Implementation]]:
    hint = f": there are {', '.join(peer.name for peer in PEERS)}"
    return named_like(PEERS, only, "peer", lambda peer: peer.name, hint)


def _left_out(options: argparse.Namespace, case: Case) -> Callable[[type[Implementation]], str | None]:
    """Peers that nobody asked for and that compile for seconds are left out of most of a quick run."""
    first = case.shape == case.operation.shapes[0] and not case.channels_last

    def reason(peer: type[Implementation]) -> str | None:
        slow = options.quick and not options.peers and peer.name in (COMPILED, JAX) and not first
        return "left out of a quick run" if slow else None

    return reason


def _begun(options: argparse.Namespace, device: Device) -> Run:
    """A new run, or the one to go on with.

    Raises
    ------
    ResultsError
        If the file holds none, or one of another device or other kernels.
    """
    facts = environment(gpu=not options.emulated)
    if not (options.resume and options.json.exists()):
        return Run(device.kind, facts)
    run = Run.load(options.json)
    for what, then, now in (
        ("kind", run.kind, device.kind),
        *((name, run.environment.get(name), facts.get(name)) for name in ("gpu", "sources", "commit")),
    ):
        if then != now:
            raise ResultsError(
                f"{options.json} has another {what} ({then}) than this run ({now}): it cannot be resumed"
            )
    return run


def _measure(
    options: argparse.Namespace, run: Run, device: Device, cases: list[Case], peers: list[type[Implementation]]
) -> DeviceLostError | None:
    """Add rows to a run; the reason if the device does no more work."""
    effort = _TOY if options.emulated else _QUICK if options.quick else Effort()
    runner = Runner(device, peers, effort, _TOY_BLOCK if options.emulated else None)
    begin = time.monotonic()
    if run.copy_gb_per_s is None:
        size = _TOY_BLOCK if options.emulated else min(_COPY_BYTES, device.free_bytes() // 8)
        run.copy_gb_per_s = copy_bandwidth(device, size, effort)
    cases = [case for case in cases if not _is_there(run, case, peers)]
    run.left_off = []
    lost = None
    progress = Progress(len(cases), sys.stderr)
    for number, case in enumerate(cases):
        if lost is not None or (options.budget is not None and time.monotonic() - begin > options.budget):
            run.left_off = [str(left) for left in cases[number:]]
            break
        progress.show(number, str(case))
        try:
            run.put(runner.run(case, _left_out(options, case)))
        except DeviceLostError as error:
            lost = error
            run.put(error.row)
        _write(options, run)
    progress.end()
    return lost


def _is_there(run: Run, case: Case, peers: list[type[Implementation]]) -> bool:
    """Whether a run has a case, and all that it is to be compared with."""
    found = [row for row in run.rows if row.case == str(case)]
    return any(
        row.correct is False or row.timings.keys() | row.missing.keys() >= {"ours", *(peer.name for peer in peers)}
        for row in found
    )


def _write(options: argparse.Namespace, run: Run) -> None:
    if options.json:
        run.save(options.json)
    if options.csv:
        run.save_csv(options.csv, [peer.name for peer in PEERS])


if __name__ == "__main__":
    sys.exit(main())
