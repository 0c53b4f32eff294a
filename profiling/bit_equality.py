"""``python -m profiling.bit_equality``: a GPU's results against the reference's and the emulator's, bit by bit."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gpu_layers.runtime.backend import use_backend
from gpu_layers.runtime.cache import write_atomically
from gpu_layers.runtime.cuda import is_cupy_array
from gpu_layers.verification import Backend, Case, all_cases, cuda_backend, emulated_backend
from gpu_layers.verification.comparison import compare
from profiling.devices import environment
from profiling.results import ResultsError
from profiling.small_run import covering

_SECONDS_A_FILE = 3


def results_of(case: Case, backend: Backend) -> dict[str, np.ndarray]:
    """A case's results by a backend, as NumPy arrays."""
    placed = {name: backend.place(array) for name, array in case.inputs().items()}
    with backend.activate():
        return {name: value.get() if is_cupy_array(value) else value for name, value in case.run(placed).items()}


def check(case: Case, device: Backend, emulator: Backend | None) -> list[dict[str, Any]]:
    """One entry a result of a case.

    Returns
    -------
    list of dict
        ``case``, ``result``; ``must_be_equal``: to the reference, by the operation's definition; ``equals_reference``;
        ``equals_emulator``, None without one; ``digest``: of the bits; ``message``: where bits differ from the
        reference that must not.
    """
    inputs = case.inputs()
    with use_backend("reference"):
        reference = case.run(inputs)
        bounds = case.bounds(inputs, reference)
    actual = results_of(case, device)
    emulated = results_of(case, emulator) if emulator else None
    entries = []
    for name, expected in reference.items():
        difference = compare(name, actual[name], expected, None)
        must = bounds.get(name) is None
        equal = difference.ratio == 0
        entries.append(
            {
                "case": str(case),
                "op": case.op,
                "result": name,
                "must_be_equal": must,
                "equals_reference": equal,
                "equals_emulator": None
                if emulated is None
                else compare(name, actual[name], emulated[name], None).ratio == 0,
                "digest": digest(actual[name]),
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


def against(entries: Iterable[dict[str, Any]], path: Path) -> str:
    """A line each result whose bits are others in the file of another run, and how many are the same.

    Raises
    ------
    ResultsError
        If the file is none of this program's.
    """
    try:
        others = json.loads(path.read_text(encoding="utf-8"))
        known = {(other["case"], other["result"]): other["digest"] for other in others["results"]}
        name = others["backend"]
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} holds no results of profiling.bit_equality: {error!r}") from error
    lines, same, alone = [], 0, 0
    for entry in entries:
        other = known.get((entry["case"], entry["result"]))
        alone += other is None
        same += other == entry["digest"]
        if other not in (None, entry["digest"]):
            lines.append(f"other bits ({name}): {entry['case']}: {entry['result']}")
    return "\n".join(
        [*lines, f"{same} results have the bits of {path} ({name}), {len(lines)} others, {alone} not there"]
    )


def summary(entries: Iterable[dict[str, Any]]) -> str:
    """A line an operation, and every result that had to be equal and is not."""
    entries = list(entries)
    lines = [f"{'operation':<24}{'results':>8}{'must equal the reference':>26}{'do':>6}{'equal the emulator':>20}"]
    for op in dict.fromkeys(entry["op"] for entry in entries):
        own = [entry for entry in entries if entry["op"] == op]
        must = [entry for entry in own if entry["must_be_equal"]]
        emulated = [entry for entry in own if entry["equals_emulator"] is not None]
        same = f"{sum(e['equals_emulator'] for e in emulated)} of {len(emulated)}" if emulated else "not run"
        done = sum(entry["equals_reference"] for entry in must)
        lines.append(f"{op:<24}{len(own):>8}{len(must):>26}{done:>6}{same:>20}")
    lines += [f"WRONG {entry['case']}: {entry['message']}" for entry in entries if entry["message"]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compare, and print a table.

    Returns
    -------
    int
        0; 1 if a result that must equal the reference to the last bit does not, or a case raised an error; 2 without
        a GPU.
    """
    parser = argparse.ArgumentParser(prog="python -m profiling.bit_equality", description=__doc__, allow_abbrev=False)
    parser.add_argument("--backend", choices=("cuda", "emulated"), default="cuda", help="what is compared")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument(
        "--no-emulator", action="store_true", help="do not run the emulator too: it compiles for minutes"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result, with a digest of its bits")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="compare with the digests of another run, on a GPU for example"
    )
    options = parser.parse_args(arguments)
    try:
        device = cuda_backend() if options.backend == "cuda" else emulated_backend()
    except RuntimeError as error:
        print(f"profiling.bit_equality: error: {error}", file=sys.stderr)
        return 2
    cases, names = covering(case for case in all_cases() if options.only in str(case))
    emulator, reason = (None, "not asked for") if options.no_emulator else _emulator(cases)
    facts = environment(gpu=options.backend == "cuda")

    def write(entries: list[dict[str, Any]]) -> None:
        content = {"environment": facts, "backend": options.backend, "results": entries}
        write_atomically(options.json, json.dumps(content, indent=1).encode())

    entries: list[dict[str, Any]] = []
    failed, written = [], time.monotonic()
    for case in cases:
        try:
            entries += check(case, device, emulator)
        except Exception as error:  # whatever a case raises, the others are compared
            failed.append(f"FAILED {case}: {type(error).__name__}: {' '.join(str(error).split())}")
            print(failed[-1], flush=True)
            if device.is_lost():
                print(f"STOPPED: the device does no more work since the case {case}")
                break
        if options.json and time.monotonic() - written > _SECONDS_A_FILE:
            # So that most of it is there even if the process is ended.
            write(entries)
            written = time.monotonic()
    if options.json:
        write(entries)
    print(summary(entries))
    if options.against:
        try:
            print(against(entries, options.against))
        except ResultsError as error:
            print(f"profiling.bit_equality: error: {error}", file=sys.stderr)
            return 2
    if reason:
        print(f"The emulator did not run: {reason}")
    wrong = sum(bool(entry["message"]) for entry in entries)
    print(
        f"{len(cases)} cases, {len(names)} kernels, {len(entries)} results, {wrong} differ that must not, "
        f"{len(failed)} cases raised an error."
    )
    return 1 if wrong or failed else 0


def _emulator(cases: list[Case]) -> tuple[Backend | None, str]:
    """The emulator, or why there is none: it needs a C++ compiler."""
    emulator = emulated_backend()
    try:
        results_of(cases[0], emulator)
    except Exception as error:  # the GPU is compared with the reference in any case
        return None, " ".join(str(error).split())
    return emulator, ""


if __name__ == "__main__":
    sys.exit(main())
