"""Pooling in NumPy: the definition of correct.

Every function loops over the taps of the window, never over outputs: for each tap, all windows at once are
one strided view of the (padded) input.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpu_layers.reference.ieee import ieee
from gpu_layers.runtime.cuda import array_module
from gpu_layers.window import Window


def tap_dtype(window: Window) -> np.dtype:
    """Smallest unsigned dtype that numbers the taps of a window."""
    return np.min_scalar_type(window.taps - 1)


def _accumulation_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _spatial_axes(rank: int, channels_last: bool) -> slice:
    """Where the spatial axes of a batched array stand."""
    return slice(1, 1 + rank) if channels_last else slice(2, 2 + rank)


def _with_spatial(shape: tuple[int, ...], spatial: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    axes = _spatial_axes(len(spatial), channels_last)
    return shape[: axes.start] + tuple(spatial) + shape[axes.stop :]


def _taps(window: Window, channels_last: bool) -> Iterator[tuple[int, tuple, tuple]]:
    """For each tap that touches the input: its number, which outputs use it, and which inputs they read.

    The two are index tuples into the output and the input, of the same extent: nothing is ever padded.
    """
    for tap, position in enumerate(itertools.product(*(range(size) for size in window.kernel))):
        outputs, inputs = [], []
        for axis, k in enumerate(position):
            stride, size = window.stride[axis], window.input_shape[axis]
            first = k * window.dilation[axis] - window.pad_before[axis]
            begin = max(0, -(first // stride))  # the first window whose tap is not in the leading padding
            end = min(window.output_shape[axis], (size - 1 - first) // stride + 1)
            if end <= begin:
                break
            outputs.append(slice(begin, end))
            low = first + begin * stride
            inputs.append(slice(low, low + (end - begin - 1) * stride + 1, stride))
        else:
            lead = (slice(None),) * (1 if channels_last else 2)
            yield tap, (*lead, *outputs), (*lead, *inputs)


def _along(values: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """Values along one spatial axis, shaped to broadcast against the other axes."""
    return values.reshape([-1] + [1] * (rank - 1 - axis))


@ieee
def max_pool_forward(x: np.ndarray, window: Window, channels_last: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Largest value of each window, and which tap held it.

    The first of equal maxima wins, in the order of the taps (last axis fastest); of several NaN the last one.
    A window with no tap inside the input gives -inf.

    Parameters
    ----------
    x : ndarray, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
    window : Window
    channels_last : bool

    Returns
    -------
    y : ndarray
        C-contiguous, x's dtype.
    taps : ndarray of uint8 (uint16, uint32 for windows of more than 256, 65,536 taps)
        y's shape. Number of the chosen tap; 0 for a window with no tap inside the input.
    """
    shape = _with_spatial(x.shape, window.output_shape, channels_last)
    y = np.full(shape, -np.inf, x.dtype)
    taps = np.zeros(shape, tap_dtype(window))
    found = np.zeros(shape, bool)
    for tap, outputs, inputs in _taps(window, channels_last):
        candidate = x[inputs]
        take = (candidate > y[outputs]) | np.isnan(candidate) | ~found[outputs]
        y[outputs] = np.where(take, candidate, y[outputs])
        taps[outputs][take] = tap
        found[outputs] = True
    return y, taps


@ieee
def max_pool_backward(dy: np.ndarray, taps: np.ndarray, window: Window, channels_last: bool = False) -> np.ndarray:
    """Send each gradient to the tap that won.

    Parameters
    ----------
    dy, taps : ndarray
        Shape of the output.
    window : Window
    channels_last : bool

    Returns
    -------
    dx : ndarray
        C-contiguous, dy's dtype. Contributions are added in the order of the taps.
    """
    shape = _with_spatial(dy.shape, window.input_shape, channels_last)
    dx = np.zeros(shape, _accumulation_dtype(dy.dtype))
    for tap, outputs, inputs in _taps(window, channels_last):
        dx[inputs] += np.where(taps[outputs] == tap, dy[outputs], dy.dtype.type(0))
    return _rounded(dx, dy.dtype)


def max_pool_indices(taps: Any, window: Window, channels_last: bool = False) -> Any:
    """Flat index in the input plane of each chosen tap, as ``torch.nn.MaxPool2d(return_indices=True)`` gives it.

    Returns
    -------
    array of int64
        ``taps``'s shape and kind, NumPy or CuPy; -1 for a window with no tap inside the input.
    """
    xp = array_module(taps)
    axes = _spatial_axes(window.rank, channels_last)
    rest = taps.astype(np.int64)
    flat, inside, step = xp.zeros_like(rest), xp.ones(taps.shape, bool), 1
    for axis in reversed(range(window.rank)):
        along = [1] * taps.ndim
        along[axes.start + axis] = -1
        first = xp.arange(window.output_shape[axis]) * window.stride[axis] - window.pad_before[axis]
        at = first.reshape(along) + rest % window.kernel[axis] * window.dilation[axis]
        rest //= window.kernel[axis]
        inside &= (at >= 0) & (at < window.input_shape[axis])
        flat += at * step
        step *= window.input_shape[axis]
    return xp.where(inside, flat, -1)


def _divisors(
    window: Window,
    count_include_pad: bool,
    divisor_override: int | None,
    channels_last: bool,
    dtype: np.dtype,
) -> np.ndarray:
    """Divisor of each window, broadcastable against the output."""
    if divisor_override is not None:
        return np.asarray(divisor_override, dtype)
    counts = np.ones((), np.int64)
    for axis in range(window.rank):
        counts = counts * _along(window.divisor_counts(axis, count_include_pad), axis, window.rank)
    # A window of nothing but padding sums to 0: any divisor but 0 leaves it 0.
    counts = np.maximum(counts, 1).astype(dtype)
    return counts[..., None] if channels_last else counts


@ieee
def avg_pool_forward(
    x: np.ndarray,
    window: Window,
    channels_last: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> np.ndarray:
    """Sum of each window over its divisor.

    Parameters
    ----------
    x : ndarray, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
    window : Window
    channels_last : bool
    count_include_pad : bool
        Divide by the taps within the padded extent, else by those within the input.
    divisor_override : int, optional
        Divide by this instead.

    Returns
    -------
    y : ndarray
        C-contiguous, x's dtype; summed in float32 (float64 for float64), in the order of the taps.
    """
    dtype = _accumulation_dtype(x.dtype)
    total = np.zeros(_with_spatial(x.shape, window.output_shape, channels_last), dtype)
    for _, outputs, inputs in _taps(window, channels_last):
        total[outputs] += x[inputs]
    total /= _divisors(window, count_include_pad, divisor_override, channels_last, dtype)
    return _rounded(total, x.dtype)


@ieee
def avg_pool_backward(
    dy: np.ndarray,
    window: Window,
    channels_last: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> np.ndarray:
    """Spread each gradient evenly over the window's taps inside the input.

    Returns
    -------
    dx : ndarray
        C-contiguous, dy's dtype. Contributions are added in the order of the taps.
    """
    dtype = _accumulation_dtype(dy.dtype)
    share = dy.astype(dtype) / _divisors(window, count_include_pad, divisor_override, channels_last, dtype)
    dx = np.zeros(_with_spatial(dy.shape, window.input_shape, channels_last), dtype)
    for _, outputs, inputs in _taps(window, channels_last):
        dx[inputs] += share[outputs]
    return _rounded(dx, dy.dtype)


def _rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return values.astype(dtype, copy=False)
