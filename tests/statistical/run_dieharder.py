"""Pipes the raw Philox stream into dieharder, and summarises its report.

    apt-get install dieharder
    python -m tests.statistical.run_dieharder --order element --tests 0 2 15 100

dieharder reads 32-bit words from a pipe, as many as its tests ask for. Exit status 1 if one test failed.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np

from tests.statistical.streams import ORDERS, words

# Some minutes together: birthdays, matrix ranks, counts of ones, runs, and the bit tests of NIST's suite.
DEFAULT_TESTS = (0, 2, 3, 8, 9, 10, 11, 12, 13, 15, 16, 100, 101, 102, 202, 203, 205, 206)
_LINE = re.compile(
    r"^\s*(?P<name>\w+)\|\s*(?P<ntuple>\d+)\|\s*(?P<samples>\d+)\|\s*\d+\|\s*(?P<p>[\d.]+)\|\s*(?P<verdict>\w+)"
)


def run(test: int, order: str, seed: int) -> list[tuple[str, float, str]]:
    """Name, p-value and verdict of each line of dieharder's report on one test."""
    command = ["dieharder", "-g", "200", "-d", str(test)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # once it has read enough
            for chunk in words(order, seed):
                process.stdin.write(chunk.astype("<u4").tobytes())
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        report = process.stdout.read().decode()
    found = [match for match in map(_LINE.match, report.splitlines()) if match]
    if process.returncode != 0 or not found:
        raise RuntimeError(f"dieharder -d {test} ended with status {process.returncode} and no verdict:\n{report}")
    return [(f"{m['name']} {m['ntuple']}", float(m["p"]), m["verdict"]) for m in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", choices=ORDERS, default="element", help="what neighbouring words differ in")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tests", type=int, nargs="+", default=DEFAULT_TESTS, help="as dieharder -l lists them")
    arguments = parser.parse_args()
    if shutil.which("dieharder") is None:
        parser.error("dieharder was not found: apt-get install dieharder")
    results = []
    for test in arguments.tests:
        for name, p, verdict in run(test, arguments.order, arguments.seed):
            print(f"{name:<28}p = {p:.6f}  {verdict}", flush=True)
            results.append((p, verdict))
    verdicts = Counter(verdict for _, verdict in results)
    extremes = np.array([p for p, _ in results])
    print(
        f"order {arguments.order}, seed {arguments.seed}: {len(results)} results: "
        + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
        + f"; p from {extremes.min():.4f} to {extremes.max():.4f}"
    )
    return 1 if verdicts["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
