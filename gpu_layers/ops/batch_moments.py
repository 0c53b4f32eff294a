"""The statistics of a batch, without normalising it."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_layers.core.moments import Moments
from gpu_layers.ops.checks import check_dtype
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.cuda import array_module, placed


@placed
def batch_norm_moments(x: Any, *, channels_last: bool = False) -> Moments:
    """Count, mean and sum of squared deviations of each channel, by batch norm's own kernel: x is read once.

    Parameters
    ----------
    x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
        A single value a channel is allowed here, and so is an empty batch.
    channels_last : bool

    Returns
    -------
    Moments

    Raises
    ------
    TypeError
        For a wrong array type or dtype.
    ValueError
        For an input of fewer than two axes.
    """
    backend = backend_for(x)
    check_dtype(x)
    if x.ndim < 2:
        raise ValueError(f"expected at least 2D input (got {x.ndim}D input)")
    channels = x.shape[-1] if channels_last else x.shape[1]
    xp = array_module(x)
    if x.size == 0:
        return Moments(0, xp.zeros(channels), xp.zeros(channels))
    if x.size == channels:
        mean = x.reshape(-1).astype(np.float64)
        return Moments(1, mean, mean - mean)
    statistics = backend.batch_norm_statistics(x, None, None, 1.0, channels_last)
    return Moments.of(x.size // channels, statistics[0], statistics[1])
