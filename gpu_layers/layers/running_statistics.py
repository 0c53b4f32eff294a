"""Running statistics of a batch norm layer: when they are used, when updated, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.checks import check_finite
from gpu_layers.core.cuda import array_module, place_of
from gpu_layers.core.moments import Moments
from gpu_layers.core.running import RunningStatistics
from gpu_layers.layers.base import Layer, device_module, moved
from gpu_layers.ops.checks import check_overlap, described
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.copying import copy_into

__all__ = ["BatchStatistics"]


@dataclass(frozen=True)
class BatchStatistics:
    """Statistics of one batch.

    Attributes
    ----------
    count : int, or array of float64, shape ()
        Values per channel; of several processes where the statistics are.
    statistics : array, shape (2 or more, C)
        Rows :attr:`mean` and :attr:`var`, then any others.
    """

    count: Array
    statistics: Array

    @property
    def mean(self) -> Array:
        """Mean, shape (C,)."""
        return self.statistics[0]

    @property
    def var(self) -> Array:
        """Biased variance, shape (C,)."""
        return self.statistics[1]


def batch_statistics(moments: Moments, dtype: np.dtype) -> BatchStatistics:
    """Moments in the dtype of a layer's statistics; without values they are 0."""
    with place_of(moments.mean):
        var = moments.var if moments.count else moments.squares
        return BatchStatistics(moments.count, array_module(var).stack([moments.mean, var]).astype(dtype))


#: Names of a layer's buffers.
RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _buffer_kinds(num_features: int, dtype: np.dtype) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each buffer."""
    kinds = [((num_features,), dtype), ((num_features,), dtype), ((), np.dtype(np.int64))]
    return dict(zip(RUNNING_STATISTICS, kinds, strict=True))


def check_buffers(buffers: Mapping[str, Array], num_features: int, dtype: np.dtype) -> None:
    """Raise if the running statistics were replaced by arrays of another shape or dtype."""
    expected = _buffer_kinds(num_features, dtype)
    for name, buffer in buffers.items():
        shape, dtype = expected[name]
        if buffer.shape != shape:
            raise ValueError(f"{name} should have the shape {list(shape)}, got {list(buffer.shape)}")
        if buffer.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {described(buffer.dtype)}")


class RunningStatisticsLayer(Layer):
    """A layer with running averages of its batches' mean and unbiased variance.

    Attributes
    ----------
    deferred : bool
        Whether a training forward leaves its statistics in :attr:`pending` until :meth:`commit`.
    skip_nonfinite : bool
        Whether to leave out a batch whose statistics hold NaN or infinity; :attr:`num_batches_skipped` counts them.
    """

    def __init__(self, num_features: int, momentum: float | None, track_running_stats: bool, dtype: np.dtype) -> None:
        super().__init__()
        self.num_features, self.dtype = num_features, dtype
        self.momentum = None if momentum is None else check_finite(momentum, "momentum")
        self.track_running_stats = bool(track_running_stats)
        self._use_batch_statistics: bool | None = None
        self._update_statistics: bool | None = None
        self.deferred = self.skip_nonfinite = False
        self._pending: BatchStatistics | None = None
        # On the device, once batches may be left out.
        self._skipped: Array = None
        if self.track_running_stats:
            self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Reset the running averages: mean 0, variance 1, no batches. Without running averages it does nothing.

        The buffers are overwritten in place, so that a captured graph stays valid. Buffers that are missing, or of a
        wrong shape or dtype, are made on the device of the parameters.
        """
        if not self.track_running_stats:
            return
        parameters, buffers = vars(self)["parameters"], vars(self)["buffers"]
        beside = next(iter((*parameters.values(), *buffers.values())), None)
        xp = array_module(beside)
        for name, (shape, dtype) in _buffer_kinds(self.num_features, self.dtype).items():
            buffer = buffers.get(name)
            with place_of(beside if buffer is None else buffer):
                start = xp.full(shape, int(name == "running_var"), dtype)
                if buffer is None or (buffer.shape, buffer.dtype) != (shape, dtype):
                    buffers[name] = start
                else:
                    copy_into(xp, buffer, start)

    @property
    def use_batch_statistics(self) -> bool | None:
        """Whether to normalise by the batch; None: in training, and without running statistics always."""
        return self._use_batch_statistics

    @use_batch_statistics.setter
    def use_batch_statistics(self, value: bool | None) -> None:
        self._use_batch_statistics = self._checked(value, "use_batch_statistics", needs_statistics=value is False)

    @property
    def update_statistics(self) -> bool | None:
        """Whether a forward updates the running statistics; None: in training."""
        return self._update_statistics

    @update_statistics.setter
    def update_statistics(self, value: bool | None) -> None:
        self._update_statistics = self._checked(value, "update_statistics", needs_statistics=value is True)

    def _checked(self, value: object, name: str, needs_statistics: bool) -> bool | None:
        if not (value is None or isinstance(value, (bool, np.bool_))):
            raise TypeError(f"{name} must be True, False, or None to follow the mode, got {type(value).__name__}")
        if needs_statistics and not self.track_running_stats:
            raise ValueError(f"{name}={bool(value)} needs running statistics: this layer keeps none")
        return None if value is None else bool(value)

    def _check_places(self) -> None:
        """Raise unless the running statistics have buffers that can be written to."""
        buffers = vars(self)["buffers"]
        if self.track_running_stats and len(buffers) < len(RUNNING_STATISTICS):
            missing = next(name for name in RUNNING_STATISTICS if name not in buffers)
            raise RuntimeError(
                f"track_running_stats is True, but the {type(self).__name__} has no {missing}: "
                "call reset_running_stats() once it is set"
            )
        for buffer in buffers.values():
            if not buffer.flags.c_contiguous:
                check_overlap(buffer)

    def _check_buffers(self) -> None:
        """Raise if the running statistics are missing, or of another shape or dtype."""
        self._check_places()
        check_buffers(self.buffers, self.num_features, self.dtype)

    def _uses_batch(self) -> bool:
        if self._use_batch_statistics is not None:
            return self._use_batch_statistics
        return self.training or not self.track_running_stats

    def _updates(self) -> bool:
        return self.track_running_stats and (
            self.training if self._update_statistics is None else self._update_statistics
        )

    @property
    def pending(self) -> BatchStatistics | None:
        """Statistics of a deferred layer's last updating forward, until :meth:`commit` or :meth:`rollback`.

        Each forward replaces them, so a batch that is computed again before the commit counts once.
        """
        return self._pending

    @property
    def num_batches_skipped(self) -> int:
        """Number of batches left out for NaN or infinity. Reading it waits for the device; updating it does not."""
        return 0 if self._skipped is None else int(self._skipped)

    def commit(self, accepted: Array = None) -> None:
        """Fold the pending statistics into the running ones; without any it does nothing.

        Parameters
        ----------
        accepted : boolean array of one element, optional
            Whether to fold them in, decided on the device; if not, the batch counts as skipped. With
            :attr:`skip_nonfinite` they must also be finite.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._fold(pending, accepted)

    def pending_is_finite(self) -> Array:
        """Whether all pending statistics are finite.

        Returns
        -------
        boolean array of one element, on the device

        Raises
        ------
        RuntimeError
            If no statistics are pending.
        """
        if self._pending is None:
            raise RuntimeError("no statistics are pending")
        statistics = self._pending.statistics
        with place_of(statistics):
            return array_module(statistics).isfinite(statistics[:2]).all()

    def rollback(self) -> None:
        """Forget the pending statistics."""
        self._pending = None

    def to(self, device: str) -> Layer:
        """Move to ``device`` as :meth:`Layer.to`; pending statistics are kept."""
        super().to(device)
        xp, pending = device_module(device), self._pending
        if self._skipped is not None:
            self._skipped = moved(self._skipped, xp)
        if pending is not None:
            count = pending.count if isinstance(pending.count, int) else moved(pending.count, xp)
            self._pending = BatchStatistics(count, moved(pending.statistics, xp))
        return self

    def _running(self, count: int) -> RunningStatistics | None:
        """The running statistics for a forward's kernel to fold a batch of so many values per channel into, or None.

        None if the statistics have to wait, or if :meth:`_take_batch` was replaced.
        """
        if not self._updates() or self.deferred or "_take_batch" in vars(self):
            return None
        return self._running_statistics(count, self.skip_nonfinite)

    def _running_statistics(self, count: Array, may_skip: bool) -> RunningStatistics:
        mean, var, batches = map(vars(self)["buffers"].__getitem__, RUNNING_STATISTICS)
        if self._skipped is None and may_skip:
            with place_of(batches):
                self._skipped = array_module(batches).zeros((), np.int64)
        return RunningStatistics(mean, var, batches, self.momentum, count, self._skipped, self.skip_nonfinite)

    def _take_batch(self, batch: BatchStatistics) -> None:
        """Fold in the statistics of a batch, or leave them pending."""
        self._pending = batch
        if not self.deferred:
            self.commit()

    def _fold(self, batch: BatchStatistics, accepted: Array) -> None:
        """``running = (1 - momentum) * running + momentum * batch``.

        Parameters
        ----------
        batch : BatchStatistics
        accepted : boolean array or None
            Whether to fold the batch in, decided on the device; with :attr:`skip_nonfinite` it must also be finite.
        """
        running = self._running_statistics(batch.count, self.skip_nonfinite or accepted is not None)
        with place_of(running.batches):
            accepted = None if accepted is None else array_module(running.batches).asarray(accepted, bool)
        backend_for(batch.statistics, optional=running.arrays).batch_norm_fold(batch.statistics, running, accepted)
