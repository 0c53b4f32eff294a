"""Batch norm with the statistics of several processes' batches as a stateless pair."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpu_layers.moments import Moments, merged
from gpu_layers.ops.batch_moments import batch_norm_moments
from gpu_layers.ops.batch_norm import (
    BatchNormSaved,
    batch_norm_inference,
    batch_norm_inference_backward,
)
from gpu_layers.ops.checks import check_gradient
from gpu_layers.reference.batch_norm import statistics_dtype
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.cuda import array_module


@dataclass(frozen=True)
class SyncBatchNormSaved:
    """What backward needs.

    Attributes
    ----------
    local : BatchNormSaved
        Of this process's part, with the statistics of all.
    moments : Moments
        Of all parts.
    communicator : Communicator
    """

    local: BatchNormSaved
    moments: Moments
    communicator: Any

    @property
    def x(self) -> Any:
        """The input."""
        return self.local.x


def sync_batch_norm_moments(x: Any, communicator: Any, *, channels_last: bool = False) -> Moments:
    """Moments of all processes' parts: one exchange of count, mean and sum of squared deviations, in float64.

    They are merged in the order of the ranks (Chan): no cancellation, and the same bits in every process.

    Parameters
    ----------
    x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
        N may be another one in each process, also 0.
    communicator : Communicator
    channels_last : bool
    """
    own = batch_norm_moments(x, channels_last=channels_last)
    xp, channels = array_module(x), own.mean.size
    told = communicator.gather(xp.concatenate([xp.full(1, float(own.count)), own.mean, own.squares]))
    # On a GPU this waits for the exchange.
    counts = [int(count) for count in told[:, 0]]
    parts = [
        Moments(count, row[1 : 1 + channels], row[1 + channels :]) for count, row in zip(counts, told, strict=True)
    ]
    return merged(parts) or own


def sync_batch_norm_forward(
    x: Any, gamma: Any, beta: Any, communicator: Any, *, channels_last: bool = False, **options: Any
) -> tuple[Any, SyncBatchNormSaved]:
    """:func:`batch_norm_forward` of the batch whose parts the processes have.

    Parameters
    ----------
    x, gamma, beta, channels_last, **options
        As there; all processes call this with parts of one batch.
    communicator : Communicator

    Returns
    -------
    y : array
        Of this process's part.
    saved : SyncBatchNormSaved

    Raises
    ------
    TypeError, ValueError
        As there; for one value a channel in all parts together in every process.
    RuntimeError
        If the other processes do not answer.
    """
    moments = sync_batch_norm_moments(x, communicator, channels_last=channels_last)
    if moments.count == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {list(x.shape)} in process "
            f"{communicator.rank} of {communicator.size} and a single value in all of them"
        )
    dtype = statistics_dtype(x.dtype)
    var = moments.var if moments.count else moments.squares
    y, local = batch_norm_inference(
        x, moments.mean.astype(dtype), var.astype(dtype), gamma, beta, channels_last=channels_last, **options
    )
    return y, SyncBatchNormSaved(local, moments, communicator)


def sync_batch_norm_backward(dy: Any, saved: SyncBatchNormSaved) -> tuple[Any, ...]:
    """Gradients of :func:`sync_batch_norm_forward`: one exchange of two sums a channel, added in rank order.

    With ``dbeta = sum dz`` and ``dgamma = sum dz * xhat`` over all processes and m values a channel in all of them:
    ``dx = gamma * inv_std * (dz - dbeta / m - xhat * dgamma / m)``. Half types are computed in
    float32 and rounded once.

    Returns
    -------
    dx : array
    dgamma, dbeta : array, shape (C,)
        Sums over this process's part alone, as PyTorch's: the gradients of all processes are to be added, these like
        those of any other layer.
    dresidual : array
        Only if there was a residual.
    """
    local = saved.local
    backend_for(dy, local.x)
    check_gradient(dy, local.x.shape, local.x.dtype)
    dtype = statistics_dtype(local.x.dtype)
    wide = replace(
        local,
        x=local.x.astype(dtype, copy=False),
        residual=None if local.residual is None else local.residual.astype(dtype, copy=False),
    )
    dx, dgamma, dbeta, *dresidual = batch_norm_inference_backward(dy.astype(dtype, copy=False), wide)
    xp = array_module(dy)
    told = saved.communicator.gather(xp.stack([dgamma, dbeta]).astype(np.float64))
    sums = told[0]
    for part in told[1:]:
        sums = sums + part
    if dx.size:
        dx -= _of_the_statistics(wide, sums / saved.moments.count)
    narrow = [one.astype(dy.dtype, copy=False) for one in (dx, *dresidual)]
    return (narrow[0], dgamma, dbeta, *narrow[1:])


def _of_the_statistics(saved: BatchNormSaved, means: Any) -> Any:
    """``gamma * inv_std * (mean of dz + xhat * mean of dz * xhat)``: what flows through mean and variance."""
    shape = [1] * saved.x.ndim
    shape[-1 if saved.channels_last else 1] = -1
    scale = saved.inv_std if saved.gamma is None else saved.gamma * saved.inv_std
    slope, offset = (
        (mean * scale).astype(saved.x.dtype).reshape(shape) for mean in (means[0] * saved.inv_std, means[1])
    )
    return (saved.x - saved.mean.reshape(shape)) * slope + offset
