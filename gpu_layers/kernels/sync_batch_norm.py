"""Launching batch norm's kernels before and after an exchange with other processes."""

from __future__ import annotations

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.batch_norm_saved import BatchNormSaved
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.running import RunningStatistics
from gpu_layers.core.valid import ValidPositions
from gpu_layers.kernels.arrays import empty, ready
from gpu_layers.kernels.batch_norm import (
    add_gradients,
    gradient_sums,
    inference,
    input_gradient,
    launch_merge,
    merge_parts,
    of_positions,
    of_running_statistics,
    statistics_of_batch,
)
from gpu_layers.kernels.batch_norm_common import ROWS, Folding
from gpu_layers.runtime.program import Launcher, Numbers, Operands

__all__ = [
    "sync_batch_norm_input_gradient",
    "sync_batch_norm_normalize",
    "sync_batch_norm_statistics",
    "sync_batch_norm_sums",
]


def sync_batch_norm_statistics(
    x: Array, count: int, channels_last: bool = False, valid: ValidPositions | None = None
) -> Array:
    """``gpu_layers.reference.sync_batch_norm_statistics``, as kernels."""
    words, numbers = (None, ()) if valid is None else of_positions(valid, x)
    return _statistics((x, words), (channels_last,), (count, *numbers))


def sync_batch_norm_normalize(
    x: Array,
    told: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    channels_last: bool = False,
    residual: Array | None = None,
    activation: str = "identity",
    running: RunningStatistics | None = None,
    valid: ValidPositions | None = None,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """``gpu_layers.reference.sync_batch_norm_normalize``, as kernels."""
    of_running, folding = of_running_statistics(running)
    arrays = (x, told, gamma, beta, residual, *of_running, out, None if valid is None else valid.words(x))
    return _normalize(arrays, (eps, channels_last, activation, folding))


def sync_batch_norm_sums(dy: Array, saved: BatchNormSaved) -> tuple[Array, Array, Array]:
    """``gpu_layers.reference.sync_batch_norm_sums``, as kernels."""
    words = None if saved.valid is None else saved.valid.words(saved.x)
    return _sums((dy, saved.x, saved.statistics, saved.residual, words), (saved.channels_last, saved.activation))


def sync_batch_norm_input_gradient(
    dy: Array, saved: BatchNormSaved, told: Array, count: Array, out: Array | None = None
) -> tuple[Array, Array | None]:
    """``gpu_layers.reference.sync_batch_norm_input_gradient``, as kernels."""
    words = None if saved.valid is None else saved.valid.words(saved.x)
    arrays = (dy, saved.x, saved.statistics, saved.residual, out, words, told, count)
    return _input_gradient(arrays, (saved.channels_last, saved.activation), () if words is None else (1,))


@Launcher
def _statistics(operands: Operands, numbers: Numbers, channels_last: bool) -> Array:
    x, words = operands
    count, *of_words = numbers
    channels, dtype = x.shape[-1 if channels_last else 1], accumulation_dtype(x.dtype)
    kept, size = len(ROWS) * channels, 2 * channels * dtype.itemsize // 8
    told = empty((-(-kept * dtype.itemsize // 8),), np.float64, x)
    (statistics,) = x.program.views(told, [0], [(len(ROWS), channels)], dtype)
    statistics_of_batch((x, *[None] * 6, words, statistics), (1.0, channels_last, None), tuple(of_words))
    # Of the rows two are told, and the count, which takes the place of the next.
    count_place, result = x.program.views(told, [size, 0], [(), (size + 1,)])
    launch_merge(statistics.reshape(1, kept), None, (count, count), 0, statistics, count_place)
    return result


@Launcher
def _normalize(
    operands: Operands, numbers: Numbers, eps: float, channels_last: bool, activation: str, folding: Folding | None
) -> tuple[Array, Array, Array]:
    x, told, gamma, beta, residual, *of_running, out, words = operands
    told, dtype, channels = ready(told), accumulation_dtype(x.dtype), x.shape[-1 if channels_last else 1]
    processes, size = told.shape
    (parts,) = x.program.views(told, [0], [(processes, size * 8 // dtype.itemsize)], dtype)
    (counts,) = x.program.views(told, [size - 1], [((processes - 1) * size + 1,)])
    merged, count = merge_parts((parts, counts, *of_running), (channels, folding, size), (0, 0))
    mean, var = x.program.rows(merged)
    y, statistics = inference((x, mean, var, gamma, beta, residual, out, words), (eps, channels_last, activation))
    return y, statistics, count


@Launcher
def _sums(operands: Operands, numbers: Numbers, channels_last: bool, activation: str) -> tuple[Array, Array, Array]:
    x, statistics = operands[1], operands[2]
    sums = empty((2, statistics.shape[1]), statistics.dtype, x)
    dgamma, dbeta = x.program.rows(sums)
    gradient_sums((*operands, dgamma, dbeta), (channels_last, activation))
    return sums, dgamma, dbeta


@Launcher
def _input_gradient(
    operands: Operands, numbers: Numbers, channels_last: bool, activation: str
) -> tuple[Array, Array | None]:
    dy, x, statistics, residual, out, words, told, count = operands
    dgamma, dbeta = add_gradients((told, count))
    arrays = (dy, x, statistics, dgamma, dbeta, residual, out, None, words)
    return input_gradient(arrays, (1, channels_last, activation), numbers)
