"""Batch normalisation in NumPy: the definition of correct.

Source: Ioffe and Szegedy, "Batch normalization", ICML 2015; the backward is its three-term gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.batch_norm_saved import BatchNormSaved
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.moments import Moments, merged
from gpu_layers.core.running import RunningStatistics
from gpu_layers.core.valid import ValidPositions
from gpu_layers.reference.activation import ACTIVATIONS
from gpu_layers.reference.ieee import ieee
from gpu_layers.reference.padding import padded
from gpu_layers.reference.results import delivered
from gpu_layers.reference.select import kept_values

__all__ = [
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_fold",
    "batch_norm_forward",
    "batch_norm_gradient_sums",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "batch_norm_input_gradient",
    "batch_norm_merge_parts",
    "batch_norm_statistics",
]

_Three = tuple[np.ndarray, np.ndarray, np.ndarray]


def _channel_axis(x: np.ndarray, channels_last: bool) -> int:
    return x.ndim - 1 if channels_last else 1


def _reduced_axes(x: np.ndarray, channels_last: bool) -> tuple[int, ...]:
    channel = _channel_axis(x, channels_last)
    return tuple(axis for axis in range(x.ndim) if axis != channel)


_LARGE_PLANE = 1 << 10


def _per_channel(values: np.ndarray, x: np.ndarray, channels_last: bool) -> np.ndarray:
    """Shape (C,) values so that they broadcast against x."""
    plane = 1 if channels_last else math.prod(x.shape[2:])
    if 1 < plane <= _LARGE_PLANE:
        # Repeated over a plane: NumPy's loops are as long as a sample then.
        return values.repeat(plane).reshape(1, *x.shape[1:])
    shape = [1] * x.ndim
    shape[_channel_axis(x, channels_last)] = -1
    return values.reshape(shape)


# What is computed in float64 takes several times the memory of its channels: some at a time, of at least so many
# values, and at most so many times.
_LEAST_VALUES, _MOST_PARTS = 1 << 15, 8


def _parts(x: np.ndarray, channels_last: bool) -> Iterator[tuple[slice, tuple[Any, ...]]]:
    """Some channels at a time: their numbers, and where they are in arrays like x."""
    channels = x.shape[_channel_axis(x, channels_last)]
    parts = min(max(x.size // _LEAST_VALUES, 1), _MOST_PARTS)
    step = max(-(-channels // parts), 1)
    for first in range(0, channels, step):
        part = slice(first, first + step)
        yield part, ((..., part) if channels_last else (slice(None), part))


def _parts_of(saved: BatchNormSaved) -> Iterator[tuple[slice, tuple[Any, ...], BatchNormSaved]]:
    """The same, and these channels alone."""
    for part, place in _parts(saved.x, saved.channels_last):
        residual = None if saved.residual is None else saved.residual[place]
        yield part, place, replace(saved, x=saved.x[place], statistics=saved.statistics[:, part], residual=residual)


def _before_activation(saved: BatchNormSaved) -> np.ndarray:
    x, last, (mean, _, inv_std, gamma, beta) = saved.x, saved.channels_last, saved.statistics
    z = x.astype(mean.dtype, copy=False) - _per_channel(mean, x, last)
    z *= _per_channel(gamma * inv_std, x, last)
    z += _per_channel(beta, x, last)
    if saved.residual is not None:
        z += saved.residual.astype(mean.dtype, copy=False)
    return z


@ieee
@padded(0)
def batch_norm_forward(
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    eps: float,
    channels_last: bool = False,
    residual: np.ndarray | None = None,
    activation: str = "identity",
    running: RunningStatistics | None = None,
    out: np.ndarray | None = None,
    valid: ValidPositions | None = None,
    statistics: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Normalise with the statistics of the batch.

    ``y = phi(gamma * (x - mean) / sqrt(var + eps) + beta + residual)``, with the biased variance, in the statistics
    dtype (phi, if it is not exact, in float64).

    Parameters
    ----------
    x : ndarray, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
    gamma, beta : ndarray, shape (C,), or None
        Statistics dtype.
    eps : float
    channels_last : bool
    residual : ndarray, or None
        x's shape and dtype.
    activation : str
        A name in ``ACTIVATIONS``.
    running : RunningStatistics, optional
        The statistics are folded in there.
    out : ndarray, optional
        Where y is written to.
    valid : ValidPositions, optional
        Of a padded batch, the positions that count: y is +0 at others.
    statistics : ndarray, optional
        Where the statistics are written to; C-contiguous.

    Returns
    -------
    y : ndarray
        C-contiguous, x's shape and dtype.
    statistics : ndarray, shape (5, C)
        As :func:`batch_norm_statistics`.
    """
    own = batch_norm_statistics(x, gamma, beta, eps, channels_last, running)
    statistics = delivered(own, statistics)
    return _normalized(BatchNormSaved(x, statistics, channels_last, residual, activation), out), statistics


def _normalized(saved: BatchNormSaved, out: np.ndarray | None) -> np.ndarray:
    x, phi = saved.x, ACTIVATIONS[saved.activation]
    y = np.empty(x.shape, x.dtype) if out is None else out
    for _, place, own in _parts_of(saved):
        y[place] = phi.forward_of(_before_activation(own), x.dtype)
    return y


@ieee
@padded()
def batch_norm_statistics(
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    eps: float,
    channels_last: bool = False,
    running: RunningStatistics | None = None,
    valid: ValidPositions | None = None,
) -> np.ndarray:
    """The statistics and the parameters of the channels, which a forward saves.

    Mean, variance and ``inv_std`` are NaN for a channel with an infinity or NaN. A variance beyond the dtype is
    infinite; mean and inv_std are right then.

    Returns
    -------
    ndarray, shape (5, C)
        Rows ``mean``, biased ``var``, ``inv_std = 1 / sqrt(var + eps)``, gamma (1 without one), beta (0 without one);
        statistics dtype.
    """
    statistics = np.empty((5, x.shape[_channel_axis(x, channels_last)]), accumulation_dtype(x.dtype))
    for part, place in _parts(x, channels_last):
        statistics[:3, part] = _moments_and_deviation(x[place], eps, _reduced_axes(x, channels_last))
    _keep_parameters(statistics, gamma, beta)
    if running is not None:
        batch_norm_fold(statistics, running)
    return statistics


def _moments_and_deviation(x: np.ndarray, eps: float, axes: tuple[int, ...]) -> _Three:
    """Mean, variance and ``1 / sqrt(var + eps)``, in float64."""
    mean, var = _moments(x, axes)
    inv_std = 1 / np.sqrt(var + eps)
    if not np.isfinite(var).all():
        # Squares of float64 values may leave the range: these channels by values that are smaller by a power of two.
        down = 2.0**-600
        low_mean, low_var = _moments(x * np.float64(down), axes)
        beyond = ~np.isfinite(var)
        mean = np.where(beyond, np.where(np.isnan(low_var), np.nan, low_mean / down), mean)
        inv_std = np.where(beyond, down / np.sqrt(low_var + eps * down * down), inv_std)
        var = np.where(beyond, low_var / down / down, var)
    return mean, var, inv_std


def _moments(x: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance along axes, in float64."""
    # Two passes, accumulated in float64 for any input: no cancellation. The mean is taken relative to
    # a value of the channel, so that the mean of a constant channel is that constant to the last bit.
    shift = x[tuple(slice(None) if axis not in axes else 0 for axis in range(x.ndim))].astype(np.float64)
    last = x.ndim - 1 not in axes
    # C order: the order of the sums, and so every bit, is the same for every memory layout of x.
    deviation = x.astype(np.float64, order="C")
    deviation -= _per_channel(shift, x, last)
    deviation_mean = deviation.mean(axis=axes)
    deviation -= _per_channel(deviation_mean, x, last)
    return shift + deviation_mean, np.square(deviation, out=deviation).mean(axis=axes)


def _keep_parameters(statistics: np.ndarray, gamma: np.ndarray | None, beta: np.ndarray | None) -> None:
    statistics[3] = 1 if gamma is None else gamma
    statistics[4] = 0 if beta is None else beta


@ieee
def batch_norm_fold(statistics: np.ndarray, running: RunningStatistics, accepted: np.ndarray | None = None) -> None:
    """Fold the statistics of a batch into running ones: ``running = (1 - momentum) * running + momentum * batch``.

    Parameters
    ----------
    statistics : ndarray, shape (5, C)
        As of :func:`batch_norm_statistics`.
    running : RunningStatistics
        Without a momentum every batch counts alike: the momentum is 1 over their number.
    accepted : ndarray of bool, of one element, optional
        Whether the batch is taken.
    """
    mean, var = statistics[:2]
    taken = accepted is None or bool(accepted)
    if running.finite_only:
        taken = taken and bool(np.isfinite(mean).all() and np.isfinite(var).all())
    if not taken:
        if running.skipped is not None:
            running.skipped[...] += 1
        return
    running.batches[...] += 1
    if running.values == 0:
        return
    momentum = 1.0 / int(running.batches) if running.momentum is None else running.momentum
    numbers = (1 - momentum, momentum, running.values / max(running.values - 1, 1))
    old, newest, unbiased = (mean.dtype.type(one) for one in numbers)
    for average, batch in ((running.mean, mean), (running.var, var * unbiased)):
        average[...] = average * old + batch * newest


@ieee
def batch_norm_merge_parts(
    parts: np.ndarray, counts: tuple[int, ...] | np.ndarray, channels: int, running: RunningStatistics | None = None
) -> tuple[np.ndarray, Array]:
    """Mean and biased variance of a batch that comes in parts, merged in float64 in their order.

    Parameters
    ----------
    parts : ndarray, shape (parts, at least 2 C)
        Of each part first the means, then the variances; in the statistics dtype.
    counts : tuple of int, or ndarray of float64, shape (parts,)
        Values per channel in each.
    channels : int
        C.
    running : RunningStatistics, optional
        The statistics are folded in there. How many values it has is not asked.

    Returns
    -------
    statistics : ndarray, shape (2, C)
        0 of no values.
    count : int, or ndarray of float64, shape ()
        Values per channel in all parts; an array if ``counts`` is one.
    """
    of_parts = [
        Moments.of(int(count), part[:channels], part[channels : 2 * channels])
        for count, part in zip(counts, parts, strict=True)
    ]
    found = merged(of_parts)
    count = 0 if found is None else found.count
    statistics = np.zeros((2, channels), parts.dtype)
    if found is not None:
        statistics[...] = found.mean, found.var
    if running is not None:
        batch_norm_fold(statistics, running._replace(values=count))
    return statistics, count if isinstance(counts, tuple) else np.array(count, np.float64)


@ieee
@padded(0, 3)
def batch_norm_backward(
    dy: np.ndarray, saved: BatchNormSaved, out: tuple[np.ndarray | None, ...] = (None, None, None, None)
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Gradients of :func:`batch_norm_forward`.

    With ``xhat = (x - mean) * inv_std``, m values a channel and ``dz = phi'(gamma * xhat + beta + residual) * dy``:
    ``dbeta = sum dz``, ``dgamma = sum dz * xhat``,
    ``dx = gamma * inv_std * (dz - dbeta / m - xhat * dgamma / m)``, ``dresidual = dz``. They are written to the arrays
    in ``out``, where these are not None. The first may be dy.

    Returns
    -------
    dx : ndarray
        x's shape and dtype.
    dgamma, dbeta : ndarray, shape (C,)
        Statistics dtype.
    dresidual : ndarray or None
        x's shape and dtype; None without a residual.
    """
    count = max(saved.x.size // max(saved.statistics.shape[1], 1), 1)

    def in_float64(dz: np.ndarray, own: BatchNormSaved, part: slice) -> _Three:
        dgamma, dbeta, xhat = _parameter_gradients(dz, own)
        return _input_gradient(dz, xhat, dgamma / count, dbeta / count, own), dgamma, dbeta

    return _gradients(in_float64, dy, saved, out)


@ieee
@padded()
def batch_norm_gradient_sums(dy: np.ndarray, saved: BatchNormSaved) -> tuple[np.ndarray, np.ndarray]:
    """``dgamma = sum dz * xhat`` and ``dbeta = sum dz`` over a part of the batch whose statistics are given."""
    sums = np.empty((2, saved.statistics.shape[1]), saved.statistics.dtype)
    for part, place, own in _parts_of(saved):
        sums[0, part], sums[1, part], _ = _parameter_gradients(_gradient_before_activation(dy[place], own), own)
    return sums[0], sums[1]


@ieee
def batch_norm_add_gradients(sums: np.ndarray, count: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """``dgamma`` and ``dbeta`` of all parts of a batch, added in float64 in their order; or these over all its values.

    Parameters
    ----------
    sums : ndarray, shape (parts, 2, C)
        In the statistics dtype.
    count : ndarray of float64, shape (), optional
        Values per channel in all parts.

    Returns
    -------
    dgamma, dbeta : ndarray, shape (C,)
        In the dtype of ``sums``. With a count in float64, if no kernel gives them: :func:`batch_norm_input_gradient`
        takes these with a count of 1.
    """
    total = sums[0].astype(np.float64)
    for part in sums[1:]:
        total = total + part
    dgamma, dbeta = total.astype(sums.dtype)
    return (dgamma, dbeta) if count is None else (dgamma.astype(np.float64) / count, dbeta.astype(np.float64) / count)


@ieee
@padded(0, 1)
def batch_norm_input_gradient(
    dy: np.ndarray,
    saved: BatchNormSaved,
    dgamma: np.ndarray,
    dbeta: np.ndarray,
    count: int,
    out: tuple[np.ndarray | None, ...] = (None, None),
) -> tuple[np.ndarray, np.ndarray | None]:
    """``dx`` and ``dresidual`` of a part of a batch, from ``dgamma`` and ``dbeta`` of all its ``count`` values.

    They are written to the arrays in ``out``, where these are not None.
    """
    mean_dz_xhat, mean_dz = (one.astype(np.float64) / count for one in (dgamma, dbeta))

    def in_float64(dz: np.ndarray, own: BatchNormSaved, part: slice) -> _Three:
        dx = _input_gradient(dz, _normalized_values(own), mean_dz_xhat[part], mean_dz[part], own)
        return dx, dgamma[part], dbeta[part]

    dx, _, _, dresidual = _gradients(in_float64, dy, saved, (out[0], None, None, out[1]))
    return dx, dresidual


def _input_gradient(
    dz: np.ndarray, xhat: np.ndarray, mean_dz_xhat: np.ndarray, mean_dz: np.ndarray, saved: BatchNormSaved
) -> np.ndarray:
    """``gamma * inv_std * (dz - dbeta / m - xhat * dgamma / m)``, in float64, where dz was; xhat is overwritten."""
    numbers = (mean_dz_xhat, mean_dz, saved.gamma * saved.inv_std)
    mean_dz_xhat, mean_dz, scale = (_per_channel(one, saved.x, saved.channels_last) for one in numbers)
    dz -= mean_dz
    dz -= np.multiply(xhat, mean_dz_xhat, out=xhat)
    dz *= scale
    return dz


def _gradient_before_activation(dy: np.ndarray, saved: BatchNormSaved) -> np.ndarray:
    """Gradient of the activation's input, in float64."""
    dy = dy.astype(np.float64, order="C")
    if saved.activation == "identity":
        return dy
    slope = ACTIVATIONS[saved.activation].derivative_of(_before_activation(saved), saved.x.dtype)
    # Not by multiplying: a clipped unit passes no gradient, were it infinite.
    return kept_values(dy * slope, slope != 0)


def _normalized_values(saved: BatchNormSaved) -> np.ndarray:
    """``xhat``, in float64."""
    xhat = saved.x.astype(np.float64, order="C")
    xhat -= _per_channel(saved.mean.astype(np.float64), saved.x, saved.channels_last)
    xhat *= _per_channel(saved.inv_std, saved.x, saved.channels_last)
    return xhat


def _parameter_gradients(dz: np.ndarray, saved: BatchNormSaved) -> _Three:
    """``dgamma``, ``dbeta`` and ``xhat``, in float64."""
    axes, xhat = _reduced_axes(saved.x, saved.channels_last), _normalized_values(saved)
    return (dz * xhat).sum(axis=axes), dz.sum(axis=axes), xhat


def _gradients(
    in_float64: Callable[[np.ndarray, BatchNormSaved, slice], _Three],
    dy: np.ndarray,
    saved: BatchNormSaved,
    out: tuple[np.ndarray | None, ...] = (None, None, None, None),
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Gradients of x, gamma, beta and the residual, of some channels at a time.

    ``in_float64(dz, own, part)`` gives the first three of the channels ``part``, whose record is ``own``; it may write
    to dz.
    """
    x, (dx, dgamma, dbeta, dresidual) = saved.x, out
    dx = np.empty(x.shape, x.dtype) if dx is None else dx
    if saved.residual is None:
        dresidual = None
    elif dresidual is None:
        dresidual = np.empty(x.shape, x.dtype)
    dgamma, dbeta = (
        np.empty(saved.statistics.shape[1], accumulation_dtype(x.dtype)) if one is None else one
        for one in (dgamma, dbeta)
    )
    for part, place, own in _parts_of(saved):
        dz = _gradient_before_activation(dy[place], own)
        if dresidual is not None:
            dresidual[place] = dz
        dx[place], dgamma[part], dbeta[part] = in_float64(dz, own, part)
    return dx, dgamma, dbeta, dresidual


@ieee
def batch_norm_double_backward(
    ddx: np.ndarray,
    ddgamma: np.ndarray,
    ddbeta: np.ndarray,
    ddresidual: np.ndarray | None,
    dy: np.ndarray,
    saved: BatchNormSaved,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of ``sum(ddx * dx) + sum(ddgamma * dgamma) + sum(ddbeta * dbeta) + sum(ddresidual * dresidual)``.

    Where ``dx``, ``dgamma``, ``dbeta`` and ``dresidual`` are those of :func:`batch_norm_backward`, as functions of
    ``dy``, ``x`` and ``gamma``; the activation is straight on either side of 0. ``ddy`` is written to ``out``, if
    given, which may be dy, ddx or ddresidual.

    Returns
    -------
    ddy, dx : ndarray
        Of ``dy`` and ``x``: their shape and dtype.
    dgamma : ndarray, shape (C,)
        Of ``gamma``; statistics dtype.
    """
    x, (_, _, inv_std, gamma, _) = saved.x, saved.statistics.astype(np.float64)
    axes = _reduced_axes(x, saved.channels_last)
    w = _gradient_before_activation(dy, saved)
    v = ddx.astype(np.float64, order="C")
    _, _, xhat = _parameter_gradients(w, saved)

    def per_channel(values: Array) -> np.ndarray:
        return _per_channel(np.asarray(values, np.float64), x, saved.channels_last)

    def mean(values: np.ndarray) -> np.ndarray:
        return values.mean(axis=axes)

    mean_v, mean_v_xhat, mean_w, mean_w_xhat = mean(v), mean(v * xhat), mean(w), mean(w * xhat)
    scale = gamma * inv_std
    # The backward is a symmetric map of w, and dx its image.
    dw = per_channel(scale) * (v - per_channel(mean_v) - xhat * per_channel(mean_v_xhat))
    dw += per_channel(ddgamma) * xhat + per_channel(ddbeta)
    if ddresidual is not None:
        dw += ddresidual.astype(np.float64)
    ddy = _gradient_before_activation(dw, saved)
    # Of xhat, by which x enters besides inv_std, and of inv_std.
    dxhat = per_channel(ddgamma - scale * mean_v_xhat) * w - per_channel(scale * mean_w_xhat) * v
    product = mean(v * w) - mean_v * mean_w - mean_v_xhat * mean_w_xhat
    dx = dxhat - per_channel(mean(dxhat)) - xhat * per_channel(mean(dxhat * xhat) + scale * product)
    dx *= per_channel(inv_std)
    dgamma = inv_std * product * (x.size // gamma.size)
    ddy, dx = (np.ascontiguousarray(one.astype(x.dtype)) for one in (ddy, dx))
    return delivered(ddy, out), dx, dgamma.astype(saved.statistics.dtype)


@ieee
@padded(0)
def batch_norm_inference(
    x: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    eps: float,
    channels_last: bool = False,
    residual: np.ndarray | None = None,
    activation: str = "identity",
    out: np.ndarray | None = None,
    valid: ValidPositions | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Normalise with given statistics: ``phi(gamma * (x - mean) / sqrt(var + eps) + beta + residual)``.

    Returns
    -------
    y, statistics
        As :func:`batch_norm_forward`; the latter are copies of what was given, with ``1 / sqrt(var + eps)``, rounded
        once.
    """
    statistics = np.empty((5, mean.size), accumulation_dtype(x.dtype))
    statistics[0], statistics[1], statistics[2] = mean, var, 1 / np.sqrt(var.astype(np.float64) + eps)
    _keep_parameters(statistics, gamma, beta)
    return _normalized(BatchNormSaved(x, statistics, channels_last, residual, activation), out), statistics


@ieee
@padded(0, 3)
def batch_norm_inference_backward(
    dy: np.ndarray, saved: BatchNormSaved, out: tuple[np.ndarray | None, ...] = (None, None, None, None)
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Gradients of :func:`batch_norm_inference`: the statistics are constants, so ``dx = gamma * inv_std * dz``.

    Returns
    -------
    dx, dgamma, dbeta, dresidual
        As :func:`batch_norm_backward`.
    """

    def in_float64(dz: np.ndarray, own: BatchNormSaved, part: slice) -> _Three:
        dgamma, dbeta, _ = _parameter_gradients(dz, own)
        # A sum with +0: of no gradient comes +0, whatever the sign of gamma.
        dx = dz * _per_channel(own.gamma * own.inv_std, own.x, own.channels_last) + 0.0
        return dx, dgamma, dbeta

    return _gradients(in_float64, dy, saved, out)
