"""``python -m profiling.ncu_table RAW.csv``: the few numbers that matter, from Nsight Compute's CSV."""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from profiling.results import ResultsError

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


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write it as CSV; or print the metrics to ask for.

    Returns
    -------
    int
        0; 2 if the file is something else.
    """
    parser = argparse.ArgumentParser(prog="python -m profiling.ncu_table", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("raw", nargs="?", type=Path, metavar="RAW.csv", help="from ncu --page raw --csv")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--metrics", metavar="OP", help="print what to pass to ncu --metrics for an operation")
    options = parser.parse_args(arguments)
    if options.metrics:
        print(",".join(metrics_of(options.metrics).values()))
        return 0
    if options.raw is None:
        parser.error("RAW.csv or --metrics OP is needed")
    try:
        entries = read(options.raw)
    except ResultsError as error:
        print(f"profiling.ncu_table: error: {error}", file=sys.stderr)
        return 2
    print(table(entries))
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(entries[0]))
            writer.writeheader()
            writer.writerows(entries)
    return 0


if __name__ == "__main__":
    sys.exit(main())
