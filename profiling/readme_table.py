"""``make results``: the README's section on performance, from the newest run in ``profiling/results``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from profiling.charts import largest_rows
from profiling.results import ResultsError, Row, Run

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- performance: written by make results -->"
END = "<!-- end of performance -->"
_MODEL = "modelled.json"
_PEERS = {"torch": "PyTorch", "torch.compile": "torch.compile", "jax": "JAX"}


def newest(results: Path) -> Run | None:
    """The measured run with the latest date; None if there is none.

    Raises
    ------
    ResultsError
        If a ``bench.json`` there is no result, or one of another version.
    """
    runs = [Run.load(path) for path in sorted(results.glob("*/bench.json"))]
    measured = [run for run in runs if run.kind == "measured" and run.rows]
    return max(measured, key=lambda run: str(run.environment.get("date")), default=None)


def section(results: Path) -> str:
    """The section's text.

    Raises
    ------
    ResultsError
        If there is no result, or one cannot be read.
    """
    path = results / _MODEL
    model = Run.load(path) if path.exists() else None
    run = newest(results)
    if run is not None:
        return _measured(run, model)
    if model is None:
        raise ResultsError(
            f"{results} holds no measured run and no {_MODEL}: run python -m profiling.model --json {path}"
        )
    return _modelled(model)


def _measured(run: Run, model: Run | None) -> str:
    facts = run.environment
    modelled = {row.case: row.model["fraction"] for row in (model.rows if model else []) if row.model}
    rows = [row for row in run.rows if "ours" in row.timings]
    peers = [peer for peer in _PEERS if any(peer in row.timings for row in rows)]
    lines = [
        f"Measured on {facts.get('gpu')}: driver {facts.get('driver')}, CUDA {facts.get('cuda')}, "
        f"CuPy {facts.get('cupy')}, PyTorch {facts.get('torch')}, commit {facts.get('commit')}, "
        f"{str(facts.get('date'))[:10]}. A plain copy of a gigabyte reaches {run.copy_gb_per_s:,.0f} GB/s.",
        "",
        "*of copy* is the least number of bytes over the time, as a part of that rate; *x PyTorch* is PyTorch's time",
        "over ours. The cache is cold, times are medians. *modelled* is what was predicted without a GPU.",
        "",
        "| | µs | of copy | modelled |" + "".join(f" x {_PEERS[peer]} |" for peer in peers),
        "|---|---|---|---|" + "---|" * len(peers),
    ]
    for row in largest_rows(rows):
        fraction, predicted = row.fraction(run.copy_gb_per_s), modelled.get(row.case)
        cells = [_name(row), f"{row.timings['ours'].median:,.1f}", _number(fraction), _number(predicted)]
        lines.append(f"| {' | '.join(cells + [_number(row.ratio(peer)) for peer in peers])} |")
    failed = [row.case for row in run.rows if row.correct is False]
    if failed:
        lines += ["", f"Wrong, and therefore not timed: {', '.join(failed)}."]
    return "\n".join(lines)


def _modelled(model: Run) -> str:
    rows = largest_rows(model.rows)
    gpu = rows[0].model["gpu"] if rows[0].model else "GPU"
    lines = [
        f"The kernels are **not measured on a GPU yet**. What follows is *modelled* for an {gpu}. *of copy* is the",
        "speed as a part of a plain copy's of the fewest bytes (1.00 is perfect), from bytes, instructions and waits",
        "that are counted by emulation; *limit* is what the call's longest launch needs most of; *moved* is bytes over",
        "the fewest.",
        "Of PyTorch's kernels only the bytes are known, by their algorithm: the most that they can reach.",
        "",
        "| modelled, not measured | of copy | limit | moved | PyTorch: of copy, at most | launches |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        assert row.model is not None
        cells = [_name(row), f"{row.model['fraction']:.2f}", row.model["limit"]]
        cells += [f"{row.model['bytes'] / row.floor_bytes:.2f}", f"{min(1.0, row.floor_bytes / row.torch_bytes):.2f}"]
        lines.append(f"| {' | '.join(cells)} | {len(row.model['launches'])} |")
    return "\n".join(lines)


def _name(row: Row) -> str:
    layout = ", channels last" if row.channels_last else ""
    return f"{row.op} {row.direction}, {'x'.join(map(str, row.shape))} {row.dtype}{layout}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def replaced(text: str, new: str) -> str:
    """The README's text with another section.

    Raises
    ------
    ResultsError
        If the two comments that stand around it are missing.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ResultsError(f"README.md needs the lines {BEGIN} and {END}, once each, in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the section.

    Returns
    -------
    int
        0; 2 if a result or the section cannot be read.
    """
    parser = argparse.ArgumentParser(prog="python -m profiling.readme_table", description=main.__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "profiling" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    try:
        old = options.readme.read_text(encoding="utf-8")
        new = replaced(old, section(options.results))
    except (OSError, ResultsError) as error:
        print(f"profiling.readme_table: error: {error}", file=sys.stderr)
        return 2
    if new != old:
        options.readme.write_text(new, encoding="utf-8")
    print(f"{options.readme}: {'as it was' if new == old else 'rewritten'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
