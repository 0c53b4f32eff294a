"""Launching ``batch_norm_persistent.cu`` where a plan says so, else ``batch_norm.cu``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.batch_norm_saved import BatchNormSaved
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.running import RunningStatistics
from gpu_layers.core.valid import ValidPositions
from gpu_layers.kernels import batch_norm_padded as padded
from gpu_layers.kernels.arrays import ACCUMULATE_TYPES, delivered, destination, empty, ready
from gpu_layers.kernels.batch_norm_common import (
    EXACT_GRADIENT,
    PIECEWISE_LINEAR,
    ROWS,
    RUNNING_ARRAYS,
    STRAIGHT_FUSIONS,
    LayoutPair,
    Normalization,
    PersistentKernel,
    activation_number,
    contiguous,
    deliver,
    folding_rule,
    fusion,
    gradients,
    merge_gradients,
    merge_statistics,
    new_statistics,
    of_inputs,
    sums_of_channels,
    workspace,
)
from gpu_layers.kernels.batch_norm_plan import STRUCTS, THREADS, Plan, backward_plan, elementwise_plan, forward_plan
from gpu_layers.kernels.elementwise import blocks_for
from gpu_layers.runtime.kernel import KernelTemplate, c_name, combinations
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.program import Launcher

__all__ = [
    "batch_norm_backward",
    "batch_norm_fold",
    "batch_norm_forward",
    "batch_norm_gradient_sums",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "batch_norm_input_gradient",
    "batch_norm_statistics",
]

_FUSIONS = (*STRAIGHT_FUSIONS, {"Epilogue": "kSmooth"})
_FUSED: dict[str, Any] = {"of_nchw": _FUSIONS, "of_nhwc": _FUSIONS}
_STRAIGHT: dict[str, Any] = {"of_nchw": STRAIGHT_FUSIONS, "of_nhwc": STRAIGHT_FUSIONS}
_STATISTICS = LayoutPair("batch_norm.cu", "batch_norm_statistics", initialised=RUNNING_ARRAYS)
_NORMALIZE = LayoutPair("batch_norm.cu", "batch_norm_normalize", **_FUSED)
_FOLD = KernelTemplate(
    "batch_norm.cu", "batch_norm_fold", combinations(A=ACCUMULATE_TYPES), STRUCTS, (*RUNNING_ARRAYS, "skipped")
)
_KEEP_STATISTICS = KernelTemplate("batch_norm.cu", "batch_norm_keep_statistics", combinations(A=ACCUMULATE_TYPES))
_GRADIENT_SUMS = LayoutPair("batch_norm.cu", "batch_norm_gradient_sums", **_FUSED)
_INPUT_GRADIENT = LayoutPair("batch_norm.cu", "batch_norm_input_gradient", **_FUSED)
_FORWARD_RESIDENT = PersistentKernel(
    "batch_norm_persistent.cu", "batch_norm_forward_persistent", keeps_part=True, **_STRAIGHT
)
_BACKWARD_RESIDENT = PersistentKernel(
    "batch_norm_persistent.cu", "batch_norm_backward_persistent", keeps_part=True, **_STRAIGHT
)


def _arguments(rule: Normalization) -> tuple[Any, ...]:
    return *rule.of_channels, rule.residual, rule.number


def of_running_statistics(running: RunningStatistics | None) -> tuple[tuple[Any, ...], tuple[float | None, int] | None]:
    """The arrays of running statistics, and how they are folded in: None if there are none."""
    if running is None:
        return (None, None, None), None
    if running.momentum is None:
        raise ValueError("a cumulative average is folded in by batch_norm_fold")
    return running.arrays, (running.momentum, running.values)


def batch_norm_forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    channels_last: bool = False,
    residual: Array | None = None,
    activation: str = "identity",
    running: RunningStatistics | None = None,
    out: Array | None = None,
    valid: ValidPositions | None = None,
) -> tuple[Any, Any]:
    """``gpu_layers.reference.batch_norm_forward``, as kernels."""
    of_running, momentum = of_running_statistics(running)
    arguments = (eps, channels_last, activation, momentum)
    if valid is not None:
        return padded.forward((x, gamma, beta, residual, *of_running, out), arguments, valid)
    return forward((x, gamma, beta, residual, *of_running, out), arguments)


def batch_norm_statistics(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    channels_last: bool = False,
    running: RunningStatistics | None = None,
    valid: ValidPositions | None = None,
) -> Any:
    """``gpu_layers.reference.batch_norm_statistics``, as a kernel that reads x once and writes nothing like it."""
    of_running, momentum = of_running_statistics(running)
    if valid is not None:
        return padded.statistics_of_batch((x, gamma, beta, *of_running), (eps, channels_last, momentum), valid)
    return statistics_of_batch((x, gamma, beta, *of_running), (eps, channels_last, momentum))


def batch_norm_inference(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    channels_last: bool = False,
    residual: Array | None = None,
    activation: str = "identity",
    out: Array | None = None,
    valid: ValidPositions | None = None,
) -> tuple[Any, Any]:
    """``gpu_layers.reference.batch_norm_inference``, as a kernel."""
    if valid is not None:
        return padded.inference((x, mean, var, gamma, beta, residual, out), (eps, channels_last, activation), valid)
    return _inference((x, mean, var, gamma, beta, residual, out), (eps, channels_last, activation))


def batch_norm_backward(
    dy: Array, saved: BatchNormSaved, out: tuple[Any | None, Any | None] = (None, None)
) -> tuple[Any, Any, Any, Any | None]:
    """``gpu_layers.reference.batch_norm_backward``, as kernels."""
    arrays = (dy, saved.x, saved.statistics, saved.residual, *out)
    if saved.valid is not None:
        return padded.backward(arrays, (saved.channels_last, saved.activation), saved.valid)
    return backward(arrays, (saved.channels_last, saved.activation))


def batch_norm_gradient_sums(dy: Array, saved: BatchNormSaved) -> tuple[Any, Any]:
    """``gpu_layers.reference.batch_norm_gradient_sums``, as a kernel."""
    arrays = (dy, saved.x, saved.statistics, saved.residual)
    if saved.valid is not None:
        return padded.gradient_sums(arrays, (saved.channels_last, saved.activation), saved.valid)
    return _gradient_sums(arrays, (saved.channels_last, saved.activation))


def batch_norm_input_gradient(
    dy: Array, saved: BatchNormSaved, dgamma: Array, dbeta: Array, count: int
) -> tuple[Any, Any | None]:
    """``gpu_layers.reference.batch_norm_input_gradient``, as a kernel."""
    arrays = (dy, saved.x, saved.statistics, dgamma, dbeta, saved.residual)
    if saved.valid is not None:
        return padded.input_gradient(arrays, (count, saved.channels_last, saved.activation), saved.valid)
    return _input_gradient(arrays, (count, saved.channels_last, saved.activation))


def batch_norm_inference_backward(
    dy: Array, saved: BatchNormSaved, out: tuple[Any | None, Any | None] = (None, None)
) -> tuple[Any, Any, Any, Any | None]:
    """``gpu_layers.reference.batch_norm_inference_backward``, as kernels."""
    arrays = (dy, saved.x, saved.statistics, saved.residual, *out)
    if saved.valid is not None:
        return padded.inference_backward(arrays, (saved.channels_last, saved.activation), saved.valid)
    return inference_backward(arrays, (saved.channels_last, saved.activation))


def batch_norm_fold(
    statistics: Array,
    running: RunningStatistics,
    skipped: Any | None = None,
    accepted: Any | None = None,
    finite_only: bool = False,
) -> None:
    """``gpu_layers.reference.batch_norm_fold``, as a kernel."""
    arrays = (statistics, *running.arrays, skipped, accepted)
    _fold(arrays, (running.momentum, running.values, finite_only))


@Launcher
def forward(
    operands: Any, numbers: Any, eps: float, channels_last: bool, activation: str, folding: tuple[float, int] | None
) -> Any:
    """Of ``batch_norm_forward``."""
    x, gamma, beta, residual, *of_running, out = operands
    x = ready(x)
    gamma, beta, residual = (None if one is None else ready(one) for one in (gamma, beta, residual))
    plan, dtype = forward_plan(x.shape, x.dtype.itemsize, channels_last), accumulation_dtype(x.dtype)
    statistics = new_statistics(x, plan, dtype)
    running, rule = contiguous(of_running), folding_rule(*(folding or (0.0, 2)), dtype)
    partial_moments, y = workspace(plan, 4, dtype, x), destination(out, x)
    if activation in PIECEWISE_LINEAR:
        before = (x, gamma, beta, residual, activation_number(activation), y, partial_moments, statistics, *running)
        if _FORWARD_RESIDENT.run(plan, x, before, (rule, eps), Epilogue=fusion(residual, activation)):
            deliver(running, of_running)
            return delivered(y, out), statistics
    _launch_statistics(plan, x, dtype, (gamma, beta, partial_moments, statistics, *running, rule, eps))
    deliver(running, of_running)
    _launch_normalize(x, Normalization.of(statistics, residual, activation), y, channels_last)
    return delivered(y, out), statistics


@Launcher
def statistics_of_batch(
    operands: Any, numbers: Any, eps: float, channels_last: bool, folding: tuple[float, int] | None
) -> Any:
    """Of ``batch_norm_statistics``."""
    x, gamma, beta, *of_running = operands
    x = ready(x)
    gamma, beta = (None if one is None else ready(one) for one in (gamma, beta))
    plan, dtype = forward_plan(x.shape, x.dtype.itemsize, channels_last), accumulation_dtype(x.dtype)
    statistics = new_statistics(x, plan, dtype)
    running, rule = contiguous(of_running), folding_rule(*(folding or (0.0, 2)), dtype)
    partial_moments = workspace(plan, 4, dtype, x)
    _launch_statistics(plan, x, dtype, (gamma, beta, partial_moments, statistics, *running, rule, eps))
    deliver(running, of_running)
    return statistics


def _launch_statistics(plan: Plan, x: Array, dtype: np.dtype, results: tuple[Any, ...]) -> None:
    _STATISTICS.launch(plan, x, (x, *results))
    merge_statistics(plan, results, dtype)


@Launcher
def _inference(operands: Any, numbers: Any, eps: float, channels_last: bool, activation: str) -> Any:
    x, mean, var, gamma, beta, residual, out = operands
    x = ready(x)
    mean, var, gamma, beta = (None if one is None else ready(one) for one in (mean, var, gamma, beta))
    residual = None if residual is None else ready(residual)
    y, dtype = destination(out, x), accumulation_dtype(x.dtype)
    if not x.size:
        channels = x.shape[-1 if channels_last else 1]
        return delivered(y, out), keep_statistics(mean, var, gamma, beta, eps, channels, dtype)
    plan = elementwise_plan(x.shape, x.dtype.itemsize, channels_last)
    statistics = new_statistics(x, plan, dtype)
    fused = fusion(residual, activation)
    arguments = (x, mean, var, gamma, beta, residual, activation_number(activation), y, statistics, eps)
    _NORMALIZE.launch(plan, x, arguments, Epilogue=fused)
    return delivered(y, out), statistics


def keep_statistics(
    mean: Array, var: Array, gamma: Array | None, beta: Array | None, eps: float, channels: int, dtype: np.dtype
) -> Any:
    """Given statistics, as a forward keeps its own."""
    of_channels = [None if one is None else ready(one) for one in (mean, var, gamma, beta)]
    statistics = empty((len(ROWS), channels), dtype, mean)
    kernel = _KEEP_STATISTICS(A=c_name(dtype))
    launch(kernel, blocks_for(channels, THREADS), THREADS, (*of_channels, statistics, eps, channels))
    return statistics


def launch_normalize(x: Array, statistics: Array, y: Array, channels_last: bool, activation: str) -> None:
    """Fill y with phi of the normalised values."""
    _launch_normalize(x, Normalization.of(statistics, None, activation), y, channels_last)


def _launch_normalize(x: Array, rule: Normalization, y: Array, channels_last: bool) -> None:
    plan = elementwise_plan(x.shape, x.dtype.itemsize, channels_last)
    arguments = (x, *rule.of_channels, rule.residual, rule.number, y, None, 0.0)
    _NORMALIZE.launch(plan, x, arguments, Epilogue=fusion(rule.residual, rule.activation))


@Launcher
def backward(operands: Any, numbers: Any, channels_last: bool, activation: str) -> Any:
    """Of ``batch_norm_backward``."""
    dy, x, statistics, residual, *out = operands
    dy, x, rule = ready(dy), ready(x), Normalization.of(statistics, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last)
    sums, inputs = sums_of_channels(plan, x), of_inputs(x, rule, out)
    arguments, last = (dy, x, *_arguments(rule), *sums, *inputs), (1 / plan.count, plan.slots)
    fused = fusion(residual, activation)
    if activation not in EXACT_GRADIENT or not _BACKWARD_RESIDENT.run(plan, x, arguments, last, Epilogue=fused):
        _parameter_gradients(plan, dy, x, rule, sums)
        _input_gradients(dy, x, rule, sums[1:], plan.count, inputs, channels_last)
    return gradients(inputs, out, sums)


@Launcher
def _gradient_sums(operands: Any, numbers: Any, channels_last: bool, activation: str) -> Any:
    dy, x, statistics, residual = operands
    dy, x, rule = ready(dy), ready(x), Normalization.of(statistics, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last)
    sums = sums_of_channels(plan, x)
    _parameter_gradients(plan, dy, x, rule, sums)
    return sums[1:]


@Launcher
def _input_gradient(operands: Any, numbers: Any, count: int, channels_last: bool, activation: str) -> Any:
    dy, x, statistics, dgamma, dbeta, residual = operands
    dy, x, rule = ready(dy), ready(x), Normalization.of(statistics, residual, activation)
    inputs = of_inputs(x, rule)
    _input_gradients(dy, x, rule, (ready(dgamma), ready(dbeta)), count, inputs, channels_last)
    return inputs


@Launcher
def inference_backward(operands: Any, numbers: Any, channels_last: bool, activation: str) -> Any:
    """Of ``batch_norm_inference_backward``."""
    dy, x, statistics, residual, *out = operands
    dy, x, rule = ready(dy), ready(x), Normalization.of(statistics, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last)
    sums, inputs = sums_of_channels(plan, x), of_inputs(x, rule, out)
    _parameter_gradients(plan, dy, x, rule, sums)
    if fusion(rule.residual, activation) != "kIdentity":
        _input_gradients(dy, x, rule, (None, None), plan.count, inputs, channels_last)
    else:
        # dx = gamma * inv_std * dy is the normalisation of dy with mean 0 and beta 0: x need not be read.
        _launch_normalize(dy, replace(rule, mean=None, beta=None), inputs[0], channels_last)
    return gradients(inputs, out, sums)


@Launcher
def _fold(operands: Any, numbers: Any, momentum: float | None, count: int, finite_only: bool) -> None:
    statistics, *changed, accepted = operands
    mean, var, batches, skipped = contiguous(changed)
    rule = folding_rule(0.0 if momentum is None else momentum, count, mean.dtype)
    accepted = None if accepted is None else accepted.as_bytes()
    modes = (int(momentum is None), int(finite_only), int(count == 0))
    arguments = (ready(statistics), mean, var, batches, skipped, accepted, rule, *modes, mean.size)
    launch(_FOLD(A=c_name(mean.dtype)), 1, THREADS, arguments)
    deliver((mean, var, batches, skipped), changed)


def _parameter_gradients(
    plan: Plan, dy: Array, x: Array, rule: Normalization, sums: tuple[Any | None, Any, Any]
) -> None:
    _GRADIENT_SUMS.launch(plan, x, (dy, x, *_arguments(rule), *sums), Epilogue=fusion(rule.residual, rule.activation))
    merge_gradients(plan, rule, sums)


def _input_gradients(
    dy: Array,
    x: Array,
    rule: Normalization,
    sums: tuple[Any | None, Any | None],
    count: int,
    inputs: tuple[Any, Any | None],
    channels_last: bool,
) -> None:
    """dx and dresidual, from dgamma and dbeta of all ``count`` values, or Nones where the statistics were given."""
    plan = elementwise_plan(x.shape, x.dtype.itemsize, channels_last)
    arguments = (dy, x, *_arguments(rule), *sums, *inputs, 1 / count)
    _INPUT_GRADIENT.launch(plan, x, arguments, Epilogue=fusion(rule.residual, rule.activation))
