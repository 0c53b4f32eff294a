"""Batch normalisation in NumPy: the definition of correct.

Source: Ioffe and Szegedy, "Batch normalization", ICML 2015; the backward is its three-term gradient.
"""

from __future__ import annotations

import numpy as np

from gpu_layers.reference.activation import ACTIVATIONS
from gpu_layers.reference.ieee import ieee


def statistics_dtype(dtype: np.dtype) -> np.dtype:
    """dtype of statistics and parameters for an input dtype: float64 for float64, float32 for all others."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _channel_axis(x: np.ndarray, channels_last: bool) -> int:
    return x.ndim - 1 if channels_last else 1


def _reduced_axes(x: np.ndarray, channels_last: bool) -> tuple[int, ...]:
    channel = _channel_axis(x, channels_last)
    return tuple(axis for axis in range(x.ndim) if axis != channel)


def _per_channel(values: np.ndarray, x: np.ndarray, channels_last: bool) -> np.ndarray:
    """Shape (C,) values so that they broadcast against x."""
    shape = [1] * x.ndim
    shape[_channel_axis(x, channels_last)] = -1
    return values.reshape(shape)


def _scale(inv_std, gamma):
    return inv_std if gamma is None else gamma * inv_std


def _before_activation(x, mean, inv_std, gamma, beta, channels_last, residual):
    dtype = statistics_dtype(x.dtype)
    scale = _per_channel(_scale(inv_std, gamma), x, channels_last)
    z = (x.astype(dtype) - _per_channel(mean, x, channels_last)) * scale
    if beta is not None:
        z += _per_channel(beta, x, channels_last)
    if residual is not None:
        z += residual.astype(dtype)
    return z


def _activated(z, activation, dtype):
    phi = ACTIVATIONS[activation]
    return np.ascontiguousarray(phi.forward(z if phi.is_exact else z.astype(np.float64)).astype(dtype))


@ieee
def batch_norm_forward(
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    eps: float,
    channels_last: bool = False,
    residual: np.ndarray | None = None,
    activation: str = "identity",
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
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
    out : ndarray, optional
        Where y is written to: C-contiguous.

    Returns
    -------
    y : ndarray
        C-contiguous, x's shape and dtype.
    mean, var, inv_std : ndarray, shape (C,)
        Statistics dtype; ``var`` is the biased variance, ``inv_std = 1 / sqrt(var + eps)``.
    """
    mean, var, inv_std = batch_norm_statistics(x, eps, channels_last)
    y = batch_norm_inference(x, mean, inv_std, gamma, beta, channels_last, residual, activation)
    return _delivered(y, out), mean, var, inv_std


def _delivered(result, out):
    if out is None:
        return result
    out[...] = result
    return out


@ieee
def batch_norm_statistics(
    x: np.ndarray, eps: float, channels_last: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``mean``, biased ``var`` and ``inv_std = 1 / sqrt(var + eps)`` of each channel, in the statistics dtype.

    All three are NaN for a channel with an infinity or NaN. A variance beyond the dtype is infinite, mean and inv_std
    are right.
    """
    dtype = statistics_dtype(x.dtype)
    axes = _reduced_axes(x, channels_last)
    mean, var = _moments(x, axes)
    inv_std = 1 / np.sqrt(var + eps)
    if not np.isfinite(var).all():
        # Squares of float64 values may leave the range: these channels by values that are smaller by a power of two.
        down = 2.0**-600
        low_mean, low_var = _moments(x * np.float64(down), axes)
        beyond = ~np.isfinite(var)
        mean = np.where(beyond, np.where(np.isnan(low_var), np.nan, low_mean / down), mean)
        inv_std = np.where(beyond, down / np.sqrt(low_var), inv_std)
        var = np.where(beyond, low_var / down / down, var)
    return mean.astype(dtype), var.astype(dtype), inv_std.astype(dtype)


def _moments(x: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance along axes, in float64."""
    # Two passes, accumulated in float64 whatever the input: no cancellation. The mean is taken relative to
    # a value of the channel, so that the mean of a constant channel is that constant to the last bit.
    shift = x[tuple(slice(None) if axis not in axes else slice(0, 1) for axis in range(x.ndim))]
    shift = shift.astype(np.float64)
    # C order: the order of the sums, and so every bit, is the same for every memory layout of x.
    deviation = x.astype(np.float64, order="C") - shift
    deviation_mean = deviation.mean(axis=axes, keepdims=True)
    deviation -= deviation_mean
    mean = shift.reshape(-1) + deviation_mean.reshape(-1)
    return mean, np.square(deviation, out=deviation).mean(axis=axes)


@ieee
def batch_norm_backward(
    dy: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    inv_std: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None = None,
    channels_last: bool = False,
    residual: np.ndarray | None = None,
    activation: str = "identity",
    out: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Gradients of :func:`batch_norm_forward`.

    With ``xhat = (x - mean) * inv_std``, m values a channel and ``dz = phi'(gamma * xhat + beta + residual) * dy``:
    ``dbeta = sum dz``, ``dgamma = sum dz * xhat``,
    ``dx = gamma * inv_std * (dz - dbeta / m - xhat * dgamma / m)``, ``dresidual = dz``. Those of x and the residual are
    written to the arrays in ``out``, if there are any.

    Returns
    -------
    dx : ndarray
        x's shape and dtype.
    dgamma, dbeta : ndarray, shape (C,)
        Statistics dtype.
    dresidual : ndarray or None
        x's shape and dtype; None without a residual.
    """
    dz = _gradient_before_activation(dy, x, mean, inv_std, gamma, beta, channels_last, residual, activation)
    dgamma, dbeta, xhat = _parameter_gradients(dz, x, mean, inv_std, channels_last)
    count = max(x.size // max(mean.size, 1), 1)
    dx = _input_gradient(x, dz, xhat, dgamma / count, dbeta / count, _scale(inv_std, gamma), channels_last)
    dx, dgamma, dbeta, dresidual = _gradients(x, dx, dgamma, dbeta, dz, residual)
    return _delivered(dx, out[0]), dgamma, dbeta, None if dresidual is None else _delivered(dresidual, out[1])


@ieee
def batch_norm_gradient_sums(
    dy: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    inv_std: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None = None,
    channels_last: bool = False,
    residual: np.ndarray | None = None,
    activation: str = "identity",
) -> tuple[np.ndarray, np.ndarray]:
    """``dgamma = sum dz * xhat`` and ``dbeta = sum dz`` over a part of the batch whose statistics are given."""
    dz = _gradient_before_activation(dy, x, mean, inv_std, gamma, beta, channels_last, residual, activation)
    dgamma, dbeta, _ = _parameter_gradients(dz, x, mean, inv_std, channels_last)
    return dgamma.astype(mean.dtype), dbeta.astype(mean.dtype)


@ieee
def batch_norm_input_gradient(
    dy: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    inv_std: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    dgamma: np.ndarray,
    dbeta: np.ndarray,
    count: int,
    channels_last: bool = False,
    residual: np.ndarray | None = None,
    activation: str = "identity",
) -> tuple[np.ndarray, np.ndarray | None]:
    """``dx`` and ``dresidual`` of a part of a batch, from ``dgamma`` and ``dbeta`` of all its ``count`` values."""
    dz = _gradient_before_activation(dy, x, mean, inv_std, gamma, beta, channels_last, residual, activation)
    _, _, xhat = _parameter_gradients(dz, x, mean, inv_std, channels_last)
    mean_dz_xhat, mean_dz = (one.astype(np.float64) / count for one in (dgamma, dbeta))
    dx = _input_gradient(x, dz, xhat, mean_dz_xhat, mean_dz, _scale(inv_std, gamma), channels_last)
    dx, _, _, dresidual = _gradients(x, dx, dgamma, dbeta, dz, residual)
    return dx, dresidual


def _input_gradient(x, dz, xhat, mean_dz_xhat, mean_dz, scale, channels_last):
    """``gamma * inv_std * (dz - dbeta / m - xhat * dgamma / m)``, in float64."""
    mean_dz_xhat, mean_dz, scale = (_per_channel(one, x, channels_last) for one in (mean_dz_xhat, mean_dz, scale))
    return (dz - mean_dz - xhat * mean_dz_xhat) * scale


def _gradient_before_activation(dy, x, mean, inv_std, gamma, beta, channels_last, residual, activation):
    """Gradient of the activation's input, in float64."""
    dy = dy.astype(np.float64, order="C")
    if activation == "identity":
        return dy
    phi = ACTIVATIONS[activation]
    z = _before_activation(x, mean, inv_std, gamma, beta, channels_last, residual)
    slope = phi.derivative(z if phi.is_exact else z.astype(np.float64))
    # Not by multiplying: a clipped unit passes no gradient, were it infinite.
    return np.where(slope == 0, 0, dy * slope)


def _parameter_gradients(dz, x, mean, inv_std, channels_last):
    """``dgamma``, ``dbeta`` and ``xhat``, in float64."""
    axes = _reduced_axes(x, channels_last)
    exact_mean = _per_channel(mean.astype(np.float64), x, channels_last)
    xhat = (x.astype(np.float64, order="C") - exact_mean) * _per_channel(inv_std, x, channels_last)
    return (dz * xhat).sum(axis=axes), dz.sum(axis=axes), xhat


def _gradients(x, dx, dgamma, dbeta, dz, residual):
    dtype = statistics_dtype(x.dtype)
    dresidual = None if residual is None else np.ascontiguousarray(dz.astype(x.dtype))
    return np.ascontiguousarray(dx.astype(x.dtype)), dgamma.astype(dtype), dbeta.astype(dtype), dresidual


@ieee
def batch_norm_inference(
    x: np.ndarray,
    mean: np.ndarray,
    inv_std: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    channels_last: bool = False,
    residual: np.ndarray | None = None,
    activation: str = "identity",
) -> np.ndarray:
    """Normalise with given statistics: ``phi(gamma * (x - mean) * inv_std + beta + residual)``."""
    z = _before_activation(x, mean, inv_std, gamma, beta, channels_last, residual)
    return _activated(z, activation, x.dtype)


@ieee
def batch_norm_inference_backward(
    dy: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    inv_std: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None = None,
    channels_last: bool = False,
    residual: np.ndarray | None = None,
    activation: str = "identity",
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Gradients of :func:`batch_norm_inference`: the statistics are constants, so ``dx = gamma * inv_std * dz``.

    Returns
    -------
    dx, dgamma, dbeta, dresidual
        As :func:`batch_norm_backward`.
    """
    dz = _gradient_before_activation(dy, x, mean, inv_std, gamma, beta, channels_last, residual, activation)
    dgamma, dbeta, _ = _parameter_gradients(dz, x, mean, inv_std, channels_last)
    # A sum with +0: of no gradient comes +0, whatever the sign of gamma.
    dx = dz * _per_channel(_scale(inv_std, gamma), x, channels_last) + 0.0
    return _gradients(x, dx, dgamma, dbeta, dz, residual)
