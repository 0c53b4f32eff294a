"""Fractional max pooling in NumPy: the definition of correct."""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.fractional_window import FractionalWindow
from gpu_layers.core.philox import random_words
from gpu_layers.reference.ieee import ieee
from gpu_layers.reference.pool_taps import by_samples
from gpu_layers.reference.results import delivered

__all__ = ["fractional_max_pool_backward", "fractional_max_pool_forward"]


@ieee
def fractional_max_pool_forward(
    x: np.ndarray,
    window: FractionalWindow,
    samples: np.ndarray | None,
    seed: int,
    offset: int,
    rng_state: np.ndarray | None,
    channels_last: bool = False,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Largest value of each window, the first of equal ones, of several NaN the last; and which tap held it.

    Along each axis window i starts at ``floor((i + u) * alpha) - floor(u * alpha)``, the last at the end, with
    ``alpha = (input - kernel) / (output - 1)``, in the accumulation dtype of x.

    Parameters
    ----------
    x : ndarray
        With a batch axis.
    window : FractionalWindow
    samples : ndarray, shape (N, C, window.samples), or None
        u in [0, 1), of the accumulation dtype; for a single sample N may be missing.
    seed, offset, rng_state
        Where there are no samples: number g has the upper 24 bits of word g of this call, times 2**-24.

    Returns
    -------
    y : ndarray
        C-contiguous, x's dtype.
    argmax : ndarray of uint8
        y's shape.
    starts : ndarray of int32, shape (N * C, sum(output_shape))
        First input of each window: axis after axis, ascending in each.
    """
    planes = _planes(x, window.input_shape, channels_last)
    starts = _starts(x, len(planes), window, samples, seed, offset, rng_state)
    number = np.arange(len(planes)).reshape(-1, 1, 1, 1)
    first = _starts_of_axes(starts, window)
    y = np.empty((len(planes), *window.output_shape), x.dtype)
    argmax = np.zeros(y.shape, np.uint8)
    for tap, position in enumerate(itertools.product(*map(range, window.kernel))):
        places = tuple(axis + k for axis, k in zip(first, position, strict=True))
        candidate = planes[(number, places[0], places[1], places[2])]
        take = np.ones(y.shape, bool) if tap == 0 else (candidate > y) | np.isnan(candidate)
        y[take], argmax[take] = candidate[take], tap
    y, argmax = (_batch(one, x, window.spatial_output, channels_last) for one in (y, argmax))
    return delivered(y, out), argmax, starts


def _starts(
    x: np.ndarray,
    planes: int,
    window: FractionalWindow,
    samples: np.ndarray | None,
    seed: int,
    offset: int,
    rng_state: np.ndarray | None,
) -> np.ndarray:
    dtype = accumulation_dtype(x.dtype)
    if samples is None:
        if rng_state is not None:
            seed, offset = int(rng_state[0]), int(rng_state[1])
        words = random_words(seed, offset, 0, planes * window.samples)
        samples = (words >> np.uint32(8)).astype(dtype) * dtype.type(2.0**-24)
    samples = samples.reshape(planes, window.samples)
    starts = []
    for axis, number in enumerate(window.sample_of):
        inputs, outputs, kernel = window.input_shape[axis], window.output_shape[axis], window.kernel[axis]
        last = inputs - kernel
        u = samples[:, number : number + 1]
        alpha = dtype.type(last) / dtype.type(max(outputs - 1, 1))
        own = ((np.arange(outputs, dtype=dtype) + u) * alpha).astype(np.int32) - (u * alpha).astype(np.int32)
        own = np.minimum(own, last)
        own[:, -1] = last
        starts.append(own)
    return np.concatenate(starts, axis=1).astype(np.int32)


@ieee
def fractional_max_pool_backward(
    dy: np.ndarray,
    argmax: np.ndarray,
    starts: np.ndarray,
    window: FractionalWindow,
    channels_last: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Send each gradient to the element that won its window; contributions are added in the order of the outputs."""
    plane = math.prod(window.input_shape)

    def scattered(dy: np.ndarray, argmax: np.ndarray, starts: np.ndarray, lengths: None) -> Array:
        gradients = _planes(dy, window.output_shape, channels_last)
        starts = starts.reshape(len(gradients), starts.shape[-1])
        places = _indices(_planes(argmax, window.output_shape, channels_last), starts, window, np)
        places += np.arange(len(gradients)).reshape(-1, 1, 1, 1) * plane
        dx = np.zeros(len(gradients) * plane, accumulation_dtype(dy.dtype))
        np.add.at(dx, places.reshape(-1), gradients.astype(dx.dtype).reshape(-1))
        return _batch(dx.astype(dy.dtype), dy, window.spatial_input, channels_last)

    channels = dy.shape[-1 if channels_last else 1]
    arrays = dy, argmax, starts.reshape(len(dy), channels, sum(window.output_shape))
    return delivered(by_samples(scattered, arrays, None, channels * plane), out)


def fractional_max_pool_indices(
    argmax: Array, starts: Array, window: FractionalWindow, channels_last: bool, xp: ModuleType
) -> Array:
    """Flat index in the input plane of each maximum: int64, the argmax' shape and kind."""
    indices = _indices(_planes(argmax, window.output_shape, channels_last), starts, window, xp)
    return xp.ascontiguousarray(_batch(indices, argmax, window.spatial_output, channels_last))


def _indices(argmax: Array, starts: Array, window: FractionalWindow, xp: ModuleType) -> Array:
    rest, index, scale = argmax.astype(np.int64), 0, 1
    for axis in (2, 1, 0):
        rest, k = rest // window.kernel[axis], rest % window.kernel[axis]
        index = index + (_starts_of_axes(starts, window)[axis] + k) * scale
        scale *= window.input_shape[axis]
    return index


def _starts_of_axes(starts: Array, window: FractionalWindow) -> list[Array]:
    """Of each axis, shaped so that they broadcast to (planes, *output_shape)."""
    ends = list(itertools.accumulate(window.output_shape))
    return [
        starts[:, end - size : end].reshape(-1, *(size if one == axis else 1 for one in range(3)))
        for axis, (size, end) in enumerate(zip(window.output_shape, ends, strict=True))
    ]


def _planes(x: Array, spatial: tuple[int, ...], channels_last: bool) -> Array:
    """As (samples * channels, *spatial)."""
    if channels_last:
        x = x.transpose(0, x.ndim - 1, *range(1, x.ndim - 1))
    return x.reshape(x.shape[0] * x.shape[1], *spatial)


def _batch(planes: Array, like: Array, spatial: tuple[int, ...], channels_last: bool) -> Array:
    """Planes of these sizes in the layout of an array of the same samples and channels; C-contiguous."""
    samples, channels = like.shape[0], like.shape[-1 if channels_last else 1]
    result = planes.reshape(samples, channels, *spatial)
    return result.transpose(0, *range(2, result.ndim), 1).copy() if channels_last else result
