"""Average pooling in NumPy: the definition of correct."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.window import Window
from gpu_layers.reference.ieee import ieee
from gpu_layers.reference.pool_taps import (
    CompensatedSum,
    Step,
    by_samples,
    covering_windows,
    divisors,
    inside_lengths,
    masked,
    spatial_axes,
    window_inputs,
    window_taps,
    with_spatial,
)
from gpu_layers.reference.results import delivered

__all__ = ["avg_pool_backward", "avg_pool_forward"]

# Windows of more taps inside the input are summed in float64, without an error that grows with them; likewise the
# shares of an input that may be in more windows. ``kFew`` of ``avg_pool.cu``.
_FEW = 128


def _most(window: Window, sizes: tuple[int, ...]) -> int:
    """Taps that a window may have inside an input of these sizes, or windows of such an output that have an input."""
    return math.prod(min(kernel, size) for kernel, size in zip(window.kernel, sizes, strict=True))


def _rows(steps: Iterator[Step]) -> Iterator[Iterator[Step]]:
    """Steps along the last axis together: windows that overlap have sums of rows in common."""
    return (row for _, row in itertools.groupby(steps, key=lambda step: step.row))


@ieee
def avg_pool_forward(
    x: np.ndarray,
    window: Window,
    channels_last: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    lengths: np.ndarray | None = None,
    out: np.ndarray | None = None,
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
    lengths : ndarray of int64, shape (N, spatial axes), optional
        Size of each sample: values beyond do not count, nor do taps beyond it and its padding.

    Returns
    -------
    y : ndarray
        C-contiguous, x's dtype; summed in float32 (float64 for float64), each row of taps first. Sums of more than
        128 taps are as good as exact, or pairwise.
    """
    divisor = (count_include_pad, divisor_override)
    inputs = math.prod(x.shape[1:])
    y = by_samples(lambda part, own: _forward(part, own, window, channels_last, *divisor), (x,), lengths, inputs)
    return delivered(y, out)


def _forward(
    x: np.ndarray,
    lengths: np.ndarray | None,
    window: Window,
    channels_last: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> np.ndarray:
    dtype = accumulation_dtype(x.dtype)
    x = masked(x, inside_lengths(lengths, window, channels_last))
    shape = with_spatial(x.shape, window.output_shape, channels_last)
    taps = _most(window, window.input_shape)
    if taps > _FEW:
        one_by_one = _windows_one_by_one if math.prod(window.output_shape) <= taps else _taps_one_by_one
        total = one_by_one(x, window, channels_last, shape)
    else:
        total = np.zeros(shape, dtype)
        for row in _rows(window_taps(window, channels_last)):
            row_total = np.zeros_like(total)
            for step in row:
                row_total[step.outputs] += x[step.inputs]
            total += row_total
    total /= divisors(window, count_include_pad, divisor_override, channels_last, total.dtype, lengths)
    return total.astype(x.dtype, copy=False)


def _windows_one_by_one(x: np.ndarray, window: Window, channels_last: bool, shape: tuple[int, ...]) -> np.ndarray:
    total = np.empty(shape)
    axes = spatial_axes(window.rank, channels_last)
    lead = (slice(None),) * axes.start
    for output in np.ndindex(*window.output_shape):
        inputs = (*lead, *window_inputs(window, output))
        values = x[inputs]
        # NumPy sums neighbours pairwise, but not strided values.
        planes = np.moveaxis(values, -1, 1) if channels_last else values
        planes = np.ascontiguousarray(planes.reshape(*planes.shape[:2], -1), np.float64)
        place = (*lead, *output)
        total[place] = planes.sum(axis=-1)
    return total


def _taps_one_by_one(x: np.ndarray, window: Window, channels_last: bool, shape: tuple[int, ...]) -> np.ndarray:
    total = CompensatedSum(shape, np.float64)
    for *__, outputs, inputs in window_taps(window, channels_last):
        total.add(outputs, x[inputs])
    return total.value()


@ieee
def avg_pool_backward(
    dy: np.ndarray,
    window: Window,
    channels_last: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    lengths: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Spread each gradient evenly over the window's taps inside the input.

    Returns
    -------
    dx : ndarray
        C-contiguous, dy's dtype. Contributions are added as the forward adds taps: those along a row first, or
        compensated.
    """
    divisor = (count_include_pad, divisor_override)
    inputs = dy.shape[1 if not channels_last else -1] * math.prod(window.input_shape)
    dx = by_samples(lambda part, own: _backward(part, own, window, channels_last, *divisor), (dy,), lengths, inputs)
    return delivered(dx, out)


def _backward(
    dy: np.ndarray,
    lengths: np.ndarray | None,
    window: Window,
    channels_last: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> np.ndarray:
    dtype = accumulation_dtype(dy.dtype)
    share = dy.astype(dtype) / divisors(window, count_include_pad, divisor_override, channels_last, dtype, lengths)
    shape = with_spatial(dy.shape, window.input_shape, channels_last)
    if window.is_global and lengths is None:
        # What follows, but for all taps at once.
        return np.add(np.broadcast_to(share, shape), 0, dtype=dtype).astype(dy.dtype, copy=False)
    if _most(window, window.output_shape) > _FEW:
        sums = CompensatedSum(shape, np.float64)
        for step in covering_windows(window, channels_last):
            sums.add(step.inputs, share[step.outputs])
        return masked(sums.value(), inside_lengths(lengths, window, channels_last)).astype(dy.dtype)
    dx = np.zeros(shape, dtype)
    for row in _rows(covering_windows(window, channels_last)):
        row_dx = np.zeros_like(dx)
        for step in row:
            row_dx[step.inputs] += share[step.outputs]
        dx += row_dx
    return masked(dx, inside_lengths(lengths, window, channels_last)).astype(dy.dtype, copy=False)
