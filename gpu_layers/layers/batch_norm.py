"""Batch normalisation layers."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any

import numpy as np

from gpu_layers.core.array import Array, ArrayLike, DTypeLike, Options
from gpu_layers.core.checks import check_integer
from gpu_layers.core.moments import Moments
from gpu_layers.core.valid import ValidPositions
from gpu_layers.layers.precision import check_layer_dtype, parameter_dtype
from gpu_layers.layers.running_statistics import BatchStatistics, RunningStatisticsLayer, batch_statistics
from gpu_layers.ops.batch_moments import batch_norm_moments
from gpu_layers.ops.batch_norm import (
    batch_norm_backward,
    batch_norm_inference_backward,
    check_count,
    check_input,
    checked_forward,
    checked_inference,
)
from gpu_layers.ops.checks import check_activation, check_dtype, check_eps
from gpu_layers.ops.padding import valid_positions
from gpu_layers.runtime.backend import backend_for

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

#: The output, the backward's operation and what the forward saved for it; and the statistics of the batch.
Normalised = tuple[Array, Callable[..., Any], Any]
NormalisedByBatch = tuple[Array, Callable[..., Any], Any, BatchStatistics | None]


class BatchNormLayer(RunningStatisticsLayer):
    """Normalise each channel: by the statistics of the batch in training, by running averages in evaluation.

    ``y = phi(weight * (x - mean) / sqrt(var + eps) + bias + residual)`` with the biased variance; the running variance
    averages the unbiased one: ``running = (1 - momentum) * running + momentum * batch``.

    Parameters
    ----------
    num_features : int
        Channels.
    eps : float
        Added to the variance; positive, also after rounding to ``dtype``: at least ``2**-149`` in float32.
    momentum : float or None
        Weight of the newest batch in the running averages, any finite number; None gives all batches the same weight.
    affine : bool
        Whether to have a weight and a bias.
    track_running_stats : bool
        Whether to keep running averages; without them evaluation uses the statistics of the batch too.
    bias : bool
        Whether an affine layer has a bias.
    channels_last : bool
        Channels on the last axis instead of the second.
    activation : {"relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "identity"} or None
        phi, applied in the same kernels; None is the identity.
    dtype : {"float32", "float64"}
        Dtype of parameters and statistics: float64 for float64 input, float32 for all others.

    Attributes
    ----------
    use_batch_statistics, update_statistics : bool or None
        Whether a forward normalises by the batch, and whether it updates the running statistics. None, the initial
        value, follows the mode. :meth:`train` and :meth:`eval` do not change them.
    train_affine : bool
        Whether backward gives gradients of weight and bias. Otherwise they are None, and an optimizer does not change
        the two.
    deferred : bool
        Whether a training forward leaves its statistics in ``pending`` until ``commit()`` folds them in or
        ``rollback()`` forgets them. False at first.
    skip_nonfinite : bool
        Whether a batch whose statistics hold NaN or infinity is left out and counted in ``num_batches_skipped``. False
        at first.

    Raises
    ------
    TypeError, ValueError
        For a wrong type or value of these.
    """

    _input_ranks: tuple[int, ...]

    def __setattr__(self, name: str, value: object) -> None:
        # With another setting, everything is checked again.
        vars(self).pop("_checked_call", None)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        # As for ``_take_batch``, which is replaced for a while: with it in place no kernel folds statistics in.
        vars(self).pop("_checked_call", None)
        super().__delattr__(name)

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
    ) -> None:
        own = parameter_dtype(dtype)
        num_features = check_integer(num_features, "num_features", 0, 2**63 - 1)
        super().__init__(num_features, momentum, track_running_stats, own)
        check_eps(eps, self.dtype)
        self.eps = float(eps)
        self.affine = bool(affine)
        self.channels_last = bool(channels_last)
        self.activation = None if activation is None else check_activation(activation)
        self.train_affine = True
        if self.affine:
            self.parameters["weight"] = np.ones(self.num_features, self.dtype)
            if bias:
                self.parameters["bias"] = np.zeros(self.num_features, self.dtype)

    def forward(
        self, x: Array, residual: Array = None, *, lengths: ArrayLike | None = None, mask: Array = None
    ) -> Array:
        """Normalise, add the residual, activate.

        In a padded batch only valid positions count; y and the gradients are +0 elsewhere.

        Parameters
        ----------
        x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
        residual : array, optional
            x's shape and dtype; backward then returns its gradient too.
        lengths : array_like of int, shape (N, spatial axes), or (N,) for one spatial axis; optional
            Size of each sample of a padded batch.
        mask : array of bool, shape (N, *spatial), optional
            True where a padded batch is valid; instead of lengths.

        Returns
        -------
        array
            x's shape and dtype.

        Raises
        ------
        TypeError
            For a wrong array type; for a float64 input in a float32 layer, or the reverse; for lengths or a mask of a
            wrong type.
        ValueError
            For a wrong rank or number of channels, a residual of another shape, a single value per channel in training,
            lengths beyond the input's size, or lengths or a mask of a wrong shape.
        RuntimeError
            If running statistics are needed and missing, or for a padded batch while a graph is captured.
        """
        self._check_input(x, residual)
        if lengths is None and mask is None:
            return self._forward(x, residual, None)
        return self._forward(x, residual, valid_positions(x, lengths, mask, self.channels_last))

    def _forward(self, x: Array, residual: Array, valid: ValidPositions | None) -> Any:
        """:meth:`forward` of a checked batch; valid: which positions count, if not all."""
        batch: BatchStatistics | None = None
        if self._uses_batch():
            y, backward, saved, batch = self._normalise_by_batch(x, residual, valid)
        else:
            if self._updates():
                batch = self._statistics_of(x, valid)
            y, backward, saved = self._normalise_by_running(x, residual, valid)
        vars(self)["_saved"] = (backward, saved)
        if batch is not None and self._updates():
            self._take_batch(batch)
        return y

    def backward(self, dy: Array) -> Array:
        """Gradient of x; assigns :attr:`gradients` of weight and bias.

        Parameters
        ----------
        dy : array
            Gradient of the last forward's output, of its shape and dtype.

        Returns
        -------
        array, or tuple of two arrays
            Gradient of x; with a residual, those of x and of the residual.

        Raises
        ------
        TypeError, ValueError
            If dy has another array type, dtype or shape.
        RuntimeError
            Before any forward, or if this library has written to x, or with an activation to the residual, since.
        """
        backward, saved = self._saved_by_forward()
        dx, dgamma, dbeta, *dresidual = backward(dy, saved)
        gradients = {"weight": dgamma, "bias": dbeta}
        own = vars(self)
        own["gradients"] = {name: gradients[name] if self.train_affine else None for name in own["parameters"]}
        return (dx, *dresidual) if dresidual else dx

    def batch_moments(
        self, x: Array, residual: Array = None, *, lengths: ArrayLike | None = None, mask: Array = None
    ) -> Moments:
        """Moments of the values that :meth:`forward` would normalise, in float64.

        Parameters
        ----------
        x, lengths, mask
            As in :meth:`forward`.
        residual
            Ignored: it is added after normalising.

        Returns
        -------
        gpu_layers.ops.Moments

        Raises
        ------
        TypeError, ValueError
            As :meth:`forward`.
        """
        self._check_input(x)
        return self._moments(x, valid_positions(x, lengths, mask, self.channels_last))

    def _normalise_by_batch(self, x: Array, residual: Array, valid: ValidPositions | None) -> NormalisedByBatch:
        """The output, the backward's operation and what the forward saved for it, and the statistics of the batch.

        The statistics are None if the kernels have folded them in.
        """
        _, (weight, bias), count, running = vars(self)["_checked_call"]
        if valid is not None:
            count, running = valid.count, self._running(valid.count)
        if count == 1:
            check_count(x, self.num_features, valid)
        y, saved = checked_forward(
            backend_for(x),
            x,
            weight,
            bias,
            self.eps,
            residual,
            self.activation or "identity",
            self.channels_last,
            None,
            running,
            valid,
        )
        return y, batch_norm_backward, saved, None if running else BatchStatistics(saved.count, saved.statistics)

    def _normalise_by_running(self, x: Array, residual: Array, valid: ValidPositions | None) -> Normalised:
        """The output, the backward's operation and what the forward saved for it."""
        buffers = vars(self)["buffers"]
        y, saved = checked_inference(
            backend_for(x),
            x,
            buffers["running_mean"],
            buffers["running_var"],
            *self._affine_part(),
            self.eps,
            residual,
            self.activation or "identity",
            self.channels_last,
            None,
            valid,
        )
        return y, batch_norm_inference_backward, saved

    def _options(self, residual: Array) -> Options:
        """Keyword arguments of the operations."""
        return {
            "eps": self.eps,
            "residual": residual,
            "activation": self.activation,
            "channels_last": self.channels_last,
        }

    def _moments(self, x: Array, valid: ValidPositions | None) -> Moments:
        return batch_norm_moments(x, channels_last=self.channels_last, valid=valid)

    def _statistics_of(self, x: Array, valid: ValidPositions | None) -> BatchStatistics:
        moments = self._moments(x, valid)
        if moments.count == 1:
            check_count(x, self.num_features, valid)
        return batch_statistics(moments, self.dtype)

    def _affine_part(self) -> tuple[Array, Array]:
        parameters = vars(self)["parameters"]
        return parameters.get("weight"), parameters.get("bias")

    def _check_input(self, x: Array, residual: Array = None) -> None:
        """Raise unless x and the residual fit, and the layer's own arrays are as it made them.

        Nothing is checked again if shapes, dtypes, settings and the layer's arrays are those of the last call.
        """
        own = vars(self)
        parameters, buffers = own["parameters"], own["buffers"]
        arrays = [*parameters.values(), *buffers.values()]
        (kind, shape, dtype, has_residual, checked), *_ = own.get("_checked_call", _NOTHING_CHECKED)
        if (
            type(x) is kind
            and x.shape == shape
            and x.dtype == dtype
            and len(arrays) == len(checked)
            and all(map(is_, arrays, checked))
            and (
                residual is None
                or (has_residual and type(residual) is kind and residual.shape == shape and residual.dtype == dtype)
            )
        ):
            return
        backend_for(x, optional=(residual, *arrays))
        _check_layer_input(
            x,
            "running_mean" if buffers else "weight" if parameters else "num_features",
            self.num_features,
            self.channels_last,
            self._input_ranks,
            self.dtype,
        )
        self._check_buffers()
        check_input(x, *self._affine_part(), self.channels_last, residual, self.activation)
        check_eps(self.eps, self.dtype)
        count = x.size // max(self.num_features, 1)
        inputs = (type(x), x.shape, x.dtype, residual is not None, arrays)
        own["_checked_call"] = (inputs, self._affine_part(), count, self._running(count))

    def _configuration(self) -> str:
        extras = ", channels_last=True" if self.channels_last else ""
        extras += f", activation={self.activation!r}" if self.activation is not None else ""
        extras += ", dtype='float64'" if self.dtype == np.float64 else ""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={'bias' in self.parameters}, track_running_stats={self.track_running_stats}{extras}"
        )


#: What was checked: the type, shape and dtype of an input, whether there was a residual, and the layer's arrays. What
#: follows from it: weight and bias, values per channel, and the running statistics that such a batch is folded into.
_NOTHING_CHECKED: tuple[Any, ...] = ((None, None, None, False, ()), (None, None), 0, None)


def _check_layer_input(
    x: Array, first_array: str, num_features: int, channels_last: bool, input_ranks: tuple[int, ...], dtype: np.dtype
) -> None:
    """Raise unless x fits a layer; first_array: what a message says has the layer's number of channels."""
    check_dtype(x)
    if x.ndim not in input_ranks:
        ranks = " or ".join(f"{rank}D" for rank in input_ranks)
        raise ValueError(f"expected {ranks} input (got {x.ndim}D input)")
    channels = x.shape[-1] if channels_last else x.shape[1]
    if channels != num_features:
        raise ValueError(f"{first_array} should contain {channels} elements not {num_features}")
    check_layer_dtype(x, dtype)


class BatchNorm1d(BatchNormLayer):
    __doc__ = (BatchNormLayer.__doc__ or "").replace("each channel:", "each channel of (N, C) or (N, C, L) input:")
    _input_ranks = (2, 3)


class BatchNorm2d(BatchNormLayer):
    __doc__ = (BatchNormLayer.__doc__ or "").replace("each channel:", "each channel of (N, C, H, W) input:")
    _input_ranks = (4,)


class BatchNorm3d(BatchNormLayer):
    __doc__ = (BatchNormLayer.__doc__ or "").replace("each channel:", "each channel of (N, C, D, H, W) input:")
    _input_ranks = (5,)
