"""The inverse of max pooling in NumPy: the definition of correct."""

from __future__ import annotations

import math

import numpy as np

from gpu_layers.reference.pool_taps import by_samples, planes_of
from gpu_layers.reference.results import delivered

__all__ = ["max_unpool_backward", "max_unpool_forward", "max_unpool_keep"]


def max_unpool_keep(indices: np.ndarray, plane: int) -> tuple[np.ndarray, np.ndarray]:
    """A copy of the indices, and flags; one is set if an index is outside ``0 .. plane - 1``."""
    kept = indices.copy()
    return kept, np.atleast_1d(((kept < 0) | (kept >= plane)).any())


def max_unpool_forward(
    x: np.ndarray,
    indices: np.ndarray,
    output_shape: tuple[int, ...],
    channels_last: bool = False,
    keep: bool = False,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Each value at its index in the output plane, and 0 elsewhere.

    Parameters
    ----------
    x : ndarray, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
    indices : ndarray of int64
        x's shape. Of equal indices in a plane the last one counts; one outside the plane does not.
    output_shape : tuple of int
        Spatial.
    channels_last : bool
    keep : bool
        Copy the indices.

    Returns
    -------
    y : ndarray
        C-contiguous, x's dtype.
    kept : ndarray or None
        The copy.
    """
    plane = math.prod(output_shape)

    def scattered(x: np.ndarray, indices: np.ndarray, lengths: None) -> np.ndarray:
        flat, at = planes_of(x, channels_last), planes_of(indices, channels_last)
        y = np.zeros((*flat.shape[:2], plane), x.dtype)
        inside = (at >= 0) & (at < plane)
        targets = (at + np.arange(0, y.size, plane).reshape(*y.shape[:2], 1))[inside]
        # The last of equal targets is the first of them backwards.
        targets, last = np.unique(targets[::-1], return_index=True)
        y.reshape(-1)[targets] = flat[inside][::-1][last]
        if channels_last:
            return np.ascontiguousarray(y.swapaxes(1, 2)).reshape(len(x), *output_shape, x.shape[-1])
        return y.reshape(*x.shape[:2], *output_shape)

    channels = x.shape[-1 if channels_last else 1]
    y = delivered(by_samples(scattered, (x, indices), None, channels * plane), out)
    return y, np.array(indices, order="C") if keep else None


def max_unpool_backward(
    dy: np.ndarray, indices: np.ndarray, channels_last: bool = False, out: np.ndarray | None = None
) -> np.ndarray:
    """The gradient at each index, also where several are equal; 0 for an index outside the plane.

    Parameters
    ----------
    dy : ndarray, shape (N, C, *output_shape), or (N, *output_shape, C) if channels_last
    indices : ndarray of int64, shape (N, C, *spatial), or (N, *spatial, C)
    channels_last : bool

    Returns
    -------
    dx : ndarray
        C-contiguous, dy's dtype, shape of the indices.
    """

    def gathered(dy: np.ndarray, indices: np.ndarray, lengths: None) -> np.ndarray:
        flat, at = planes_of(dy, channels_last), planes_of(indices, channels_last)
        inside = (at >= 0) & (at < flat.shape[2])
        taken = np.take_along_axis(flat, np.where(inside, at, 0), axis=2)
        dx = np.where(inside, taken, dy.dtype.type(0))
        return np.ascontiguousarray(dx.swapaxes(1, 2) if channels_last else dx).reshape(indices.shape)

    return delivered(by_samples(gathered, (dy, indices), None, math.prod(indices.shape[1:])), out)
