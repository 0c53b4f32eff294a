"""Writing an elementwise result into an array that the caller names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_layers.ops.checks import check_out


def into(out: Any | None, x: Any, compute: Callable[[Any], Any]) -> Any:
    """``compute(target)``, where target is out, or None if out is None or has a layout that kernels do not write.

    Parameters
    ----------
    out : array or None
        x's shape and dtype; may be x.
    x : array
    compute : callable
        Takes a C-contiguous array to fill, or None to make one; returns the result.

    Returns
    -------
    array
        out if there is one.
    """
    if out is None:
        return compute(None)
    check_out(out, x)
    if out.flags.c_contiguous and getattr(out.flags, "aligned", True):
        return compute(out)
    out[...] = compute(None)
    return out
