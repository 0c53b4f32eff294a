"""Batch norm by the statistics of all processes' parts of a batch, as a stateless pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import array_module, is_capturing, placed
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.moments import Moments, merged
from gpu_layers.core.valid import ValidPositions
from gpu_layers.distributed.communicator import Communicator
from gpu_layers.ops.batch_moments import batch_norm_moments
from gpu_layers.ops.batch_norm import BatchNormSaved, check_input, checked_inference
from gpu_layers.ops.checks import check_eps, check_gradient
from gpu_layers.runtime.backend import backend_for

__all__ = ["SyncBatchNormSaved", "sync_batch_norm_backward", "sync_batch_norm_forward"]


@dataclass(slots=True)
class SyncBatchNormSaved:
    """What backward needs.

    Attributes
    ----------
    local : BatchNormSaved
        This process's part, with the statistics of all.
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


@placed
def sync_batch_norm_moments(
    x: Array, communicator: Any, *, channels_last: bool = False, valid: ValidPositions | None = None
) -> Moments:
    """Moments of all processes' parts: one exchange of count, mean and sum of squared deviations, in float64.

    They are merged in the order of the ranks (Chan): no cancellation, and the same bits in every process.

    Parameters
    ----------
    x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
        N may differ between processes, and may be 0.
    communicator : Communicator
    channels_last : bool
    valid : ValidPositions, optional
        Of a padded batch, the positions that count.

    Returns
    -------
    Moments

    Raises
    ------
    TypeError, ValueError
        For a wrong array type, dtype or rank.
    RuntimeError
        If the other processes do not answer.
    """
    own = batch_norm_moments(x, channels_last=channels_last, valid=valid)
    xp, channels = array_module(x), own.mean.size
    told = communicator.gather(xp.concatenate([xp.full(1, float(own.count)), own.mean, own.squares]))
    # On a GPU this waits for the exchange.
    counts = [int(count) for count in told[:, 0]]
    parts = [
        Moments(count, row[1 : 1 + channels], row[1 + channels :]) for count, row in zip(counts, told, strict=True)
    ]
    return merged(parts) or own


@placed
def sync_batch_norm_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    communicator: Any,
    *,
    eps: float = 1e-5,
    residual: Array = None,
    activation: str | None = None,
    channels_last: bool = False,
    valid: ValidPositions | None = None,
) -> tuple[Array, SyncBatchNormSaved]:
    """:func:`batch_norm_forward` of a batch that is split between processes.

    x is read twice: for its statistics before the exchange, and for normalising after it.

    Parameters
    ----------
    x, gamma, beta, eps, residual, activation, channels_last
        As in :func:`batch_norm_forward`; all processes call this with parts of one batch.
    communicator : Communicator
    valid : ValidPositions, optional
        Of a padded batch, the positions that count; y and the gradients are +0 at others.

    Returns
    -------
    y : array
        This process's part, x's shape and dtype.
    saved : SyncBatchNormSaved
        For :func:`sync_batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_forward`, before anything is exchanged. A single value per channel in all parts together is
        an error in every process.
    RuntimeError
        If the other processes do not answer, or while a graph is captured.
    """
    backend = backend_for(x, optional=(gamma, beta, residual))
    _, phi = check_input(x, gamma, beta, channels_last, residual, activation)
    eps = check_eps(eps, accumulation_dtype(x.dtype))
    check_communicator(communicator)
    if is_capturing(x):
        raise RuntimeError("SyncBatchNorm cannot be captured: the processes exchange their statistics through the host")
    moments = sync_batch_norm_moments(x, communicator, channels_last=channels_last, valid=valid)
    if moments.count == 1:
        shape = list(x.shape) if valid is None else [valid.count, moments.mean.size]
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape} in process "
            f"{communicator.rank} of {communicator.size} and a single value in all of them"
        )
    dtype = accumulation_dtype(x.dtype)
    var = moments.var if moments.count else moments.squares
    given = (moments.mean.astype(dtype), var.astype(dtype), gamma, beta, eps)
    y, local = checked_inference(backend, x, *given, residual, phi, channels_last, None, valid)
    return y, SyncBatchNormSaved(local, moments, communicator)


@placed
def sync_batch_norm_backward(dy: Array, saved: SyncBatchNormSaved) -> tuple[Array, ...]:
    """Gradients of :func:`sync_batch_norm_forward`: one exchange of two sums per channel, added in rank order.

    dy, x and a residual are read twice: for the sums before the exchange, and for the gradients after it.

    With ``dbeta = sum dz`` and ``dgamma = sum dz * xhat`` over all processes and m values per channel in all of them:
    ``dx = gamma * inv_std * (dz - dbeta / m - xhat * dgamma / m)``. The sums are exchanged and added in float64.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : SyncBatchNormSaved

    Returns
    -------
    dx : array
    dgamma, dbeta : array, shape (C,)
        Sums over this process's part alone, as in PyTorch: add them over the processes, like the gradients of all other
        layers.
    dresidual : array
        Only if there was a residual.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`batch_norm_backward`; RuntimeError also if the other processes do not answer.
    """
    local = saved.local
    backend = backend_for(dy, local.x)
    check_gradient(dy, local.x.shape, local.x.dtype)
    local.check_unwritten()
    xp, dtype, is_empty = array_module(dy), local.mean.dtype, local.count == 0
    if is_empty:
        dgamma, dbeta = (xp.zeros(local.mean.shape, dtype) for _ in range(2))
    else:
        dgamma, dbeta = backend.batch_norm_gradient_sums(dy, local)
    told = saved.communicator.gather(xp.stack([dgamma, dbeta]).astype(np.float64))
    sums = told[0]
    for part in told[1:]:
        sums = sums + part
    if is_empty:
        dx, dresidual = (xp.zeros(dy.shape, dy.dtype) for _ in range(2))
    else:
        dx, dresidual = backend.batch_norm_input_gradient(dy, local, *sums.astype(dtype), saved.moments.count)
    return (dx, dgamma, dbeta) if local.residual is None else (dx, dgamma, dbeta, dresidual)


def check_communicator(communicator: Any) -> None:
    """TypeError unless it is a communicator."""
    if not isinstance(communicator, Communicator):
        raise TypeError(
            f"communicator must be a gpu_layers.distributed.Communicator, got {type(communicator).__name__}"
        )
