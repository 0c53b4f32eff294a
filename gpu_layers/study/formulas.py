"""Formulas as inline SVG: matplotlib sets them, no network and no font of the reader's is needed."""

from __future__ import annotations

from functools import lru_cache
from html import escape
from typing import Any

from gpu_layers.training.drawing import fixed_settings
from gpu_layers.training.extras import import_extra

# Of the SVG's own units; the page scales by em.
_SIZE = 20
_COMMANDS = {1: "M", 2: "L", 3: "Q", 4: "C"}
_CLOSE = 79


@lru_cache(maxsize=256)
def formula_svg(formula: str) -> str:
    """One formula as an ``<svg>`` element: one path, in the colour and size of the text around it.

    Parameters
    ----------
    formula : str
        In the part of TeX that matplotlib's mathtext knows, without dollar signs.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        If mathtext cannot parse it.
    RuntimeError
        If matplotlib is not installed.
    """
    with fixed_settings({"mathtext.fontset": "stix"}, extra="study"):
        text = import_extra("matplotlib.textpath", extra="study")
        path = text.TextPath((0, 0), f"${formula}$", size=_SIZE)
    extents = path.get_extents()
    left, width = extents.x0 - 0.5, extents.width + 1
    below, height = -extents.y0 + 0.5, extents.height + 1
    label = escape(formula, quote=True)
    # SVG's y axis points down.
    return (
        f'<svg class="formula" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="{left:.2f} {below - height:.2f} {width:.2f} {height:.2f}" '
        f'style="width:{width / _SIZE:.3f}em;vertical-align:{-below / _SIZE:.3f}em">'
        f'<path fill="currentColor" d="{_path_data(path)}"/></svg>'
    )


def _path_data(path: Any) -> str:
    parts = []
    for points, code in path.iter_segments(simplify=False):
        if code == _CLOSE:
            parts.append("Z")
        else:
            pairs = points.reshape(-1, 2)
            parts.append(_COMMANDS[int(code)] + " ".join(f"{x:.1f} {-y:.1f}" for x, y in pairs))
    return "".join(parts)
