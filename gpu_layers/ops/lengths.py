"""The sizes of the samples of a padded batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_layers.core.array import Array, ArrayLike
from gpu_layers.core.cuda import array_module, is_capturing, place_of, to_host


def sample_lengths(lengths: ArrayLike | None, x: Array, batched: bool, spatial: tuple[int, ...]) -> Array:
    """:func:`checked_lengths` on the device of x; RuntimeError while a graph is captured there."""
    if is_capturing(x):
        raise RuntimeError("pooling with lengths= cannot be captured: the host checks them")
    values = checked_lengths(host_lengths(lengths), x, batched, spatial)
    with place_of(x):
        return array_module(x).array(values, np.int64)


def host_lengths(lengths: Any) -> np.ndarray:
    """Lengths as an array in the host's memory; ValueError for samples with unequal numbers of sizes."""
    try:
        found: np.ndarray = np.asarray(to_host(lengths))
    except ValueError:
        raise ValueError("lengths must have the same number of sizes for every sample") from None
    return found


def checked_lengths(values: np.ndarray, x: Array, batched: bool, spatial: tuple[int, ...]) -> np.ndarray:
    """The size of each sample, (N, spatial axes), in the host's memory.

    Parameters
    ----------
    values : ndarray
        (N, spatial axes), or (N,) for one spatial axis; without N for an unbatched x.
    x : array
    batched : bool
    spatial : tuple of int
        Size of the padded batch.

    Returns
    -------
    ndarray of int, shape (N, spatial axes)

    Raises
    ------
    TypeError
        If they are not integers.
    ValueError
        If their shape is wrong, or one is below 0 or above the input's size.
    """
    rank = len(spatial)
    if values.dtype.kind not in "iu" and values.size:
        raise TypeError(f"lengths must be integers, got {values.dtype}")
    samples = x.shape[0] if batched else 1
    shapes: list[tuple[int, ...]] = [(samples, rank) if batched else (rank,)]
    if rank == 1:
        shapes.append((samples,) if batched else ())
    if values.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"lengths must have the shape {expected}, got {list(values.shape)}")
    values = values.reshape(samples, rank)
    # A negative one is large without its sign.
    if values.size and (values.astype(np.uint64) > np.array(spatial, np.uint64)).any():
        raise ValueError(f"lengths must be in 0 .. the input's size {list(spatial)}, got {values.tolist()[:8]}")
    result: np.ndarray = values
    return result
