"""Batch norm of a part of a batch, of whose other parts the statistics and the sums of gradients are told."""

from __future__ import annotations

import numpy as np

from gpu_layers.core.batch_norm_saved import BatchNormSaved
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.running import RunningStatistics
from gpu_layers.core.valid import ValidPositions
from gpu_layers.reference.batch_norm import (
    batch_norm_add_gradients,
    batch_norm_gradient_sums,
    batch_norm_inference,
    batch_norm_input_gradient,
    batch_norm_merge_parts,
    batch_norm_statistics,
)

__all__ = [
    "sync_batch_norm_input_gradient",
    "sync_batch_norm_normalize",
    "sync_batch_norm_statistics",
    "sync_batch_norm_sums",
]


def sync_batch_norm_statistics(
    x: np.ndarray, count: int, channels_last: bool = False, valid: ValidPositions | None = None
) -> np.ndarray:
    """What a process tells of its part.

    Parameters
    ----------
    x : ndarray, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
    count : int
        Values per channel, at least two.
    channels_last : bool
    valid : ValidPositions, optional
        Of a padded batch, the positions that count.

    Returns
    -------
    ndarray of float64
        The bytes of means and biased variances, in the statistics dtype, and the count.
    """
    statistics = batch_norm_statistics(x, None, None, 1.0, channels_last, None, valid)[:2]
    return np.append(statistics.reshape(-1).view(np.float64), np.float64(count))


def sync_batch_norm_normalize(
    x: np.ndarray,
    told: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    eps: float,
    channels_last: bool = False,
    residual: np.ndarray | None = None,
    activation: str = "identity",
    running: RunningStatistics | None = None,
    valid: ValidPositions | None = None,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normalise a part by the statistics of all.

    Parameters
    ----------
    told : ndarray of float64, shape (parts, ...)
        :func:`sync_batch_norm_statistics` of each.
    x, gamma, beta, eps, channels_last, residual, activation, running, valid, out
        As of :func:`batch_norm_forward`.

    Returns
    -------
    y, statistics
        As of :func:`batch_norm_inference`.
    count : ndarray of float64, shape ()
        Values per channel in all parts.
    """
    parts, channels = told.view(accumulation_dtype(x.dtype)), x.shape[-1 if channels_last else 1]
    (mean, var), count = batch_norm_merge_parts(parts, told[:, -1], channels, running)
    given = (mean, var, gamma, beta, eps, channels_last, residual, activation, out, valid)
    return *batch_norm_inference(x, *given), np.asarray(count)


def sync_batch_norm_sums(dy: np.ndarray, saved: BatchNormSaved) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``dgamma`` and ``dbeta`` of a part, (2, C): :func:`batch_norm_gradient_sums` in one array; and either of it."""
    sums = np.stack(batch_norm_gradient_sums(dy, saved))
    return sums, sums[0], sums[1]


def sync_batch_norm_input_gradient(
    dy: np.ndarray, saved: BatchNormSaved, told: np.ndarray, count: np.ndarray, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Gradients of x and of the residual of a part.

    Parameters
    ----------
    dy : ndarray
    saved : BatchNormSaved
    told : ndarray, shape (parts, 2, C)
        Sums of :func:`sync_batch_norm_sums` of each.
    count : ndarray of float64, shape ()
        Values per channel in all parts.
    out : ndarray, optional
        Where dx is written to; may be dy.

    Returns
    -------
    dx, dresidual
        As of :func:`batch_norm_input_gradient`.
    """
    return batch_norm_input_gradient(dy, saved, *batch_norm_add_gradients(told, count), 1, (out, None))
