"""Max pooling in NumPy: the definition of correct."""

from __future__ import annotations

import math

import numpy as np

from gpu_layers.core.argmax import argmax_dtype
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.window import Window
from gpu_layers.reference.ieee import ieee
from gpu_layers.reference.pool_taps import (
    by_samples,
    covering_windows,
    inside_lengths,
    masked,
    planes_of,
    select,
    window_taps,
    with_spatial,
)
from gpu_layers.reference.results import delivered
from gpu_layers.reference.select import chosen_values, kept_values

__all__ = ["max_pool_backward", "max_pool_forward", "max_pool_gather", "max_pool_indices"]


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
        Size of each sample: taps beyond do not count.

    Returns
    -------
    y : ndarray
        C-contiguous, x's dtype.
    argmax : ndarray of uint8 (uint16, uint32 for windows of more than 256, 65,536 argmax)
        y's shape. Number of the chosen tap; 0 for a window with no tap that counts.
    """
    outputs = x.shape[1 if not channels_last else -1] * math.prod(window.output_shape)
    y, argmax = by_samples(lambda part, own: _forward(part, own, window, channels_last), (x,), lengths, outputs)
    return delivered(y, out), argmax


def _forward(
    x: np.ndarray, lengths: np.ndarray | None, window: Window, channels_last: bool
) -> tuple[np.ndarray, np.ndarray]:
    shape = with_spatial(x.shape, window.output_shape, channels_last)
    if window.is_global and lengths is None and x.size:
        return _forward_global(x, window, channels_last, shape)
    least = np.iinfo(x.dtype).min if x.dtype.kind in "iu" else -np.inf
    y = np.full(shape, least if lengths is None else 0, x.dtype)
    argmax = np.zeros(shape, argmax_dtype(window))
    found = np.zeros(shape, bool)
    all_found = False
    inside = inside_lengths(lengths, window, channels_last)
    has_nan = x.dtype.kind not in "biu" and bool(np.isnan(x).any())
    for _, tap, outputs, inputs in window_taps(window, channels_last):
        # Read several times: in one piece.
        candidate = np.ascontiguousarray(x[inputs])
        if not all_found and inside is None and candidate.shape == shape and not found.any():
            # The first tap of every window.
            y[...], argmax[...], all_found = candidate, tap, True
            continue
        taken = candidate > y[outputs]
        if has_nan:
            taken |= np.isnan(candidate)
        if not all_found:
            taken |= ~found[outputs]
            taken &= select(inside, inputs, x.shape)
            found[outputs] |= select(inside, inputs, x.shape)
            all_found = inside is None and candidate.shape == shape
        y[outputs] = chosen_values(taken, candidate, y[outputs])
        tap = np.broadcast_to(argmax.dtype.type(tap), taken.shape)
        argmax[outputs] = chosen_values(taken, tap, argmax[outputs])
    return y, argmax


def _forward_global(
    x: np.ndarray, window: Window, channels_last: bool, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """For all taps at once."""
    planes = np.ascontiguousarray(planes_of(x, channels_last))
    tap = planes.argmax(axis=-1, keepdims=True)
    if x.dtype.kind not in "biu":
        nan = np.isnan(planes)
        last = planes.shape[-1] - 1 - nan[..., ::-1].argmax(axis=-1, keepdims=True)
        tap = np.where(nan.any(axis=-1, keepdims=True), last, tap)
    y = np.take_along_axis(planes, tap, axis=-1)
    return y.reshape(shape), tap.astype(argmax_dtype(window)).reshape(shape)


@ieee
def max_pool_gather(
    x: np.ndarray,
    argmax: np.ndarray,
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
    argmax : ndarray
        Shape of the output.
    window, channels_last, lengths
        As of :func:`max_pool_forward`.

    Returns
    -------
    y : ndarray
        C-contiguous, shape of the argmax, x's dtype. Linear in x; :func:`max_pool_backward` is the transpose.
    """
    outputs = x.shape[1 if not channels_last else -1] * math.prod(window.output_shape)
    y = by_samples(
        lambda part, chosen, own: _gather(part, chosen, own, window, channels_last), (x, argmax), lengths, outputs
    )
    return delivered(y, out)


def _gather(
    x: np.ndarray, argmax: np.ndarray, lengths: np.ndarray | None, window: Window, channels_last: bool
) -> np.ndarray:
    y = np.zeros(argmax.shape, x.dtype)
    inside = inside_lengths(lengths, window, channels_last)
    for _, tap, outputs, inputs in window_taps(window, channels_last):
        chosen = (argmax[outputs] == tap) & select(inside, inputs, x.shape)
        y[outputs] = chosen_values(chosen, x[inputs], y[outputs])
    return y


def max_pool_indices(
    argmax: np.ndarray, window: Window, channels_last: bool = False, lengths: np.ndarray | None = None
) -> np.ndarray:
    """Flat index in the input plane of each chosen tap, as ``torch.nn.MaxPool2d(return_indices=True)`` gives it.

    Returns
    -------
    ndarray of int64
        ``argmax``'s shape; -1 for a window with no tap that counts.
    """
    first_axis = 1 if channels_last else 2
    rest = argmax.astype(np.int64)
    flat, inside, step = np.zeros_like(rest), np.ones(argmax.shape, bool), 1
    for axis in reversed(range(window.rank)):
        shape = [1] * argmax.ndim
        shape[first_axis + axis] = -1
        origins = np.asarray(window.origins(axis)).reshape(shape)
        at = origins + rest % window.kernel[axis] * window.dilation[axis]
        rest //= window.kernel[axis]
        size = window.input_shape[axis]
        limit = size if lengths is None else lengths[:, axis].reshape([-1] + [1] * (argmax.ndim - 1))
        inside &= (at >= 0) & (at < limit)
        flat += at * step
        step *= size
    return np.where(inside, flat, -1)


@ieee
def max_pool_backward(
    dy: np.ndarray,
    argmax: np.ndarray,
    window: Window,
    channels_last: bool = False,
    lengths: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Send each gradient to the tap that won.

    Parameters
    ----------
    dy, argmax : ndarray
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
        lambda part, chosen, own: _backward(part, chosen, own, window, channels_last), (dy, argmax), lengths, inputs
    )
    return delivered(dx, out)


def _backward(
    dy: np.ndarray, argmax: np.ndarray, lengths: np.ndarray | None, window: Window, channels_last: bool
) -> np.ndarray:
    shape = with_spatial(dy.shape, window.input_shape, channels_last)
    dx = np.zeros(shape, accumulation_dtype(dy.dtype))
    if window.is_global and lengths is None:
        # What follows, but for all taps at once.
        tap = planes_of(argmax, channels_last).astype(np.intp)
        np.put_along_axis(planes_of(dx, channels_last), tap, planes_of(dy, channels_last) + dx.dtype.type(0), axis=-1)
        return dx.astype(dy.dtype, copy=False)
    # Where windows share no input, each gradient is added to the first 0.
    apart = not window.adaptive and all(
        step > (taps - 1) * dilation
        for step, taps, dilation in zip(window.stride, window.kernel, window.dilation, strict=True)
    )
    for _, tap, outputs, inputs in covering_windows(window, channels_last):
        gradients = kept_values(dy[outputs], argmax[outputs] == tap)
        if apart:
            np.add(gradients, 0, out=dx[inputs], dtype=dx.dtype)
        else:
            dx[inputs] += gradients
    return masked(dx, inside_lengths(lengths, window, channels_last)).astype(dy.dtype, copy=False)
