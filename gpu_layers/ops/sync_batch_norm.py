"""Batch norm by the statistics of all processes' parts of a batch, as a stateless pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import array_module, placed, refuse_capture, to_host
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.moments import Moments, merged
from gpu_layers.core.running import RunningStatistics
from gpu_layers.core.valid import ValidPositions
from gpu_layers.core.writes import write_count
from gpu_layers.distributed.communicator import Communicator
from gpu_layers.ops.batch_moments import count_of_part, statistics_of_part
from gpu_layers.ops.batch_norm import (
    BatchNormSaved,
    batch_norm_backward,
    check_input,
    checked_forward,
)
from gpu_layers.ops.checked import Checked
from gpu_layers.ops.checks import check_eps, check_gradient
from gpu_layers.ops.output import claim, claim_elementwise, zeros
from gpu_layers.runtime.backend import backend_for

__all__ = ["SyncBatchNormSaved", "sync_batch_norm_backward", "sync_batch_norm_forward"]


@dataclass(slots=True)
class SyncBatchNormSaved:
    """What backward needs.

    Attributes
    ----------
    local : BatchNormSaved
        This process's part, with the statistics of all.
    count : int, or array of float64, shape ()
        Values per channel in all parts; of several processes where x is, for the host does not wait for it.
    communicator : Communicator
    """

    local: BatchNormSaved
    count: int | Array
    communicator: Communicator

    @property
    def x(self) -> Array:
        """The input."""
        return self.local.x


@placed
def sync_batch_norm_moments(
    x: Array, communicator: Communicator, *, channels_last: bool = False, valid: ValidPositions | None = None
) -> Moments:
    """Moments of all processes' parts, merged in the order of their ranks. On a GPU this waits for the exchange.

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
    told = _exchanged(backend_for(x), x, count_of_part(x, channels_last, valid), communicator, channels_last, valid)
    channels, counts = x.shape[-1 if channels_last else 1], told[:, -1]
    of_parts = [
        Moments.of(int(count), part[:channels], part[channels : 2 * channels])
        for count, part in zip(counts, told.view(accumulation_dtype(x.dtype)), strict=True)
    ]
    return merged(of_parts) or of_parts[0]


def _exchanged(
    backend: ModuleType,
    x: Array,
    count: int,
    communicator: Communicator,
    channels_last: bool,
    valid: ValidPositions | None,
) -> Array:
    """Of all parts what they tell, by one exchange; ``count``: this part's values per channel."""
    if count > 1:
        own = backend.sync_batch_norm_statistics(x, count, channels_last, valid)
    else:
        # The count is exact in float64; the others' dtype goes as bytes.
        xp, (_, statistics) = array_module(x), statistics_of_part(x, channels_last, valid)
        own = xp.concatenate([statistics[:2].reshape(-1).view(np.float64), xp.full(1, float(count))])
    told = communicator.gather(own)
    if type(told) is not type(own) or told.dtype != own.dtype or told.shape != (communicator.size, *own.shape):
        raise _answered_otherwise(communicator, own, told)
    return told


def _answered_otherwise(communicator: Communicator, values: Array, told: Array) -> TypeError:
    what = [f"{type(one).__name__} of {getattr(one, 'dtype', None)}" for one in (values, told)]
    return TypeError(
        f"{type(communicator).__name__}.gather must return the arrays of {communicator.size} processes: {what[0]} and "
        f"shape {[communicator.size, *values.shape]}, got {what[1]} and shape {list(getattr(told, 'shape', ()))}"
    )


def sync_batch_norm_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    communicator: Communicator,
    *,
    eps: float = 1e-5,
    residual: Array = None,
    activation: str | None = None,
    channels_last: bool = False,
    valid: ValidPositions | None = None,
    out: Array = None,
) -> tuple[Array, SyncBatchNormSaved]:
    """:func:`batch_norm_forward` of a batch that is split between processes.

    x is read twice: for its statistics before the exchange, and for normalising after it. Of one process it is
    :func:`batch_norm_forward`.

    Parameters
    ----------
    x, gamma, beta, eps, residual, activation, channels_last
        As in :func:`batch_norm_forward`; all processes call this with parts of one batch.
    communicator : Communicator
    valid : ValidPositions, optional
        Of a padded batch, the positions that count; y and the gradients are +0 at others.
    out : array, optional
        Where to write y; must not overlap x or residual.

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
        an error in every process. TypeError also if ``communicator.gather`` returns another array than it says.
    RuntimeError
        If the other processes do not answer, or while a graph is captured.
    """
    backend = backend_for(x, optional=(gamma, beta, residual, out))
    phi, eps = _checked((x, gamma, beta, residual), activation, channels_last, eps)
    check_communicator(communicator)
    given = (gamma, beta, communicator, eps, residual, phi, channels_last, valid)
    return checked_sync_forward(x, backend, *given, out=out)


@Checked
def _checked(arrays: tuple[Array, ...], activation: str | None, channels_last: bool, eps: float) -> tuple[str, float]:
    """The activation's name, and eps."""
    x, gamma, beta, residual = arrays
    _, phi = check_input(x, gamma, beta, channels_last, residual, activation)
    return phi, check_eps(eps, accumulation_dtype(x.dtype))


@placed
def checked_sync_forward(
    x: Array,
    backend: ModuleType,
    gamma: Array,
    beta: Array,
    communicator: Communicator,
    eps: float,
    residual: Array,
    activation: str,
    channels_last: bool,
    valid: ValidPositions | None,
    running: RunningStatistics | None = None,
    out: Array = None,
) -> tuple[Array, SyncBatchNormSaved]:
    """:func:`sync_batch_norm_forward` of checked arguments, of which ``out`` is claimed here.

    The statistics are folded into ``running``, if given.
    """
    if communicator.size > 1:
        refuse_capture(x, "SyncBatchNorm of several processes", "they exchange their statistics")
    channels = x.shape[-1 if channels_last else 1]
    own = x.size // max(channels, 1) if valid is None else valid.count
    if communicator.size == 1:
        _check_values([own], x, channels, valid, communicator)
        if out is not None:
            claim(out, x.shape, x.dtype, x, residual)
        running = None if running is None else running._replace(values=own)
        y, local = checked_forward(
            backend, x, gamma, beta, eps, residual, activation, channels_last, out, running, valid
        )
        return y, SyncBatchNormSaved(local, own, communicator)
    if out is not None:
        claim(out, x.shape, x.dtype, x, residual)
    told = _exchanged(backend, x, own, communicator, channels_last, valid)
    # Only where this part has too few values they may be the only ones: else the host need not wait for the exchange.
    if own < 2:
        _check_values([*to_host(told[:, -1])], x, channels, valid, communicator)
    given = (gamma, beta, eps, channels_last, residual, activation, running, valid, out)
    y, statistics, count = backend.sync_batch_norm_normalize(x, told, *given)
    local = BatchNormSaved(x, statistics, channels_last, residual, activation, write_count(), valid)
    return y, SyncBatchNormSaved(local, count, communicator)


def _check_values(
    counts: Sequence[int], x: Array, channels: int, valid: ValidPositions | None, communicator: Communicator
) -> None:
    if sum(counts) == 1:
        shape = list(x.shape) if valid is None else [valid.count, channels]
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape} in process "
            f"{communicator.rank} of {communicator.size} and a single value in all of them"
        )


@placed
def sync_batch_norm_backward(dy: Array, saved: SyncBatchNormSaved, *, out: Array = None) -> tuple[Array, ...]:
    """Gradients of :func:`sync_batch_norm_forward`: one exchange of two sums per channel, added in rank order.

    dy, x and a residual are read twice: for the sums before the exchange, and for the gradients after it.

    With ``dbeta = sum dz`` and ``dgamma = sum dz * xhat`` over all processes and m values per channel in all of them:
    ``dx = gamma * inv_std * (dz - dbeta / m - xhat * dgamma / m)``. The sums are added in float64.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : SyncBatchNormSaved
    out : array, optional
        Where to write dx; may be dy, must not overlap x or the residual.

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
        As :func:`batch_norm_backward`; RuntimeError also if the other processes do not answer, TypeError if
        ``communicator.gather`` returns another array than it says.
    """
    local = saved.local
    if saved.communicator.size == 1:
        return batch_norm_backward(dy, local, out=out)
    backend = backend_for(dy, local.x, optional=(out,))
    check_gradient(dy, local.x.shape, local.x.dtype)
    local.check_unwritten()
    if out is not None:
        dy = claim_elementwise(out, dy, apart=(local.x, local.residual))
    communicator, is_empty = saved.communicator, local.count == 0
    if is_empty:
        xp = array_module(dy)
        sums = dgamma, dbeta = xp.zeros((2, local.statistics.shape[1]), local.statistics.dtype)
    else:
        sums, dgamma, dbeta = backend.sync_batch_norm_sums(dy, local)
    told = communicator.gather(sums)
    if type(told) is not type(sums) or told.dtype != sums.dtype or told.shape != (communicator.size, *sums.shape):
        raise _answered_otherwise(communicator, sums, told)
    if is_empty:
        dx, dresidual = zeros(dy, out), zeros(dy)
    else:
        count = saved.count
        if isinstance(count, int):
            count = array_module(dy).asarray(count, np.float64)
        dx, dresidual = backend.sync_batch_norm_input_gradient(dy, local, told, count, out)
    return (dx, dgamma, dbeta) if local.residual is None else (dx, dgamma, dbeta, dresidual)


def check_communicator(communicator: object) -> None:
    """TypeError unless it is a communicator."""
    if not isinstance(communicator, Communicator):
        raise TypeError(
            f"communicator must be a gpu_layers.distributed.Communicator, got {type(communicator).__name__}"
        )
