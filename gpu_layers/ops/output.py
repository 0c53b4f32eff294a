"""Results in arrays of the caller, ``out=``: claimed before anything is launched, then handed to the backend.

A backend writes to an out of any layout and alignment, through a copy where kernels cannot.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import array_module, place_of
from gpu_layers.core.writes import record_write
from gpu_layers.ops.checks import check_overlap, described
from gpu_layers.runtime.copying import copy_into, ready_copy


def claim(out: Array, shape: tuple[int, ...], dtype: np.dtype, *inputs: Array) -> None:
    """Record that ``out`` is written to. Before a forward notes the number of writes, so that its backward may read it.

    Parameters
    ----------
    out : array
    shape, dtype
        Of the result.
    *inputs : array or None
        Arrays that are still read while the result is written.

    Raises
    ------
    TypeError, ValueError
        If out cannot take the result, or overlaps an input.
    """
    _check(out, shape, dtype)
    _check_apart(out, inputs)
    record_write(out)


def claim_elementwise(out: Array, x: Array, *others: Array, apart: tuple[Array, ...] = ()) -> Any:
    """The same for a result like x whose elements each need that element of the inputs alone: out may be an input.

    Parameters
    ----------
    out, x : array
    *others : array or None
        Further inputs.
    apart : tuple
        Arrays or Nones that out must not overlap all the same: what a forward saved stays as it is.

    Returns
    -------
    array, or list if there are others
        The inputs: a copy of one that overlaps out without being it.
    """
    in_place = "the input is read-only, and cannot be changed in place: pass a copy"
    _check(out, x.shape, x.dtype, in_place if out is x else _READ_ONLY)
    _check_apart(out, apart)
    record_write(out)
    xp = array_module(out)
    with place_of(out):
        inputs = [
            ready_copy(xp, one) if one is not None and one is not out and xp.may_share_memory(out, one) else one
            for one in (x, *others)
        ]
    return inputs if others else inputs[0]


_READ_ONLY = "out is read-only"


def _check(out: Array, shape: tuple[int, ...], dtype: np.dtype, read_only: str = _READ_ONLY) -> None:
    if out.dtype != dtype:
        raise TypeError(f"out must have the result's dtype {np.dtype(dtype)}, got {described(out.dtype)}")
    if out.shape != tuple(shape):
        raise ValueError(f"out must have the result's shape {list(shape)}, got {list(out.shape)}")
    check_overlap(out)
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError(read_only)


def _check_apart(out: Array, inputs: tuple[Array, ...]) -> None:
    for one in inputs:
        if one is not None and array_module(out).may_share_memory(out, one):
            raise ValueError("out must not overlap an input: the operation still reads its input while it writes")


def zeros(like: Array, out: Array = None) -> Array:
    """Zeros of an array's shape and dtype: in ``out``, if it is given."""
    xp = array_module(like)
    result = xp.zeros(like.shape, like.dtype)
    if out is None:
        return result
    copy_into(xp, out, result)
    return out


def claim_pooled(
    out: Array, spatial: tuple[int, ...], batched: bool, channels_last: bool, x: Array, *others: Array
) -> Array:
    """:func:`claim` for a result like x with other spatial sizes; returns out with a batch axis."""
    claim(out, output_shape(x, spatial, batched, channels_last), x.dtype, x, *others)
    return out if batched else out[None]


def unbatched(result: Array, out: Array) -> Array:
    """The result of an input without a batch axis: out itself, if it was given."""
    return result[0] if out is None else out


def output_shape(x: Array, spatial: tuple[int, ...], batched: bool, channels_last: bool) -> tuple[int, ...]:
    """x's shape with other spatial sizes."""
    lead, channels = x.shape[:1] if batched else (), x.shape[-1 if channels_last else int(batched)]
    return (*lead, *spatial, channels) if channels_last else (*lead, channels, *spatial)
