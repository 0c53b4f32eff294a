"""The inverse of max pooling as a stateless pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_layers.ops.checks import check_dtype, check_gradient, check_integer, described
from gpu_layers.runtime.backend import backend_for


@dataclass(frozen=True)
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

    indices: Any
    output_shape: tuple[int, ...]
    dtype: np.dtype
    channels_last: bool
    batched: bool


def max_unpool_forward(
    x: Any, indices: Any, output_size: Sequence[int], *, channels_last: bool = False, check: bool = True
) -> tuple[Any, MaxUnpoolSaved]:
    """Each value at its index in the output plane, and 0 elsewhere.

    Parameters
    ----------
    x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last; N may be missing
        float16, bfloat16, float32 or float64.
    indices : array of int64, x's shape
        Flat in the output plane, as :func:`max_pool_indices` gives them. Of equal ones the last counts, in C order.
    output_size : tuple of int
        Spatial.
    channels_last : bool
    check : bool
        Refuse an index outside the plane; on a GPU this waits for one flag. Without, such a value is left out.

    Returns
    -------
    y : array
    saved : MaxUnpoolSaved

    Raises
    ------
    TypeError
        For a wrong array type or dtype.
    ValueError
        For a wrong rank or shape, or an index outside the plane; nothing is written then.
    """
    backend = backend_for(x, indices)
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
    plane = int(np.prod(sizes, dtype=object))
    # A copy first: what is checked is what is used, and the caller may change its own before backward.
    at = indices.copy() if batched else indices[None].copy()
    if check and not backend.max_unpool_indices_valid(at, plane):
        extent = "x".join(map(str, sizes))
        outside = at[(at < 0) | (at >= plane)][0].item()
        raise ValueError(f"Found an invalid max index: {outside} (output volumes are of size {extent})")
    channels_last = bool(channels_last)
    y = backend.max_unpool_forward(x if batched else x[None], at, sizes, channels_last)
    y = y if batched else y[0]
    return y, MaxUnpoolSaved(at, y.shape, x.dtype, channels_last, batched)


def max_unpool_backward(dy: Any, saved: MaxUnpoolSaved) -> Any:
    """The gradient at each index, as PyTorch's: also where several indices are equal.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : MaxUnpoolSaved

    Returns
    -------
    array
        Shape and dtype of x.
    """
    backend = backend_for(dy, saved.indices)
    check_gradient(dy, saved.output_shape, saved.dtype)
    dx = backend.max_unpool_backward(dy if saved.batched else dy[None], saved.indices, saved.channels_last)
    return dx if saved.batched else dx[0]
