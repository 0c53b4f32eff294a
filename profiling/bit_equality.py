"""``python -m profiling.bit_equality``: a GPU's results against the reference's and the emulator's, bit by bit."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gpu_layers.runtime.backend import use_backend
from gpu_layers.runtime.cuda import is_cupy_array
from gpu_layers.verification import Backend, Case, all_cases, cuda_backend, emulated_backend
from gpu_layers.verification.comparison import compare
from profiling.covering import covering
from profiling.environment import environment


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
        ``equals_emulator``, None without one; ``message``: where bits differ from the reference that must not.
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
                "message": difference.message if must and not equal else "",
            }
        )
    return entries


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
        0; 1 if a result that must equal the reference to the last bit does not; 2 without a GPU.
    """
    parser = argparse.ArgumentParser(prog="python -m profiling.bit_equality", description=__doc__, allow_abbrev=False)
    parser.add_argument("--backend", choices=("cuda", "emulated"), default="cuda", help="what is compared")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        device = cuda_backend() if options.backend == "cuda" else emulated_backend()
    except RuntimeError as error:
        print(f"profiling.bit_equality: error: {error}", file=sys.stderr)
        return 2
    cases, names = covering(case for case in all_cases() if options.only in str(case))
    emulator, reason = _emulator(cases)
    entries = [entry for case in cases for entry in check(case, device, emulator)]
    if options.json:
        facts = environment(gpu=options.backend == "cuda")
        options.json.write_text(
            json.dumps({"environment": facts, "backend": options.backend, "results": entries}, indent=1)
        )
    print(summary(entries))
    if reason:
        print(f"The emulator did not run: {reason}")
    wrong = sum(bool(entry["message"]) for entry in entries)
    print(f"{len(cases)} cases, {len(names)} kernels, {len(entries)} results, {wrong} differ that must not.")
    return 1 if wrong else 0


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
