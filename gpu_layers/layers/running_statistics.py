"""Running statistics of a batch norm layer: when they are used, when updated, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_layers.layers.base import Layer, device_module, moved
from gpu_layers.moments import Moments
from gpu_layers.ops.checks import check_number
from gpu_layers.runtime.cuda import array_module


@dataclass(frozen=True)
class BatchStatistics:
    """Of one batch.

    Attributes
    ----------
    count : int
        Values a channel.
    mean, var : array, shape (C,)
        ``var`` is the biased variance.
    """

    count: int
    mean: Any
    var: Any


def batch_statistics(moments: Moments, dtype: np.dtype) -> BatchStatistics:
    """Moments in the dtype of a layer's statistics; those of no values are 0."""
    var = moments.var if moments.count else moments.squares
    return BatchStatistics(moments.count, moments.mean.astype(dtype), var.astype(dtype))


class RunningStatisticsLayer(Layer):
    """A layer with running averages of its batches' mean and unbiased variance.

    Attributes
    ----------
    deferred : bool
        Whether a training forward leaves its statistics in :attr:`pending` until :meth:`commit`.
    skip_nonfinite : bool
        Whether a batch whose statistics hold NaN or infinity is left out and counted in :attr:`num_batches_skipped`.
    """

    def __init__(self, num_features: int, momentum: float | None, track_running_stats: bool, dtype: np.dtype) -> None:
        super().__init__()
        self.num_features, self.dtype = num_features, dtype
        self.momentum = None if momentum is None else check_number(momentum, "momentum")
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], or None, got {momentum}")
        self.track_running_stats = bool(track_running_stats)
        self._use_batch_statistics: bool | None = None
        self._update_statistics: bool | None = None
        self.deferred = self.skip_nonfinite = False
        self._pending: BatchStatistics | None = None
        self._skipped: Any = 0
        if self.track_running_stats:
            self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Start the running averages anew: mean 0, variance 1, no batch seen; without running averages do nothing.

        The buffers are overwritten where they are, so that a captured graph stays valid; those that are missing, or are
        not as this layer needs them, are made beside the parameters.
        """
        if not self.track_running_stats:
            return
        parameters, buffers = vars(self)["parameters"], vars(self)["buffers"]
        beside = next(iter((*parameters.values(), *buffers.values())), None)
        for name, shape, dtype in self._buffer_kinds():
            start, buffer = int(name == "running_var"), buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (shape, dtype):
                buffers[name] = array_module(beside).full(shape, start, dtype)
            else:
                buffer[...] = start

    def _buffer_kinds(self) -> tuple[tuple[str, tuple[int, ...], np.dtype], ...]:
        return (
            ("running_mean", (self.num_features,), self.dtype),
            ("running_var", (self.num_features,), self.dtype),
            ("num_batches_tracked", (), np.dtype(np.int64)),
        )

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

    def _checked(self, value: Any, name: str, needs_statistics: bool) -> bool | None:
        if not (value is None or isinstance(value, (bool, np.bool_))):
            raise TypeError(f"{name} must be True, False, or None to follow the mode, got {type(value).__name__}")
        if needs_statistics and not self.track_running_stats:
            raise ValueError(f"{name}={bool(value)} needs running statistics: this layer keeps none")
        return None if value is None else bool(value)

    def _check_buffers(self) -> None:
        """Raise if somebody put other arrays in the place of the running statistics."""
        if not self.track_running_stats:
            return
        for name, shape, dtype in self._buffer_kinds():
            buffer = vars(self)["buffers"].get(name)
            if buffer is None:
                raise ValueError(f"the layer has no {name}: reset_running_stats() makes what is missing")
            if buffer.shape != shape:
                raise ValueError(f"{name} should have the shape {list(shape)}, got {list(buffer.shape)}")
            if buffer.dtype != dtype:
                raise TypeError(f"{name} must be {dtype}, got {buffer.dtype}")

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
        """What the last updating forward of a deferred layer found, until :meth:`commit` or :meth:`rollback`.

        Each forward replaces it, so that a batch that is computed again before the commit counts once.
        """
        return self._pending

    @property
    def num_batches_skipped(self) -> int:
        """Batches left out for NaN or infinity. Reading it waits for the device; updating it does not."""
        return int(self._skipped)

    def commit(self, accepted: Any = None) -> None:
        """Fold what is pending into the running statistics; without anything pending, do nothing.

        Parameters
        ----------
        accepted : boolean array of one element, optional
            Whether to, decided on the device; if not, the batch is counted as skipped. With :attr:`skip_nonfinite`
            it must be finite besides.
        """
        if self._pending is None:
            return
        if self.skip_nonfinite:
            finite = self.pending_is_finite()
            accepted = finite if accepted is None else accepted & finite
        pending, self._pending = self._pending, None
        self._fold(pending, accepted)

    def pending_is_finite(self) -> Any:
        """Whether all pending statistics are finite: a boolean array of one element, on the device."""
        if self._pending is None:
            raise RuntimeError("no statistics are pending")
        xp = array_module(self._pending.mean)
        return (xp.isfinite(self._pending.mean) & xp.isfinite(self._pending.var)).all()

    def rollback(self) -> None:
        """Forget what is pending."""
        self._pending = None

    def to(self, device: str) -> Layer:
        """As :meth:`Layer.to`; what is pending is kept."""
        super().to(device)
        self._skipped, pending = int(self._skipped), self._pending
        if pending is not None:
            xp = device_module(device)
            self._pending = BatchStatistics(pending.count, moved(pending.mean, xp), moved(pending.var, xp))
        return self

    def _take_batch(self, batch: BatchStatistics) -> None:
        """Fold in the statistics of a batch, or keep them pending."""
        self._pending = batch
        if not self.deferred:
            self.commit()

    def _fold(self, batch: BatchStatistics, accepted: Any) -> None:
        """``running = (1 - momentum) * running + momentum * batch``.

        Parameters
        ----------
        batch : BatchStatistics
        accepted : boolean array or None
            Whether the batch is to be folded in at all, decided on the device.
        """
        tracked = self.buffers["num_batches_tracked"]
        xp = array_module(tracked)
        tracked += 1 if accepted is None else accepted
        if accepted is not None:
            self._skipped = self._skipped + xp.where(accepted, 0, 1)
        if batch.count == 0:
            return
        momentum = 1.0 / xp.maximum(tracked, 1) if self.momentum is None else np.float64(self.momentum)
        old, new = (weight.astype(self.dtype) for weight in (1 - momentum, momentum))
        with np.errstate(invalid="ignore", over="ignore"):
            unbiased = batch.var * self.dtype.type(batch.count / (batch.count - 1))
            for name, newest in (("running_mean", batch.mean), ("running_var", unbiased)):
                running = self.buffers[name]
                if accepted is None:
                    running *= old
                    running += newest * new
                else:
                    running[...] = xp.where(accepted, running * old + newest * new, running)
