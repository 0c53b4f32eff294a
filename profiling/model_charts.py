"""The picture of the model of cost."""

from __future__ import annotations

from pathlib import Path

from profiling.charts import COLOURS, largest_rows, load_pyplot, row_label
from profiling.results import Run


def save_model_chart(run: Run, path: Path | str) -> None:
    """Draw modelled bytes over floor bytes, ours and PyTorch's, for the largest shape of each operation and pass.

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
        (-0.2, "gpu_layers", [row.model["bytes"] / row.floor_bytes for row in rows if row.model]),
        (0.2, "PyTorch's kernels, by their algorithm", [row.torch_bytes / row.floor_bytes for row in rows]),
    ):
        colour = COLOURS["ours" if offset < 0 else "torch"]
        bars = axis.barh([position + offset for position in positions], values, 0.38, color=colour, label=name)
        axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=7)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_yticks(list(positions), [row_label(row) for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("bytes moved, as a multiple of the fewest possible (line: 1); shorter is better")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("MODELLED, never run on a GPU: bytes that cross the memory bus", fontsize=11)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
