"""Dropout in NumPy: the definition of correct."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_layers.reference.ieee import ieee
from gpu_layers.reference.philox import random_words

# Elements whose random words exist at a time: small enough to stay in a CPU's second-level cache, which
# is what makes this fast, and what bounds the memory beyond the result.
_CHUNK = 1 << 16


@ieee
def dropout_forward(
    x: np.ndarray,
    drop_below: int,
    scale: float,
    seed: int,
    offset: int,
    start: int = 0,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Zero the elements whose random word is below ``drop_below``, multiply the others by ``scale``.

    Parameters
    ----------
    x : ndarray
        Any floating dtype and layout.
    drop_below : int
        ``round(p * 2**32)``, in ``0 .. 2**32``.
    scale : float
        Factor of a kept element, rounded to the accumulation dtype (float32, for float64 float64).
    seed, offset, start : int
        Key, number of the call, and index of ``x``'s first element in the whole (sharded) array.
    out : ndarray, optional
        C-contiguous array to fill; may be ``x`` itself.

    Returns
    -------
    ndarray
        C-contiguous, x's shape and dtype. A dropped element is +0 whatever it was.
    """
    y = np.empty(x.shape, x.dtype) if out is None else out
    source, target = np.ascontiguousarray(x).reshape(-1), y.reshape(-1)
    accumulate: Any = np.float64 if x.dtype == np.float64 else np.float32
    factor = accumulate(scale)
    for position in range(0, source.size, _CHUNK):
        chunk = slice(position, position + _CHUNK)
        kept = source[chunk].astype(accumulate) * factor
        words = random_words(seed, offset, start + position, kept.size)
        # drop_below = 2**32 does not fit a word: compare as 64-bit integers.
        kept[words < np.uint64(drop_below)] = 0
        target[chunk] = kept
    return y


# Dropout multiplies by a diagonal matrix, which is its own transpose: backward is the same map, of dy.
dropout_backward = dropout_forward


def dropout_mask(n: int, drop_below: int, seed: int, offset: int, start: int = 0) -> np.ndarray:
    """Which of the elements ``start .. start + n - 1`` are kept.

    Returns
    -------
    ndarray of bool, shape (n,)
    """
    mask = np.empty(n, dtype=bool)
    for position in range(0, n, _CHUNK):
        count = min(_CHUNK, n - position)
        words = random_words(seed, offset, start + position, count)
        mask[position : position + count] = words >= np.uint64(drop_below)
    return mask
