"""Batch norm of groups of samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from gpu_layers.core.batch_norm_saved import GhostBatchNormSaved
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.running import RunningStatistics
from gpu_layers.core.valid import ValidPositions
from gpu_layers.reference.batch_norm import (
    batch_norm_add_gradients,
    batch_norm_backward,
    batch_norm_forward,
    batch_norm_merge_parts,
)

__all__ = ["ghost_batch_norm_backward", "ghost_batch_norm_forward"]


def ghost_batch_norm_forward(
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    eps: float,
    bounds: tuple[int, ...],
    channels_last: bool = False,
    residual: np.ndarray | None = None,
    activation: str = "identity",
    valid: Sequence[ValidPositions] = (),
    counts: tuple[int, ...] | None = None,
    running: RunningStatistics | None = None,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """:func:`batch_norm_forward` of each group of samples.

    Parameters
    ----------
    x, gamma, beta, eps, channels_last, residual, activation
        As of :func:`batch_norm_forward`.
    bounds : tuple of int
        Group g is ``x[bounds[g]:bounds[g + 1]]``, which is not empty.
    valid : sequence of ValidPositions
        Of a padded batch, the positions of each group that count.
    counts : tuple of int, optional
        Values per channel in each group: the statistics of all are merged then.
    running : RunningStatistics, optional
        The merged statistics are folded in there, if there are counts.
    out : ndarray, optional
        Where y is written to.

    Returns
    -------
    y : ndarray
    statistics : ndarray, shape (groups, at least 5 C)
        Of each group, one after the other.
    merged : ndarray, shape (2, C), or None
        Mean and biased variance of the whole batch, as of :func:`batch_norm_merge_parts`.
    """
    channels = x.shape[-1 if channels_last else 1]
    y = np.empty(x.shape, x.dtype) if out is None else out
    statistics = np.empty((len(bounds) - 1, 5 * channels), accumulation_dtype(x.dtype))
    for group, (start, stop) in enumerate(pairwise(bounds)):
        own = None if residual is None else residual[start:stop]
        kept, positions = statistics[group].reshape(5, channels), valid[group] if valid else None
        batch_norm_forward(
            *(x[start:stop], gamma, beta, eps, channels_last, own, activation, None, y[start:stop], positions, kept)
        )
    if counts is None:
        return y, statistics, None
    return y, statistics, batch_norm_merge_parts(statistics, counts, channels, running)[0]


def ghost_batch_norm_backward(
    dy: np.ndarray, saved: GhostBatchNormSaved, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Gradients of :func:`ghost_batch_norm_forward`: of each group, dgamma and dbeta added in float64.

    dx is written to ``out``, if given, which may be dy.

    Returns
    -------
    dx, dgamma, dbeta, dresidual
        As of :func:`batch_norm_backward`.
    """
    dx = np.empty(dy.shape, dy.dtype) if out is None else out
    dresidual = None if saved.residual is None else np.empty(dy.shape, dy.dtype)
    sums = np.empty((len(saved.groups), 2, saved.groups[0].mean.size), saved.statistics.dtype)
    for (start, stop), group, of_channels in zip(pairwise(saved.bounds), saved.groups, sums, strict=True):
        own = None if dresidual is None else dresidual[start:stop]
        batch_norm_backward(dy[start:stop], group, (dx[start:stop], *of_channels, own))
    return dx, *batch_norm_add_gradients(sums), dresidual
