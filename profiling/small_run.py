"""``python -m profiling.small_run``: every kernel on small arrays, under a sanitizer for example, or bit by bit.

Few of the verification's cases launch all of them. With ``--bits`` the results are compared with the reference's, and a
digest of each result's bits is written, so that those of two machines, or of a GPU and the emulator, can be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpu_layers.catalogue.case import Arrays, Case
from gpu_layers.core.cache import write_atomically
from gpu_layers.core.cuda import is_cupy_array
from gpu_layers.runtime.backend import use_backend, use_executor
from gpu_layers.runtime.kernel import Kernel, Parameter, all_kernels
from gpu_layers.runtime.limits import force_limits
from gpu_layers.verification import Backend, all_cases, cuda_backend, emulated_backend
from gpu_layers.verification.comparison import compare
from profiling.devices import environment
from profiling.results import ResultsError

_CASES_A_LINE = 25
_SECONDS_A_FILE = 3


def main(arguments: list[str] | None = None) -> int:
    """Launch, compare if asked to, and say how many kernels were launched.

    Returns
    -------
    int
        0; 1 if a case raised an error, or a result differs that must equal the reference to the last bit; 2 without a
        GPU, or if the file of another run is none.
    """
    parser = argparse.ArgumentParser(prog="python -m profiling.small_run", description=__doc__, allow_abbrev=False)
    parser.add_argument("--backend", choices=("cuda", "emulated"), default="cuda")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--bits", type=Path, metavar="FILE", help="compare bits with the reference's; write digests")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="compare with the digests of another run, on a GPU for example"
    )
    options = parser.parse_args(arguments)
    if options.against and not options.bits:
        parser.error("--against needs the bits of this run: --bits FILE")
    try:
        backend = cuda_backend() if options.backend == "cuda" else emulated_backend()
        known = _digests(options.against) if options.against else None
    except (ResultsError, RuntimeError) as error:
        print(f"profiling.small_run: error: {error}", file=sys.stderr)
        return 2
    if options.backend == "cuda" and not options.bits:
        _separate_allocations()
    cases, names = covering(case for case in all_cases() if options.only in str(case))
    entries: list[dict[str, Any]] = []
    failed, lost = _run(cases, backend, options.bits, entries)
    if not lost:
        never = sorted({kernel.name for kernel in all_kernels()} - names)
        for name in never:
            print(f"not launched: {name}")
    if options.bits:
        print(summary(entries))
        if known is not None:
            print(against(entries, known, options.against))
    wrong = sum(bool(entry["message"]) for entry in entries)
    compared = f", {len(entries)} results, {wrong} differ that must not" if options.bits else ""
    print(f"{len(cases)} cases launched {len(names)} kernels{compared}; {failed} cases raised an error")
    return 1 if wrong or failed or lost else 0


def _run(cases: list[Case], backend: Backend, path: Path | None, entries: list[dict[str, Any]]) -> tuple[int, bool]:
    """Run the cases; with a file, compare and write. How many raised an error, and whether the device was lost."""
    failed, written = 0, time.monotonic()
    facts = environment(gpu=backend.name == "cuda") if path else {}
    for number, case in enumerate(cases, 1):
        try:
            if path is None:
                _run_on(backend, case)
            else:
                entries += check(case, backend)
            lost = backend.is_lost()  # which waits for the case: an error is that of the case under way
        except Exception as error:  # whatever a case raises, the others are run
            failed += 1
            print(f"FAILED {case}: {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
            lost = backend.is_lost()
        last = lost or number == len(cases)
        if path and (last or time.monotonic() - written > _SECONDS_A_FILE):
            # Now and then, so that most of it is there even if the process is ended.
            content = {"environment": facts, "backend": backend.name, "results": entries}
            write_atomically(path, json.dumps(content, indent=1).encode())
            written = time.monotonic()
        if lost:
            print(f"STOPPED: the device stopped responding after case {case} ({number} of {len(cases)})")
            return failed, True
        if number % _CASES_A_LINE == 0:
            print(f"{number} of {len(cases)} cases", flush=True)
    return failed, False


def _run_on(backend: Backend, case: Case) -> Arrays:
    placed = {name: backend.place(array) for name, array in case.inputs().items()}
    with backend.activate():
        return case.run(placed)


def _separate_allocations() -> None:
    """One allocation of the driver for each array: within a pool's blocks no sanitizer sees where an array ends."""
    import cupy

    cupy.cuda.set_allocator(None)


# ---- Bit by bit ------------------------------------------------------------------------------------------------------


def check(case: Case, backend: Backend) -> list[dict[str, Any]]:
    """One entry a result of a case.

    Returns
    -------
    list of dict
        ``case``, ``op``, ``result``; ``must_be_equal``: to the reference, by the operation's definition;
        ``equals_reference``; ``digest``: of the bits; ``message``: where bits differ from the reference that must not.
    """
    inputs = case.inputs()
    with use_backend("reference"):
        reference = case.run(inputs)
        bounds = case.bounds(inputs, reference)
    results = _run_on(backend, case)
    entries = []
    for name, expected in reference.items():
        actual = results[name].get() if is_cupy_array(results[name]) else results[name]
        difference = compare(name, actual, expected, None)
        must, equal = bounds.get(name) is None, difference.ratio == 0
        entries.append(
            {
                "case": str(case),
                "op": case.op,
                "result": name,
                "must_be_equal": must,
                "equals_reference": equal,
                "digest": digest(actual),
                "message": difference.message if must and not equal else "",
            }
        )
    return entries


def digest(array: np.ndarray) -> str:
    """Of shape, dtype and bits, whatever the payload of NaN: results of two machines are equal if these are."""
    array = np.ascontiguousarray(array)
    if array.dtype.kind not in "iub":
        array = np.where(array != array, array.dtype.type("nan"), array)
    return hashlib.sha256(f"{array.shape} {array.dtype} ".encode() + array.tobytes()).hexdigest()[:32]


def _digests(path: Path) -> dict[tuple[str, str], str]:
    """The digests of another run, by case and result.

    Raises
    ------
    ResultsError
        If the file is none of this program's.
    """
    try:
        others = json.loads(path.read_text(encoding="utf-8"))["results"]
        return {(other["case"], other["result"]): other["digest"] for other in others}
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} holds no bits of profiling.small_run: {error!r}") from error


def against(entries: Iterable[dict[str, Any]], known: dict[tuple[str, str], str], path: Path) -> str:
    """A line each result whose bits are others in the file of another run, and how many are the same."""
    lines, same, alone = [], 0, 0
    for entry in entries:
        other = known.get((entry["case"], entry["result"]))
        alone += other is None
        same += other == entry["digest"]
        if other not in (None, entry["digest"]):
            lines.append(f"other bits: {entry['case']}: {entry['result']}")
    return "\n".join([*lines, f"{same} results have the bits of {path}, {len(lines)} others, {alone} not there"])


def summary(entries: Iterable[dict[str, Any]]) -> str:
    """A line an operation, and every result that had to be equal and is not."""
    entries = list(entries)
    lines = [f"{'operation':<24}{'results':>8}{'must equal the reference':>26}{'do':>6}"]
    for op in dict.fromkeys(entry["op"] for entry in entries):
        own = [entry for entry in entries if entry["op"] == op]
        must = [entry for entry in own if entry["must_be_equal"]]
        lines.append(f"{op:<24}{len(own):>8}{len(must):>26}{sum(entry['equals_reference'] for entry in must):>6}")
    lines += [f"WRONG {entry['case']}: {entry['message']}" for entry in entries if entry["message"]]
    return "\n".join(lines)


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
    """The same case, by the kernels for arrays that need more blocks than a GPU holds at once."""
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
