"""Batch normalisation over the parts of a batch in several processes."""

from __future__ import annotations

from gpu_layers.core.array import Array, DTypeLike, Options
from gpu_layers.core.moments import Moments
from gpu_layers.core.valid import ValidPositions
from gpu_layers.distributed.communicator import Communicator, default_communicator
from gpu_layers.layers.batch_norm import BatchNormLayer, NormalisedByBatch
from gpu_layers.layers.running_statistics import BatchStatistics
from gpu_layers.ops.sync_batch_norm import (
    check_communicator,
    checked_sync_forward,
    sync_batch_norm_backward,
    sync_batch_norm_moments,
)
from gpu_layers.runtime.backend import backend_for

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(BatchNormLayer):
    """Batch norm of input with 2 to 5 axes, in training by the statistics of all processes.

    The processes hold parts of a batch, of any size, also empty ones. y, dx and the running statistics are those of one
    process with the whole batch. Gradients of weight and bias are sums over the process's own part: add them over the
    processes, like those of all other layers. All processes must run the same forwards and backwards.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, bias, channels_last, activation, dtype
        As :class:`BatchNorm2d`.
    communicator : gpu_layers.distributed.Communicator, optional
        By default the processes that ``mpirun`` started, or this process alone.

    Raises
    ------
    TypeError, ValueError
        For a wrong type or value of these.
    RuntimeError
        If ``mpirun`` started several processes and mpi4py is missing.
    """

    _input_ranks = (2, 3, 4, 5)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        channels_last: bool = False,
        activation: str | None = None,
        dtype: DTypeLike = "float32",
        communicator: Communicator | None = None,
    ) -> None:
        options: Options = {"channels_last": channels_last, "activation": activation, "dtype": dtype}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, bias=bias, **options)
        if communicator is not None:
            check_communicator(communicator)
        self.communicator = default_communicator() if communicator is None else communicator

    def _normalise_by_batch(self, x: Array, residual: Array, valid: ValidPositions | None) -> NormalisedByBatch:
        # As in PyTorch, a layer without running statistics evaluates each process's part by itself.
        if not self.training and self.use_batch_statistics is None:
            return super()._normalise_by_batch(x, residual, valid)
        # The kernels count the values of all processes.
        running = self._running(0)
        y, saved = checked_sync_forward(
            x,
            backend_for(x),
            *self._affine_part(),
            self.communicator,
            self.eps,
            residual,
            self.activation or "identity",
            self.channels_last,
            valid,
            running,
        )
        batch = None if running else BatchStatistics(saved.count, saved.local.statistics)
        return y, sync_batch_norm_backward, saved, batch

    def _moments(self, x: Array, valid: ValidPositions | None) -> Moments:
        return sync_batch_norm_moments(x, self.communicator, channels_last=self.channels_last, valid=valid)
