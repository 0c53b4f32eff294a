"""``python -m profiling.charts BENCH.json FOLDER``: two pictures of a run, bars against the peers and a roofline."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from profiling.implementations import COMPILED, CUPY, JAX, TORCH
from profiling.results import ResultsError, Row, Run

# Colours that differ for colour-blind readers too (Okabe and Ito).
COLOURS = {"ours": "#0072B2", TORCH: "#E69F00", COMPILED: "#D55E00", JAX: "#009E73", CUPY: "#999999"}
_LABELS = {"ours": "gpu_layers", TORCH: "PyTorch", COMPILED: "torch.compile", JAX: "JAX (host's clock)", CUPY: "CuPy"}
_MARKERS = {"bfloat16": "o", "float32": "s", "float16": "^", "float64": "D"}
_TARGET = 0.9


def save_charts(run: Run, folder: Path | str) -> list[Path]:
    """Draw ``bars.png`` and ``roofline.png``.

    Returns
    -------
    list of Path
        What was drawn; nothing for a run without timings.

    Raises
    ------
    RuntimeError
        Without matplotlib.
    """
    rows = [row for row in run.rows if "ours" in row.timings]
    if not rows:
        return []
    pyplot, paths = load_pyplot(), [Path(folder) / "bars.png", Path(folder) / "roofline.png"]
    for path, draw in zip(paths, (_bars, _roofline), strict=True):
        save_figure(draw(pyplot, run, rows), path)
    return paths


def save_bars(run: Run, path: Path) -> None:
    """Draw how much of a copy's rate each implementation reaches.

    Raises
    ------
    RuntimeError
        Without matplotlib.
    """
    save_figure(_bars(load_pyplot(), run, [row for row in run.rows if "ours" in row.timings]), path)


def save_figure(figure: Any, path: Path | str) -> None:
    """Write a figure, in a folder that is made if need be; an SVG has the same bytes each time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pyplot = load_pyplot()
    with pyplot.rc_context({"svg.hashsalt": "gpu_layers", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def load_pyplot() -> Any:
    """matplotlib's, drawing to files; RuntimeError without it."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError(f"charts need matplotlib ({error}): pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def _where(run: Run) -> str:
    if run.kind == "measured":
        facts = run.environment
        return f"{facts.get('gpu')}, PyTorch {facts.get('torch')}, commit {facts.get('commit')}"
    return f"{run.kind.upper()}: not times of a GPU"


def _bars(pyplot: Any, run: Run, rows: list[Row]) -> Any:
    """The largest shape of each operation and pass: how much of the copy's rate each implementation reaches."""
    chosen = largest_rows(rows)
    names = [name for name in COLOURS if any(name in row.timings for row in chosen)]
    columns = 2 if len(chosen) > 8 else 1
    half = -(-len(chosen) // columns)
    figure, axes = pyplot.subplots(
        1, columns, figsize=(7.5 * columns, 1.2 + 0.62 * half), squeeze=False, sharex=True, layout="constrained"
    )
    copy = run.copy_gb_per_s or 1.0
    for number, axis in enumerate(axes[0]):
        part = chosen[number * half : (number + 1) * half]
        height = 0.8 / len(names)
        for place, name in enumerate(names):
            values = [(row.rate(name) or 0.0) / copy for row in part]
            positions = [index + (place - (len(names) - 1) / 2) * height for index in range(len(part))]
            bars = axis.barh(positions, values, height, color=COLOURS[name], label=_LABELS[name])
            if name == "ours":
                axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=7)
        axis.set_yticks(range(len(part)), [row_label(row) for row in part], fontsize=8)
        axis.invert_yaxis()
        axis.axvline(1.0, color="black", linewidth=1)
        axis.set_xlim(0, 1.15 * max(1.0, *((row.rate(name) or 0.0) / copy for row in chosen for name in names)))
        axis.set_xlabel("floor bytes a second, as a part of a plain copy's (line: 1)")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"How close to the memory's speed: longer is faster\n{_where(run)}", fontsize=11)
    return figure


def row_label(row: Row) -> str:
    """A case on two lines."""
    layout = ", channels last" if row.channels_last else ""
    return f"{row.op} {row.direction}\n{'x'.join(map(str, row.shape))} {row.dtype}{layout}"


def largest_rows(rows: list[Row]) -> list[Row]:
    """Of each operation, pass, dtype and layout the row with most bytes; the dtype that most rows have."""
    dtypes = [row.dtype for row in rows]
    dtype = max(dict.fromkeys(dtypes), key=dtypes.count, default=None)
    best: dict[tuple, Row] = {}
    for row in rows:
        key = (row.op, row.direction, row.channels_last)
        if row.dtype == dtype and (key not in best or row.floor_bytes > best[key].floor_bytes):
            best[key] = row
    return list(best.values())


def _roofline(pyplot: Any, run: Run, rows: list[Row]) -> Any:
    """Time against floor bytes: the line is what a plain copy of as many bytes would take."""
    figure, axis = pyplot.subplots(figsize=(8.5, 5.5), layout="constrained")
    operations = list(dict.fromkeys(row.op for row in rows))
    colours = pyplot.get_cmap("tab10" if len(operations) <= 10 else "tab20").colors
    for number, operation in enumerate(operations):
        colour = colours[number % len(colours)]
        axis.scatter([], [], color=colour, label=operation)
        for dtype, marker in _MARKERS.items():
            points = [row for row in rows if row.op == operation and row.dtype == dtype]
            sizes, rates = [row.floor_bytes / 1e6 for row in points], [row.gb_per_s or 0.0 for row in points]
            axis.scatter(sizes, rates, s=30, marker=marker, color=colour, alpha=0.8)
    for dtype, marker in _MARKERS.items():
        if any(row.dtype == dtype for row in rows):
            axis.scatter([], [], marker=marker, color="0.5", label=dtype)
    copies = {row.floor_bytes: row.rate("copy") or 0.0 for row in rows if "copy" in row.timings}
    if copies:
        axis.plot(
            [size / 1e6 for size in sorted(copies)],
            [copies[size] for size in sorted(copies)],
            color="0.6",
            linewidth=1,
            label="a copy of as many bytes",
        )
    if run.copy_gb_per_s:
        axis.axhline(run.copy_gb_per_s, color="black", linewidth=1, label=f"large copy: {run.copy_gb_per_s:,.0f} GB/s")
        axis.axhline(
            _TARGET * run.copy_gb_per_s, color="black", linewidth=1, linestyle=":", label=f"target: {_TARGET} of it"
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("floor bytes of the call, MB (each input once, each output once)")
    axis.set_ylabel("GB/s on floor bytes")
    axis.grid(alpha=0.25, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    axis.set_title(f"Memory roofline\n{_where(run)}", fontsize=11)
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Draw the pictures of a run that was measured before, maybe elsewhere.

    Returns
    -------
    int
        0; 2 if the file is no result, or matplotlib is missing.
    """
    parser = argparse.ArgumentParser(prog="python -m profiling.charts", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="BENCH.json")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    try:
        drawn = save_charts(Run.load(options.run), options.folder)
    except (ResultsError, RuntimeError) as error:
        print(f"profiling.charts: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, drawn)) or f"{options.run} has no timings to draw")
    return 0


# ---- The model -------------------------------------------------------------------------------------------------------


def save_model_chart(run: Run, path: Path | str) -> None:
    """Draw modelled fractions of a copy, and the most that PyTorch's can be, for the largest shape of each pass.

    Raises
    ------
    RuntimeError
        Without matplotlib.
    """
    pyplot = load_pyplot()
    rows = [row for row in largest_rows(run.rows) if row.model is not None]
    figure, axis = pyplot.subplots(figsize=(8.5, 1.4 + 0.42 * len(rows)), layout="constrained")
    positions = range(len(rows))
    for offset, name, values in (
        (-0.2, "gpu_layers, by the model", [row.model["fraction"] for row in rows if row.model]),
        (0.2, "PyTorch's kernels: at most, by their bytes", [row.floor_bytes / row.torch_bytes for row in rows]),
    ):
        colour = COLOURS["ours" if offset < 0 else "torch"]
        bars = axis.barh([position + offset for position in positions], values, 0.38, color=colour, label=name)
        axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=7)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_yticks(list(positions), [row_label(row) for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(
        "time of a plain copy of the fewest bytes, over the time of the call (1: perfect); longer is faster"
    )
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    gpu = rows[0].model["gpu"] if rows and rows[0].model else "GPU"
    figure.suptitle(f"MODELLED for an {gpu}, never run on a GPU", fontsize=11)
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
