"""Batch norm and max pooling in one layer: ``gpu_layers.fuse`` replaces the two by it."""

from __future__ import annotations

import copy

from gpu_layers.core.array import Array, Options
from gpu_layers.core.valid import ValidPositions
from gpu_layers.layers.batch_norm import BatchNormLayer, Normalised, NormalisedByBatch
from gpu_layers.layers.max_pool import MaxPoolLayer
from gpu_layers.layers.running_statistics import BatchStatistics
from gpu_layers.ops.batch_norm_max_pool import (
    batch_norm_max_pool_backward,
    batch_norm_max_pool_inference,
    batch_norm_max_pool_inference_backward,
    batch_norm_max_pool_running,
)


class BatchNormMaxPool(BatchNormLayer):
    """Max pooling of a batch norm's output, which is never written. It has the bits of the two layers in a row.

    Parameters
    ----------
    norm : BatchNormLayer
        This layer takes over its parameters, buffers, numbers and mode, without copying the arrays.
    pool : MaxPoolLayer
        Of the same layout, and without return_indices.
    """

    def __init__(self, norm: BatchNormLayer, pool: MaxPoolLayer) -> None:
        # The base's constructor would make new parameters and buffers.
        vars(self).update(vars(copy.copy(norm)))
        self._input_ranks = (pool.rank + 2,)
        self.gradients, self._saved = {}, None
        self._window = pool.window_arguments
        self._described = f"{norm!r}, {pool!r}"

    def forward(self, x: Array) -> Array:  # type: ignore[override]
        """Normalise, activate and pool.

        Parameters
        ----------
        x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last

        Returns
        -------
        array
            x's dtype.

        Raises
        ------
        TypeError, ValueError
            As the forwards of both layers.
        RuntimeError
            If running statistics are needed and missing.
        """
        self._check_input(x)
        return self._forward(x, None, None)

    def _options(self, residual: Array) -> Options:
        options = super()._options(residual)
        del options["residual"]
        return options | self._window

    def _normalise_by_batch(self, x: Array, residual: Array, valid: ValidPositions | None) -> NormalisedByBatch:
        running = self._running(x.size // max(self.num_features, 1))
        options = self._options(residual)
        y, saved = batch_norm_max_pool_running(x, *self._affine_part(), running, **options)
        batch = None if running else BatchStatistics(saved.norm.count, saved.norm.statistics)
        return y, batch_norm_max_pool_backward, saved, batch

    def _normalise_by_running(self, x: Array, residual: Array, valid: ValidPositions | None) -> Normalised:
        mean, var = self.buffers["running_mean"], self.buffers["running_var"]
        options = self._options(residual)
        y, saved = batch_norm_max_pool_inference(x, mean, var, *self._affine_part(), **options)
        return y, batch_norm_max_pool_inference_backward, saved

    def _configuration(self) -> str:
        return self._described
