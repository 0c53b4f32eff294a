"""The sizes of the samples of a padded batch."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from gpu_layers.core.array import Array, ArrayLike
from gpu_layers.core.cuda import array_module, place_of, place_of_work, refuse_capture, to_host

# While an operation's record has them: layers of a network are called with the same lengths.
_in_use: WeakValueDictionary[Hashable, Array] = WeakValueDictionary()


def sample_lengths(lengths: ArrayLike | None, x: Array, batched: bool, spatial: tuple[int, ...]) -> Array:
    """:func:`checked_lengths` on the device of x; RuntimeError while a graph is captured there."""
    refuse_capture(x, "pooling with lengths=", "the host checks them")
    values, xp = host_lengths(lengths), array_module(x)
    with place_of(x):
        key = values.tobytes(), values.dtype, values.shape, batched, x.shape[0], spatial, xp, place_of_work(x)
        found = _in_use.get(key)
        if found is None:
            found = _in_use[key] = xp.array(checked_lengths(values, x, batched, spatial), np.int64)
    return found


def host_lengths(lengths: Any) -> np.ndarray:
    """Lengths as an array in the host's memory; ValueError for samples with unequal numbers of sizes."""
    try:
        found: np.ndarray = np.asarray(to_host(lengths))
    except ValueError:
        raise ValueError("lengths must have the same number of sizes for every sample") from None
    return found


@lru_cache(maxsize=1024)
def _sizes(spatial: tuple[int, ...]) -> np.ndarray:
    return np.array(spatial, np.uint64)


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
    ndarray of int64, shape (N, spatial axes)
        A copy.

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
    shape = (samples, rank) if batched else (rank,)
    if values.shape != shape and (rank > 1 or values.shape != shape[:-1]):
        expected = " or ".join(str(list(one)) for one in ((shape, shape[:-1]) if rank == 1 else (shape,)))
        raise ValueError(f"lengths must have the shape {expected}, got {list(values.shape)}")
    values = values.reshape(samples, rank)
    own = values.astype(np.int64)
    # A negative one is large without its sign.
    if b"\1" in (own.view(np.uint64) > _sizes(spatial)).tobytes():
        raise ValueError(f"lengths must be in 0 .. the input's size {list(spatial)}, got {values.tolist()[:8]}")
    return own
