"""The picture of the model of cost."""

from __future__ import annotations

from pathlib import Path

from profiling.charts import COLOURS, largest_rows, load_pyplot, row_label, save_figure
from profiling.results import Run


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
