"""Power-average pooling in NumPy: the definition of correct."""

from __future__ import annotations

import math

import numpy as np

from gpu_layers.reference.ieee import ieee
from gpu_layers.reference.max_pool import max_pool_backward, max_pool_forward
from gpu_layers.reference.pool_taps import accumulation_dtype, by_samples, covering_windows, window_taps, with_spatial
from gpu_layers.window import Window


@ieee
def lp_pool_forward(
    x: np.ndarray, window: Window, norm_type: float, channels_last: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """``(sum |x|^p)^(1/p)`` of each window; the largest ``|x|`` for p = inf.

    Parameters
    ----------
    x : ndarray, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
    window : Window
    norm_type : float
        p.
    channels_last : bool

    Returns
    -------
    y : ndarray
        C-contiguous, x's dtype; 0 for a window with no tap inside the input.
    taps : ndarray or None
        For p = inf, which tap won, as :func:`max_pool_forward` says.
    """
    inputs = math.prod(x.shape[1:])
    if np.isinf(norm_type):
        return by_samples(lambda part, own: _largest(part, own, window, channels_last), (x,), None, inputs)
    return by_samples(lambda part, own: _norms(part, own, window, norm_type, channels_last), (x,), None, inputs), None


def _largest(x: np.ndarray, _: None, window: Window, channels_last: bool) -> tuple[np.ndarray, np.ndarray]:
    y, taps = max_pool_forward(np.abs(x), window, channels_last)
    return np.maximum(y, y.dtype.type(0)), taps


def _norms(x: np.ndarray, _: None, window: Window, norm_type: float, channels_last: bool) -> np.ndarray:
    dtype = accumulation_dtype(x.dtype)
    total = np.zeros(with_spatial(x.shape, window.output_shape, channels_last), dtype)
    for *__, outputs, inputs in window_taps(window, channels_last):
        total[outputs] += _power(np.abs(x[inputs].astype(dtype)), norm_type)
    root = np.sqrt(total) if norm_type == 2 else _power(total, 1 / norm_type)
    return root.astype(x.dtype, copy=False)


@ieee
def lp_pool_backward(
    dy: np.ndarray,
    x: np.ndarray,
    y: np.ndarray | None,
    taps: np.ndarray | None,
    window: Window,
    norm_type: float,
    channels_last: bool = False,
) -> np.ndarray:
    """``sign(x) |x|^(p-1) sum(dy y^(1-p))`` over the windows of each element; 0 where x, or all of a window, is 0.

    Parameters
    ----------
    dy : ndarray
        Shape of the output.
    x, y, taps : ndarray
        What forward took and gave; with taps, y is not looked at.
    window : Window
    norm_type : float
    channels_last : bool

    Returns
    -------
    dx : ndarray
        C-contiguous, dy's dtype. Contributions are added in the order of the taps.
    """
    inputs = math.prod(x.shape[1:])
    return by_samples(
        lambda part, x, y, taps, own: _backward(part, x, y, taps, own, window, norm_type, channels_last),
        (dy, x, y, taps),
        None,
        inputs,
    )


def _backward(
    dy: np.ndarray,
    x: np.ndarray,
    y: np.ndarray | None,
    taps: np.ndarray | None,
    _: None,
    window: Window,
    norm_type: float,
    channels_last: bool,
) -> np.ndarray:
    dtype = accumulation_dtype(dy.dtype)
    signs = np.sign(x.astype(dtype))
    if taps is not None:
        return (signs * max_pool_backward(dy.astype(dtype), taps, window, channels_last)).astype(dy.dtype)
    assert y is not None
    # Ratios, as y may be large or small enough for its powers to leave the dtype's range.
    size, gradient, norm = np.abs(x.astype(dtype)), dy.astype(dtype), y.astype(dtype)
    dx = np.zeros(with_spatial(dy.shape, window.input_shape, channels_last), dtype)
    for *__, outputs, inputs in covering_windows(window, channels_last):
        there = norm[outputs]
        ratio = size[inputs] / np.where(there == 0, 1, there)
        dx[inputs] += gradient[outputs] * np.where(size[inputs] == 0, 0, _power(ratio, norm_type - 1))
    return (signs * dx).astype(dy.dtype, copy=False)


def _power(values: np.ndarray, exponent: float) -> np.ndarray:
    """The simple powers without a rounding too many."""
    if exponent == 1:
        return values
    if exponent == 2:
        return values * values
    return values ** values.dtype.type(exponent)
