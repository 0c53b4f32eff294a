"""``make results``: the tables and the picture of performance, from the newest run in ``profiling/results``.

The README has seven rows and their picture; docs/performance.md has a row for each case. The READMEs also name the
layers of each family, from the catalogue.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

from gpu_layers.catalogue import FAMILIES
from profiling.charts import largest_rows, save_bars
from profiling.results import ResultsError, Row, Run

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- performance: written by make results -->"
END = "<!-- end of performance -->"
#: The README's rows: what most networks call, and one that is slow.
HEADLINES = (
    ("dropout", "forward"),
    ("relu_dropout", "backward"),
    ("batch_norm", "forward"),
    ("batch_norm", "backward"),
    ("max_pool", "forward"),
    ("avg_pool", "backward"),
    ("batch_norm_relu_max_pool", "backward"),
)
_PEERS = {"torch": "PyTorch", "torch.compile": "torch.compile", "jax": "JAX"}


def newest(results: Path) -> Run:
    """The measured run with the latest date.

    Raises
    ------
    ResultsError
        If there is none, or a ``bench.json`` there is no result, or one of another version.
    """
    runs = [Run.load(path) for path in sorted(results.glob("*/bench.json"))]
    measured = [run for run in runs if run.kind == "measured" and run.rows]
    if not measured:
        raise ResultsError(f"{results} holds no measured run: profiling/on_gpu.sh makes one")
    return max(measured, key=lambda run: str(run.environment.get("date")))


def section(results: Path, headlines: bool = False) -> str:
    """The text of a page's section: all rows, or the README's.

    Raises
    ------
    ResultsError
        If there is no result, or one cannot be read.
    """
    path = results / "modelled.json"
    return _measured(newest(results), Run.load(path) if path.exists() else None, headlines)


def _chosen(rows: list[Row], headlines: bool) -> list[Row]:
    rows = largest_rows(rows)
    if not headlines:
        return rows
    first = {(row.op, row.direction): row for row in reversed(rows)}
    return [first[key] for key in HEADLINES if key in first]


def _measured(run: Run, model: Run | None, headlines: bool) -> str:
    facts = run.environment
    modelled = {row.case: row.model["fraction"] for row in (model.rows if model else []) if row.model}
    rows = [row for row in run.rows if "ours" in row.timings]
    peers = [peer for peer in _PEERS if any(peer in row.timings for row in rows)]
    lines = [
        f"Measured on {facts.get('gpu')}: driver {facts.get('driver')}, CUDA {facts.get('cuda')}, "
        f"CuPy {facts.get('cupy')},",
        f"PyTorch {facts.get('torch')}, commit {facts.get('commit')}, {str(facts.get('date'))[:10]}. "
        f"A plain copy of a gigabyte reaches {run.copy_gb_per_s:,.0f} GB/s.",
        "",
        "*of copy* is the time of a plain copy of the fewest bytes over ours; 1.00 is perfect. *x PyTorch* is",
        "PyTorch's time over ours. The cache is cold; times are medians. *modelled* is what the model says.",
        "",
        "| | µs | of copy | modelled |" + "".join(f" x {_PEERS[peer]} |" for peer in peers),
        "|---|---|---|---|" + "---|" * len(peers),
    ]
    for row in _chosen(rows, headlines):
        fraction, predicted = row.ratio("copy"), modelled.get(row.case)
        cells = [_name(row), f"{row.timings['ours'].median:,.1f}", _number(fraction), _number(predicted)]
        lines.append(f"| {' | '.join(cells + [_number(row.ratio(peer)) for peer in peers])} |")
    failed = [row.case for row in run.rows if row.correct is False]
    if failed:
        lines += ["", f"Wrong, and therefore not timed: {', '.join(failed)}."]
    return "\n".join(lines)


def _name(row: Row) -> str:
    layout = ", channels last" if row.channels_last else ""
    return f"{row.op} {row.direction}, {'x'.join(map(str, row.shape))} {row.dtype}{layout}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def replaced(text: str, new: str) -> str:
    """A page's text with another section.

    Raises
    ------
    ResultsError
        If the two comments that stand around it are missing.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ResultsError(f"the page needs the lines {BEGIN} and {END}, once each, in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


_LAYERS = re.compile(r"^(\| [^`|]+ \| )(?:`\w+`(?:, )?)+( \| \[.*\]\(docs/(\w+)\.md\) \|)$", re.MULTILINE)


def with_layers(text: str) -> str:
    """A README with the layers of each family whose page a row links to."""

    def row(match: re.Match[str]) -> str:
        if match[3] == "networks":  # most of them have no kernels, and are not in the catalogue
            return match[0]
        names = [f"`{one.kind.__name__}`" for operation in FAMILIES[match[3]] for one in operation.layers]
        return f"{match[1]}{', '.join(names)}{match[2]}"

    return _LAYERS.sub(row, text)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the sections and the names of layers, and draw the picture.

    Returns
    -------
    int
        0; 2 if a result or a section cannot be read.
    """
    parser = argparse.ArgumentParser(prog="python -m profiling.readme_table", description=main.__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "profiling" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "figures" / "performance.svg")
    options = parser.parse_args(arguments)
    try:
        pages = {options.readme: section(options.results, headlines=True), options.page: section(options.results)}
        old = {page: page.read_text(encoding="utf-8") for page in pages}
        new = {page: with_layers(replaced(old[page], text)) for page, text in pages.items()}
        translation = options.readme.with_suffix(".zh-CN.md")
        if translation.exists():
            old[translation] = translation.read_text(encoding="utf-8")
            new[translation] = with_layers(old[translation])
        run = newest(options.results)
        save_bars(replace(run, rows=_chosen(run.rows, headlines=True)), options.picture)
    except (OSError, ResultsError) as error:
        print(f"profiling.readme_table: error: {error}", file=sys.stderr)
        return 2
    for page in new:
        if new[page] != old[page]:
            page.write_text(new[page], encoding="utf-8")
        print(f"{page}: {'as it was' if new[page] == old[page] else 'rewritten'}")
    print(f"{options.picture}: drawn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
