"""Gradients without a backward: by finite differences, and by a linear map's own matrix."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

STEP = 2.0**-10


def finite_differences(loss: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
    """Gradient of a loss at a float64 x, with the five-point formula.

    Its truncation error is ``STEP**4 / 30 = 3e-14`` of the fifth derivative, its rounding error about
    ``2 * 2**-53 / STEP = 2e-13`` of the size of the loss.
    """
    gradient = np.empty_like(x)
    for position in np.ndindex(x.shape):
        values = []
        for steps in (-2, -1, 1, 2):
            moved = x.copy()
            moved[position] += steps * STEP
            values.append(loss(moved))
        gradient[position] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * STEP)
    return gradient


def transposed(forward: Callable[[np.ndarray], np.ndarray], input_shape: tuple[int, ...], dy: np.ndarray) -> np.ndarray:
    """What the backward of a linear map of one float64 sample must give: its transposed matrix times dy.

    ``forward`` takes a batch; row i of the transposed matrix is the map of the i-th unit vector.
    """
    size = int(np.prod(input_shape))
    rows = forward(np.eye(size).reshape(size, *input_shape)).reshape(size, -1)
    return (rows @ dy.reshape(-1)).reshape(input_shape)
