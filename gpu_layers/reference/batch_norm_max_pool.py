"""Max pooling of what batch norm gives, in NumPy: the definition of correct."""

from __future__ import annotations

import numpy as np

from gpu_layers.core.batch_norm_saved import BatchNormSaved
from gpu_layers.core.running import RunningStatistics
from gpu_layers.core.window import Window
from gpu_layers.reference.batch_norm import (
    batch_norm_backward,
    batch_norm_forward,
    batch_norm_inference,
    batch_norm_inference_backward,
)
from gpu_layers.reference.max_pool import max_pool_backward, max_pool_forward

__all__ = [
    "batch_norm_max_pool",
    "batch_norm_max_pool_backward",
    "batch_norm_max_pool_inference",
    "batch_norm_max_pool_inference_backward",
]


def batch_norm_max_pool(
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    eps: float,
    window: Window,
    channels_last: bool = False,
    activation: str = "identity",
    running: RunningStatistics | None = None,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pool ``batch_norm_forward`` of the arguments; y is written to ``out``, if given.

    Returns
    -------
    y, argmax : ndarray
        As ``max_pool_forward``.
    statistics : ndarray, shape (5, C)
        As ``batch_norm_forward``.
    """
    normalised, statistics = batch_norm_forward(x, gamma, beta, eps, channels_last, None, activation, running)
    return *max_pool_forward(normalised, window, channels_last, out=out), statistics


def batch_norm_max_pool_inference(
    x: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    eps: float,
    window: Window,
    channels_last: bool = False,
    activation: str = "identity",
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pool ``batch_norm_inference`` of the arguments: y and taps, as ``max_pool_forward``, and its statistics."""
    normalised, statistics = batch_norm_inference(x, mean, var, gamma, beta, eps, channels_last, None, activation)
    return *max_pool_forward(normalised, window, channels_last, out=out), statistics


def batch_norm_max_pool_backward(
    dy: np.ndarray, argmax: np.ndarray, window: Window, norm: BatchNormSaved, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``max_pool_backward``, then ``batch_norm_backward``.

    Returns
    -------
    dx, dgamma, dbeta : ndarray
        As the latter.
    """
    dz = max_pool_backward(dy, argmax, window, norm.channels_last)
    return batch_norm_backward(dz, norm, (out, None, None, None))[:3]


def batch_norm_max_pool_inference_backward(
    dy: np.ndarray, argmax: np.ndarray, window: Window, norm: BatchNormSaved, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``max_pool_backward``, then ``batch_norm_inference_backward``: dx, dgamma, dbeta."""
    dz = max_pool_backward(dy, argmax, window, norm.channels_last)
    return batch_norm_inference_backward(dz, norm, (out, None, None, None))[:3]
