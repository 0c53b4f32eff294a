"""The inverse of max pooling as a stateless pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.checks import check_integer
from gpu_layers.core.cuda import refuse_capture, to_host
from gpu_layers.ops.checked import Checked
from gpu_layers.ops.checks import check_dtype, check_gradient, described
from gpu_layers.ops.output import claim_pooled, unbatched
from gpu_layers.runtime.backend import backend_for

__all__ = ["MaxUnpoolSaved", "max_unpool_backward", "max_unpool_forward"]


@dataclass(slots=True)
class MaxUnpoolSaved:
    """What backward needs.

    Attributes
    ----------
    indices : array of int64
        A copy, with its batch axis.
    output_shape : tuple of int
    dtype : numpy.dtype
    channels_last, batched : bool
    """

    indices: Array
    output_shape: tuple[int, ...]
    dtype: np.dtype
    channels_last: bool
    batched: bool


def max_unpool_forward(
    x: Array,
    indices: Array,
    output_size: Sequence[int],
    *,
    channels_last: bool = False,
    check: bool = True,
    out: Array = None,
) -> tuple[Array, MaxUnpoolSaved]:
    """Each value at its index in the output plane, and 0 elsewhere.

    Parameters
    ----------
    x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last; N may be missing
        float16, bfloat16, float32 or float64.
    indices : array of int64, x's shape
        Flat in the output plane, as :func:`max_pool_indices` gives them. Where indices are equal, the last value in C
        order is kept.
    output_size : tuple of int
        One for each spatial axis.
    channels_last : bool
    check : bool
        Raise for an index outside the plane; on a GPU this waits for one flag. Without the check such values are left
        out.
    out : array, optional
        Where to write y; must not overlap x or the indices.

    Returns
    -------
    y : array
        x's dtype.
    saved : MaxUnpoolSaved
        For :func:`max_unpool_backward`.

    Raises
    ------
    TypeError
        For a wrong array type or dtype.
    ValueError
        For a wrong rank or shape, or an index outside the plane; nothing is written then.
    RuntimeError
        With ``check=True`` while a graph is captured.
    """
    backend = backend_for(x, indices, optional=(out,))
    batched, sizes, plane = _checked((x, indices), output_size)
    channels_last = bool(channels_last)
    if check:
        refuse_capture(x, "MaxUnpool with check=True", "it reads a flag back")
    batch = x if batched else x[None]
    at = indices if batched else indices[None]
    # With a copy of them: what is checked is what is used, and the caller may change its own before backward.
    if check:
        at, outside = backend.max_unpool_keep(at, plane)
        if to_host(outside).any():
            extent = "x".join(map(str, sizes))
            wrong = to_host(at)
            wrong = wrong[(wrong < 0) | (wrong >= plane)][0]
            raise ValueError(f"Found an invalid max index: {wrong} (output volumes are of size {extent})")
    target = None if out is None else claim_pooled(out, sizes, batched, channels_last, x, indices)
    y, kept = backend.max_unpool_forward(batch, at, sizes, channels_last, not check, target)
    if not batched:
        y = unbatched(y, out)
    return y, MaxUnpoolSaved(at if check else kept, y.shape, x.dtype, channels_last, batched)


@Checked
def _checked(arrays: tuple[Array, Array], output_size: Any) -> tuple[bool, tuple[int, ...], int]:
    """Whether x is batched, the output's sizes, and the size of its plane."""
    x, indices = arrays
    check_dtype(x)
    if indices.dtype != np.int64:
        raise TypeError(f"elements in indices should be type int64 but got: {described(indices.dtype)}")
    if not isinstance(output_size, (tuple, list)) or len(output_size) not in (1, 2, 3):
        raise ValueError(f"output_size must be 1 to 3 integers, one a spatial axis, got {output_size}")
    sizes = tuple(check_integer(size, "output_size", 1, 2**63 - 1) for size in output_size)
    rank = len(sizes)
    if x.ndim not in (rank + 1, rank + 2):
        raise ValueError(
            f"Input to max_unpooling{rank}d should be a {rank + 1}d or {rank + 2}d Tensor, "
            f"but got a tensor with {x.ndim} dimensions."
        )
    batched = x.ndim == rank + 2
    if 0 in x.shape[1 if batched else 0 :]:
        raise ValueError(
            f"max_unpooling{rank}d(): Expected input to have non-zero size for non-batch dimensions, "
            f"but got {list(x.shape)}"
        )
    if indices.shape != x.shape:
        raise ValueError(
            f"Expected shape of indices to be same as that of the input tensor ({list(x.shape)}) "
            f"but got indices tensor with shape: {list(indices.shape)}"
        )
    return batched, sizes, math.prod(sizes)


def max_unpool_backward(dy: Array, saved: MaxUnpoolSaved, *, out: Array = None) -> Array:
    """The gradient at each index, as in PyTorch, also if several indices are equal.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : MaxUnpoolSaved
    out : array, optional
        Where to write the result; must not overlap dy or the indices.

    Returns
    -------
    array
        Shape and dtype of x.

    Raises
    ------
    TypeError
        If dy has another array type or dtype than y.
    ValueError
        If dy has another shape than y, or out cannot take the result.
    """
    backend = backend_for(dy, saved.indices, optional=(out,))
    check_gradient(dy, saved.output_shape, saved.dtype)
    batched, last = saved.batched, saved.channels_last
    spatial = saved.indices.shape[1:-1] if last else saved.indices.shape[2:]
    target = None if out is None else claim_pooled(out, spatial, batched, last, dy, saved.indices)
    dx = backend.max_unpool_backward(dy if batched else dy[None], saved.indices, last, target)
    return dx if batched else unbatched(dx, out)
