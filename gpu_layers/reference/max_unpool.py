"""The inverse of max pooling in NumPy: the definition of correct."""

from __future__ import annotations

import math

import numpy as np

from gpu_layers.reference.results import delivered


def max_unpool_indices_valid(indices: np.ndarray, plane: int) -> bool:
    """Whether every index is in ``0 .. plane - 1``."""
    return not ((indices < 0) | (indices >= plane)).any()


def max_unpool_forward(
    x: np.ndarray, indices: np.ndarray, output_shape: tuple[int, ...], out: np.ndarray | None = None
) -> np.ndarray:
    """Each value at its index in the output plane, and 0 elsewhere.

    Parameters
    ----------
    x : ndarray, shape (N, C, *spatial)
    indices : ndarray of int64
        x's shape. Of equal indices in a plane the last one counts; one outside the plane does not.
    output_shape : tuple of int
        Spatial.

    Returns
    -------
    y : ndarray
        C-contiguous, x's dtype.
    """
    plane = math.prod(output_shape)
    lead = x.shape[:2]
    rows_of = (math.prod(lead), math.prod(x.shape[2:]))
    flat, at = x.reshape(rows_of), indices.reshape(rows_of)
    y = np.zeros((math.prod(lead), plane), x.dtype)
    rows, columns = np.nonzero((at >= 0) & (at < plane))
    targets = rows * plane + at[rows, columns]
    # The last of equal targets is the first of them backwards.
    targets, last = np.unique(targets[::-1], return_index=True)
    y.reshape(-1)[targets] = flat[rows, columns][::-1][last]
    return delivered(y.reshape(*lead, *output_shape), out)


def max_unpool_backward(dy: np.ndarray, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The gradient at each index, also where several are equal; 0 for an index outside the plane.

    Parameters
    ----------
    dy : ndarray, shape (N, C, *output_shape)
    indices : ndarray of int64, shape (N, C, *spatial)

    Returns
    -------
    dx : ndarray
        C-contiguous, dy's dtype, shape of the indices.
    """
    lead, plane = dy.shape[:2], math.prod(dy.shape[2:])
    flat, at = dy.reshape(math.prod(lead), plane), indices.reshape(math.prod(lead), math.prod(indices.shape[2:]))
    inside = (at >= 0) & (at < plane)
    taken = np.take_along_axis(flat, np.where(inside, at, 0), axis=1)
    return delivered(np.where(inside, taken, dy.dtype.type(0)).reshape(indices.shape), out)
