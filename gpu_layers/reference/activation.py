"""Activations in NumPy: the definition of correct."""

from __future__ import annotations

import numpy as np

from gpu_layers.reference.ieee import ieee


@ieee
def relu_forward(x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """``max(x, 0)``; NaN stays NaN.

    Parameters
    ----------
    x : ndarray
        Any floating dtype and layout.
    out : ndarray, optional
        C-contiguous array to fill; may be ``x`` itself.
    """
    y = np.empty(x.shape, x.dtype) if out is None else out
    # Not np.maximum: which zero that returns for -0 is unspecified, and here a result of 0 is always +0.
    y[...] = np.where(x <= 0, x.dtype.type(0), x)
    return y


@ieee
def relu_backward(dy: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``dy`` where ``y`` is positive (or NaN), 0 elsewhere."""
    dx = np.empty(dy.shape, dy.dtype)
    dx[...] = np.where(y <= 0, dy.dtype.type(0), dy)
    return dx
