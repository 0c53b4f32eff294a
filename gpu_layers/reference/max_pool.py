"""Max pooling in NumPy: the definition of correct."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpu_layers.reference.ieee import ieee
from gpu_layers.reference.pool_taps import (
    accumulation_dtype,
    by_samples,
    covering_windows,
    flat_indices,
    inside_lengths,
    masked,
    select,
    tap_dtype,
    window_taps,
    with_spatial,
)
from gpu_layers.reference.results import delivered
from gpu_layers.runtime.cuda import array_module
from gpu_layers.window import Window


@ieee
def max_pool_forward(
    x: np.ndarray,
    window: Window,
    channels_last: bool = False,
    lengths: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Largest value of each window, and which tap held it.

    The first of equal maxima wins, in the order of the taps (last axis fastest); of several NaN the last one.
    A window with no tap inside the input gives -inf, of integers the smallest one; one with none inside its sample's
    lengths gives 0.

    Parameters
    ----------
    x : ndarray, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
    window : Window
    channels_last : bool
    lengths : ndarray of int64, shape (N, spatial axes), optional
        Size that each sample has for itself: taps beyond do not count.

    Returns
    -------
    y : ndarray
        C-contiguous, x's dtype.
    taps : ndarray of uint8 (uint16, uint32 for windows of more than 256, 65,536 taps)
        y's shape. Number of the chosen tap; 0 for a window with no tap that counts.
    """
    outputs = x.shape[1 if not channels_last else -1] * math.prod(window.output_shape)
    y, taps = by_samples(lambda part, own: _forward(part, own, window, channels_last), (x,), lengths, outputs)
    return delivered(y, out), taps


def _forward(
    x: np.ndarray, lengths: np.ndarray | None, window: Window, channels_last: bool
) -> tuple[np.ndarray, np.ndarray]:
    shape = with_spatial(x.shape, window.output_shape, channels_last)
    least = np.iinfo(x.dtype).min if x.dtype.kind in "iu" else -np.inf
    y = np.full(shape, least if lengths is None else 0, x.dtype)
    taps = np.zeros(shape, tap_dtype(window))
    found = np.zeros(shape, bool)
    inside = inside_lengths(lengths, window, channels_last)
    for _, tap, outputs, inputs in window_taps(window, channels_last):
        candidate = x[inputs]
        take = (candidate > y[outputs]) | np.isnan(candidate) | ~found[outputs]
        take &= select(inside, inputs, x.shape)
        y[outputs] = np.where(take, candidate, y[outputs])
        taps[outputs] = np.where(take, taps.dtype.type(tap), taps[outputs])
        found[outputs] |= select(inside, inputs, x.shape)
    return y, taps


@ieee
def max_pool_gather(
    x: np.ndarray,
    taps: np.ndarray,
    window: Window,
    channels_last: bool = False,
    lengths: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The value at the tap that each window chose, and +0 for a window that chose none.

    Parameters
    ----------
    x : ndarray
        Shape of the input that the taps are of.
    taps : ndarray
        Shape of the output.
    window, channels_last, lengths
        As of :func:`max_pool_forward`.

    Returns
    -------
    y : ndarray
        C-contiguous, shape of the taps, x's dtype. Linear in x; :func:`max_pool_backward` is the transpose.
    """
    outputs = x.shape[1 if not channels_last else -1] * math.prod(window.output_shape)
    y = by_samples(
        lambda part, chosen, own: _gather(part, chosen, own, window, channels_last), (x, taps), lengths, outputs
    )
    return delivered(y, out)


def _gather(
    x: np.ndarray, taps: np.ndarray, lengths: np.ndarray | None, window: Window, channels_last: bool
) -> np.ndarray:
    y = np.zeros(taps.shape, x.dtype)
    inside = inside_lengths(lengths, window, channels_last)
    for _, tap, outputs, inputs in window_taps(window, channels_last):
        chosen = (taps[outputs] == tap) & select(inside, inputs, x.shape)
        y[outputs] = np.where(chosen, x[inputs], y[outputs])
    return y


@ieee
def max_pool_backward(
    dy: np.ndarray,
    taps: np.ndarray,
    window: Window,
    channels_last: bool = False,
    lengths: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Send each gradient to the tap that won.

    Parameters
    ----------
    dy, taps : ndarray
        Shape of the output.
    window : Window
    channels_last : bool
    lengths : ndarray of int64, optional

    Returns
    -------
    dx : ndarray
        C-contiguous, dy's dtype. Contributions are added in the order of the taps.
    """
    inputs = dy.shape[1 if not channels_last else -1] * math.prod(window.input_shape)
    dx = by_samples(
        lambda part, chosen, own: _backward(part, chosen, own, window, channels_last), (dy, taps), lengths, inputs
    )
    return delivered(dx, out)


def _backward(
    dy: np.ndarray, taps: np.ndarray, lengths: np.ndarray | None, window: Window, channels_last: bool
) -> np.ndarray:
    shape = with_spatial(dy.shape, window.input_shape, channels_last)
    dx = np.zeros(shape, accumulation_dtype(dy.dtype))
    for _, tap, outputs, inputs in covering_windows(window, channels_last):
        dx[inputs] += np.where(taps[outputs] == tap, dy[outputs], dy.dtype.type(0))
    return masked(dx, inside_lengths(lengths, window, channels_last)).astype(dy.dtype, copy=False)


def max_pool_indices(taps: Any, window: Window, channels_last: bool = False, lengths: Any = None) -> Any:
    """Flat index in the input plane of each chosen tap, as ``torch.nn.MaxPool2d(return_indices=True)`` gives it.

    Returns
    -------
    array of int64
        ``taps``'s shape and kind, NumPy or CuPy; -1 for a window with no tap that counts.
    """
    return flat_indices(taps, window, channels_last, lengths, array_module(taps))
