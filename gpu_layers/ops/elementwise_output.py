"""Writing an elementwise result into an array of the caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_layers.core.array import Array
from gpu_layers.ops.checks import check_out
from gpu_layers.runtime.copying import copy_into
from gpu_layers.runtime.cuda import array_module, place_of
from gpu_layers.runtime.writes import record_write


def into(out: Array | None, x: Array, compute: Callable[[Any], Any], *others: Any) -> Any:
    """``compute(target)``: target is out, or None if out is None or kernels cannot write to it directly.

    They cannot write to an out of another layout, or to one that overlaps an input without being that input.

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
        out, if given.
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
