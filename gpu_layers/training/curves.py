"""Loss and accuracy over the epochs, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from gpu_layers.core.array import Facts
from gpu_layers.training.drawing import fixed_settings
from gpu_layers.training.extras import import_extra

_TRAIN, _TEST = "#9a9a9a", "#0b6e99"


def curves_png(history: Sequence[dict[str, object]], title: str) -> bytes:
    """Draw a run.

    Parameters
    ----------
    history : sequence of dict
        ``Trainer.history``, at least one epoch.
    title : str
        Drawn as it is; letters that matplotlib's font lacks become boxes.

    Returns
    -------
    bytes
        A PNG image.

    Raises
    ------
    RuntimeError
        If matplotlib is not installed.
    """
    with fixed_settings():
        figure = import_extra("matplotlib.figure").Figure(figsize=(10, 4), layout="constrained")
        _paint(figure, history)
        # As it is written: a dollar sign in a file's name does not begin a formula.
        figure.suptitle(title, parse_math=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, backend="agg")
    return buffer.getvalue()


def _paint(figure: Any, history: Sequence[Facts]) -> None:
    loss, accuracy = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in history]
    marker = "o" if len(epochs) == 1 else ""
    for axes, quantity, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        for part, color in (("train", _TRAIN), ("test", _TEST)):
            values = [scale * entry[f"{part}_{quantity}"] for entry in history]
            label = f"{part}, with dropout" if part == "train" else part
            axes.plot(epochs, values, color=color, label=label, marker=marker, linewidth=1.8)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    loss.set_ylabel("mean cross-entropy")
    loss.set_yscale("log")
    loss.yaxis.set_major_formatter("{x:g}")
    loss.legend(frameon=False)
    accuracy.set_ylabel("accuracy, %")
    accuracy.set_ylim(top=100.5)
    last = 100 * history[-1]["test_accuracy"]
    accuracy.axhline(last, color=_TEST, linewidth=0.8, linestyle=":")
    accuracy.annotate(
        f"{last:.2f} %",
        (epochs[-1], last),
        xytext=(0, -6),
        textcoords="offset points",
        ha="right",
        va="top",
        color=_TEST,
        fontweight="bold",
    )
    accuracy.legend(frameon=False, loc="lower right")
