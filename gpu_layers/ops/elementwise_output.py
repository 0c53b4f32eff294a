"""Writing an elementwise result into an array that the caller names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_layers.ops.checks import check_out
from gpu_layers.runtime.copying import copy_into
from gpu_layers.runtime.cuda import array_module, place_of
from gpu_layers.runtime.writes import record_write


def into(out: Any | None, x: Any, compute: Callable[[Any], Any], *others: Any) -> Any:
    """``compute(target)``, where target is out, or None if out is None or one that kernels do not write to directly.

    Those are an out of another layout, and one that overlaps an input without being it: written early, read late.

    Parameters
    ----------
    out : array or None
        x's shape and dtype; may be x.
    x : array
    compute : callable
        Takes a C-contiguous array to fill, or None to make one; returns the result.
    *others : array
        Inputs like x.

    Returns
    -------
    array
        out if there is one.
    """
    if out is None:
        return compute(None)
    check_out(out, x)
    writable_directly = out.flags.c_contiguous and getattr(out.flags, "aligned", True)
    for one in (x, *others):
        writable_directly = writable_directly and (out is one or not array_module(x).may_share_memory(out, one))
    if writable_directly:
        compute(out)
    else:
        result = compute(None)
        with place_of(x):
            copy_into(array_module(x), out, result)
    record_write(out)
    return out
