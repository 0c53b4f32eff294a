"""``python -m profiling.bench``: every operation against PyTorch, JAX, CuPy's expressions, and a plain copy."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpu_layers.catalogue import HEADLINE, OPERATIONS
from gpu_layers.catalogue.case import Arrays
from gpu_layers.verification.selection import named_like
from profiling.cases import DTYPES, Case, InputMaker, all_cases, in_rounds, selected
from profiling.charts import save_charts
from profiling.devices import CudaDevice, Device, EmulatedDevice, environment
from profiling.implementations import (
    COMPILED,
    JAX,
    PEERS,
    Copy,
    Implementation,
    NotThereError,
    Ours,
    Part,
    bytes_of_a_call,
    error_ratio,
    expected,
    parts,
    roughly_equal,
)
from profiling.results import ResultsError, Row, Run, compare, table
from profiling.timing import Progress, Subject, measure

# ---- Cases: inputs, check, timings; one row each, whatever goes wrong ------------------------------------------------


# Launches wait in a queue of some thousand; an array expression may take ten of them.
_MOST_CALLS = 32
_COLD = 4
# A piece of a case, and its results by name.
_Reference = tuple[Part, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Effort:
    """How much time goes into a case.

    Attributes
    ----------
    samples : int
        Of each implementation, at most.
    seconds : float
        For the samples of all implementations.
    """

    samples: int = 40
    seconds: float = 1.0


class DeviceLostError(RuntimeError):
    """The device does no more work; says from which case on.

    Attributes
    ----------
    row : Row
        Of that case.
    """

    def __init__(self, row: Row) -> None:
        super().__init__(f"the device stopped responding after case {row.case}")
        self.row = row


class Runner:
    """Runs cases on a device.

    Parameters
    ----------
    device : Device
    peers : sequence of Implementation classes
        What to time beside ours.
    effort : Effort
    block : int, optional
        Random numbers to draw.
    """

    def __init__(
        self,
        device: Device,
        peers: Sequence[type[Implementation]] = PEERS,
        effort: Effort | None = None,
        block: int | None = None,
    ) -> None:
        self._device, self._peers = device, peers
        self._effort = effort or Effort()
        self._maker = InputMaker(device) if block is None else InputMaker(device, block)

    def run(self, case: Case, skip: Callable[[type[Implementation]], str | None] = lambda peer: None) -> Row:
        """One row. What a peer cannot do, or an array that does not fit, is a note, not an end.

        Parameters
        ----------
        case : Case
        skip : callable
            The reason why a peer is left out of this case, or None.

        Raises
        ------
        DeviceLostError
            If the device does no more work after it.
        """
        buffers = self._buffers(case)
        self._device.release()
        try:
            fitting = case.fitting(int(0.9 * self._device.free_bytes()), buffers)
        except ValueError as error:
            return Row.of(case, notes=[f"not run: {error}"])
        row = Row.of(fitting)
        if fitting.asked:
            row.notes.append(f"reduced from {'x'.join(map(str, fitting.asked))}: too little memory")
        with self._device.activate():
            try:
                self._fill(row, fitting, buffers, skip)
            except Exception as error:  # an error of ours is a result too: the row says which
                row.correct = False
                row.notes.append(f"failed: {_short(error)}")
                if self._device.is_lost():
                    raise DeviceLostError(row) from error
        self._device.release()
        return row

    def _buffers(self, case: Case) -> int:
        """Sets of inputs, so many that the cache holds nothing of one when its turn comes again."""
        return max(2, -(-_COLD * self._device.l2_bytes // bytes_of_a_call(case)) + 1)

    def _fill(self, row: Row, case: Case, buffers: int, skip: Callable[[type[Implementation]], str | None]) -> None:
        inputs = [self._maker.inputs(case) for _ in range(buffers)]
        ours = Ours(case, self._device)
        references = [(part, expected(case, part, inputs[-1], ours.to_numpy)) for part in parts(case)]
        row.error = self._error(case, ours, inputs[-1], references)
        row.correct = row.error <= 1
        if not row.correct:
            row.notes.append(f"WRONG: {row.error:.3g} times the error that rounding allows; not timed")
            return
        subjects = [_subject(ours, inputs)]
        for peer in self._peers:
            reason = skip(peer)
            if reason is None:
                try:
                    subjects.append(self._peer(row, case, peer, inputs, references[0]))
                    continue
                except NotThereError as error:
                    reason = str(error)
                except Exception as error:  # whatever another library raises, the others are timed
                    reason = _short(error)
            row.missing[peer.name] = reason
        row.timings = measure(
            subjects,
            self._device.timer,
            buffers=buffers,
            calls=min(buffers, _MOST_CALLS),
            samples=self._effort.samples,
            seconds=self._effort.seconds,
        )
        row.notes += [
            f"{name}: the host was not ahead of the device" for name, timing in row.timings.items() if not timing.steady
        ]

    def _peer(
        self, row: Row, case: Case, peer: type[Implementation], inputs: list[Arrays], reference: _Reference
    ) -> Subject:
        implementation = peer(case, self._device)
        if not (case.operation.is_random or peer is Copy) and not _agrees(case, implementation, inputs[-1], reference):
            row.notes.append(f"{peer.name} gives other results")
        return _subject(implementation, inputs)

    def _error(self, case: Case, ours: Ours, inputs: Arrays, references: list[_Reference]) -> float:
        self._poison(case)
        results = ours.results(ours.prepare(inputs)())
        worst = 0.0
        for part, reference in references:
            for name, values in reference.items():
                actual = ours.to_numpy(part.take_result(name, results[name]))
                worst = max(worst, error_ratio(case, name, actual, values))
        return worst

    def _poison(self, case: Case) -> None:
        """Leave NaN in the memory that results are likely to get, so that an element that is never written is seen."""
        xp = self._device.xp
        count = -(-max(case.sizes.inputs, case.sizes.outputs) * case.sizes.itemsize // 4)
        arrays = [xp.full(count, float("nan"), "float32") for _ in range(2)]
        del arrays


def _agrees(case: Case, implementation: Implementation, inputs: Arrays, reference: _Reference) -> bool:
    results = implementation.results(implementation.prepare(inputs)())
    part, values = reference
    name = next(iter(values))
    return roughly_equal(case, implementation.to_numpy(part.take(results[name])), values[name])


def _subject(implementation: Implementation, inputs: list[Arrays]) -> Subject:
    calls = [implementation.prepare(arrays) for arrays in inputs]
    return Subject(implementation.name, lambda i: calls[i](), implementation.wait)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def copy_bandwidth(device: Device, size: int, effort: Effort) -> float:
    """GB/s, bytes read and written, of a large copy from device to device."""
    maker = InputMaker(device, block=min(size // 4, 2**24))
    sources = [maker.numbers((size // 4,), "float32") for _ in range(2)]
    pairs = [(device.xp.empty_like(source), source) for source in sources]
    subject = Subject("copy", lambda i: device.copy(*pairs[i]))
    timing = measure(
        [subject], device.timer, buffers=len(pairs), calls=4, samples=effort.samples, seconds=effort.seconds
    )["copy"]
    return 2 * size / timing.median / 1e3


# ---- The command -----------------------------------------------------------------------------------------------------


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
