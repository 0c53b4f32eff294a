"""Figures: drawn by matplotlib without a window system, as SVG, once for each language."""

from __future__ import annotations

import io
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Concatenate, ParamSpec

from gpu_layers.study.claims import Figure, Text
from gpu_layers.training.drawing import fixed_settings
from gpu_layers.training.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas
else:
    Canvas = object  # matplotlib is imported when something is drawn

P = ParamSpec("P")
#: Gives a text in the language that is being drawn.
Say = Callable[[Text], str]
#: Told apart by people who do not see colours as most do (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072b2", "#d98200", "#00835f", "#c4420a", "#a3568a", "#777777"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY, "#3b9fd4")
_STYLE = {
    "font.size": 10.5,
    "font.family": "sans-serif",
    # The reader's browser has the Chinese ones; matplotlib measures with the first, its own.
    "font.sans-serif": ["DejaVu Sans", "PingFang SC", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif"],
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    # Letters stay letters: small files, and text that can be searched.
    "svg.fonttype": "none",
    "svg.hashsalt": "gpu_layers",
    "path.simplify_threshold": 0.5,
}


def draw(
    name: str, caption: Text, *, size: tuple[float, float] = (5.4, 3.4)
) -> Callable[[Callable[Concatenate[Canvas, Say, P], None]], Callable[P, Figure]]:
    """Decorate a function that paints: it then draws a figure in both languages.

    Parameters
    ----------
    name : str
    caption : Text
    size : tuple of float
        Width and height in inches.

    Returns
    -------
    decorator
        For a function of a matplotlib figure, a :data:`Say`, and what it shows. The decorated one takes what it shows,
        and returns a Figure, with its ``failure`` where matplotlib, its fonts or its settings do not let it be drawn.
    """

    def decorate(paint: Callable[Concatenate[Canvas, Say, P], None]) -> Callable[P, Figure]:
        def figure(*args: P.args, **kwargs: P.kwargs) -> Figure:
            def painted(canvas: Canvas, say: Say) -> None:
                paint(canvas, say, *args, **kwargs)

            try:
                return Figure(name, caption, {language: _svg(painted, size, language) for language in ("en", "zh")})
            # No picture is worth minutes of measurements.
            except Exception as error:
                failure = " ".join(f"{type(error).__name__}: {error}".split())
                return Figure(name, caption, dict.fromkeys(("en", "zh"), _failed_svg(failure)), failure)

        return figure

    return decorate


def _svg(paint: Callable[[Canvas, Say], None], size: tuple[float, float], language: str) -> str:
    buffer = io.StringIO()
    # Its own font has no Chinese; the reader's has.
    with fixed_settings(_STYLE, extra="study"):
        figure = import_extra("matplotlib.figure", extra="study").Figure(figsize=size, layout="constrained")
        paint(figure, lambda text: getattr(text, language))
        # Without a date the same numbers give the same file.
        figure.savefig(buffer, format="svg", dpi=160, backend="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _failed_svg(failure: str) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 200">'
        f'<text x="10" y="100" font-size="10">{escape(failure)}</text></svg>'
    )
