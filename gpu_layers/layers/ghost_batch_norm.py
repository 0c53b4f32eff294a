"""Ghost batch normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from gpu_layers.core.array import Array, DTypeLike, Options
from gpu_layers.core.checks import check_integer
from gpu_layers.core.valid import ValidPositions
from gpu_layers.layers.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormLayer, NormalisedByBatch
from gpu_layers.layers.running_statistics import BatchStatistics
from gpu_layers.ops.ghost_batch_norm import checked_ghost_forward, ghost_batch_norm_backward, values_before
from gpu_layers.runtime.backend import backend_for

__all__ = ["GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d"]


class _GhostBatchNorm(BatchNormLayer):
    """Batch norm by groups of samples in training, as if they were small batches (Hoffer, Hubara and Soudry, 2017).

    Each group of ``group_size`` consecutive samples is normalised by its own statistics; the last group may be smaller.
    A group with a single value per channel has no variance: it joins the group before it; the first joins the next.

    The running statistics are those of the whole batch: its mean and its unbiased variance, merged from the groups in
    float64 and folded in once. So evaluation does not depend on the group size. (Hoffer et al. fold in one group after
    the other, which weights the last groups of a batch most.)

    Parameters
    ----------
    num_features : int
        Channels.
    group_size : int
        Samples in a group, at least 1.
    eps, momentum, affine, track_running_stats, bias, channels_last, activation, dtype
        As :class:`BatchNorm2d`.

    Raises
    ------
    TypeError, ValueError
        For a wrong type or value of these.
    """

    def __init__(
        self,
        num_features: int,
        group_size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        channels_last: bool = False,
        activation: str | None = None,
        dtype: DTypeLike = "float32",
    ) -> None:
        options: Options = {"channels_last": channels_last, "activation": activation, "dtype": dtype}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, bias=bias, **options)
        self.group_size = check_integer(group_size, "group_size", 1, 2**63 - 1)

    def _normalise_by_batch(self, x: Array, residual: Array, valid: ValidPositions | None) -> NormalisedByBatch:
        before = values_before(x, self.channels_last, valid)
        bounds = _joined(self.group_size, before)
        merges = self._updates()
        # The kernel counts the values of all groups.
        running = self._running(0) if merges else None
        y, saved, statistics = checked_ghost_forward(
            backend_for(x),
            x,
            *self._affine_part(),
            self.eps,
            bounds,
            before,
            residual,
            self.activation or "identity",
            self.channels_last,
            valid,
            merges,
            running,
        )
        batch = None if running or not merges else BatchStatistics(before[-1], statistics)
        return y, ghost_batch_norm_backward, saved, batch

    def _configuration(self) -> str:
        return f"{self.num_features}, group_size={self.group_size}, {super()._configuration().partition(', ')[2]}"


@lru_cache(maxsize=1024)
def _joined(group_size: int, before: Sequence[int]) -> tuple[int, ...]:
    """Bounds of the groups of so many samples; each has at least two values, if the batch does."""
    bounds, samples = [0], len(before) - 1
    for start in range(0, samples, group_size):
        if before[start] - before[bounds[-1]] >= 2:
            bounds.append(start)
    if len(bounds) > 1 and before[-1] - before[bounds[-1]] < 2:
        bounds.pop()
    return (*bounds, samples)


class GhostBatchNorm1d(_GhostBatchNorm, BatchNorm1d):
    __doc__ = _GhostBatchNorm.__doc__ or ""


class GhostBatchNorm2d(_GhostBatchNorm, BatchNorm2d):
    __doc__ = _GhostBatchNorm.__doc__ or ""


class GhostBatchNorm3d(_GhostBatchNorm, BatchNorm3d):
    __doc__ = _GhostBatchNorm.__doc__ or ""
