"""Launching ``batch_norm_persistent.cu`` where a plan says so, else ``batch_norm.cu``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.running import RunningStatistics
from gpu_layers.kernels.arrays import ACCUMULATE_TYPES, delivered, destination, empty, ready
from gpu_layers.kernels.batch_norm_common import (
    EXACT_GRADIENT,
    PIECEWISE_LINEAR,
    ROWS,
    RUNNING_ARRAYS,
    LayoutPair,
    Normalization,
    PersistentKernel,
    activation_number,
    merge_gradients,
    merge_statistics,
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

# ``Epilogue`` of ``batch_norm_rules.cuh``.
_FUSIONS = tuple({"Epilogue": name} for name in ("kIdentity", "kPiecewiseLinear", "kSmooth"))
_FUSED: dict[str, Any] = {"of_nchw": _FUSIONS, "of_nhwc": _FUSIONS}
_STATISTICS = LayoutPair("batch_norm.cu", "batch_norm_statistics", initialised=RUNNING_ARRAYS)
_NORMALIZE = LayoutPair("batch_norm.cu", "batch_norm_normalize", **_FUSED)
_FOLD = KernelTemplate(
    "batch_norm.cu", "batch_norm_fold", combinations(A=ACCUMULATE_TYPES), STRUCTS, (*RUNNING_ARRAYS, "skipped")
)
_KEEP_STATISTICS = KernelTemplate("batch_norm.cu", "batch_norm_keep_statistics", combinations(A=ACCUMULATE_TYPES))
_GRADIENT_SUMS = LayoutPair("batch_norm.cu", "batch_norm_gradient_sums", **_FUSED)
_INPUT_GRADIENT = LayoutPair("batch_norm.cu", "batch_norm_input_gradient", **_FUSED)
_FORWARD_RESIDENT = PersistentKernel("batch_norm_persistent.cu", "batch_norm_forward_persistent")
_BACKWARD_RESIDENT = PersistentKernel("batch_norm_persistent.cu", "batch_norm_backward_persistent")


def _arguments(rule: Normalization) -> tuple[Any, ...]:
    return *rule.of_channels, rule.residual, rule.number


def _fusion(residual: Any | None, activation: str) -> str:
    if activation not in PIECEWISE_LINEAR:
        return "kSmooth"
    return "kIdentity" if residual is None and activation == "identity" else "kPiecewiseLinear"


def _of_inputs(x: Any, rule: Normalization, out: Sequence[Any] = (None, None)) -> tuple[Any, Any | None]:
    """Where dx and dresidual go, if there is a residual."""
    return destination(out[0], x), None if rule.residual is None else destination(out[1], x)


def of_running_statistics(running: RunningStatistics | None) -> tuple[tuple[Any, ...], tuple[float | None, int] | None]:
    """The arrays of running statistics, and how they are folded in: None if there are none."""
    if running is None:
        return (None, None, None), None
    if running.momentum is None:
        raise ValueError("a cumulative average is folded in by batch_norm_fold")
    return running.arrays, (running.momentum, running.values)


def batch_norm_forward(
    x: Any,
    gamma: Any | None,
    beta: Any | None,
    eps: float,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
    running: RunningStatistics | None = None,
    out: Any | None = None,
) -> tuple[Any, Any]:
    """``gpu_layers.reference.batch_norm_forward``, as kernels."""
    of_running, momentum = of_running_statistics(running)
    arguments = (eps, channels_last, activation, momentum)
    return forward((x, gamma, beta, residual, *of_running, out), arguments)


def batch_norm_statistics(
    x: Any,
    gamma: Any | None,
    beta: Any | None,
    eps: float,
    channels_last: bool = False,
    running: RunningStatistics | None = None,
) -> Any:
    """``gpu_layers.reference.batch_norm_statistics``, as a kernel that reads x once and writes nothing like it."""
    of_running, momentum = of_running_statistics(running)
    return statistics_of_batch((x, gamma, beta, *of_running), (eps, channels_last, momentum))


def batch_norm_inference(
    x: Any,
    mean: Any,
    var: Any,
    gamma: Any | None,
    beta: Any | None,
    eps: float,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
    out: Any | None = None,
) -> tuple[Any, Any]:
    """``gpu_layers.reference.batch_norm_inference``, as a kernel."""
    return _inference((x, mean, var, gamma, beta, residual, out), (eps, channels_last, activation))


def batch_norm_backward(
    dy: Any,
    x: Any,
    statistics: Any,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
    out: tuple[Any | None, Any | None] = (None, None),
) -> tuple[Any, Any, Any, Any | None]:
    """``gpu_layers.reference.batch_norm_backward``, as kernels."""
    return backward((dy, x, statistics, residual, *out), (channels_last, activation))


def batch_norm_gradient_sums(
    dy: Any,
    x: Any,
    statistics: Any,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
) -> tuple[Any, Any]:
    """``gpu_layers.reference.batch_norm_gradient_sums``, as a kernel."""
    return _gradient_sums((dy, x, statistics, residual), (channels_last, activation))


def batch_norm_input_gradient(
    dy: Any,
    x: Any,
    statistics: Any,
    dgamma: Any,
    dbeta: Any,
    count: int,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
) -> tuple[Any, Any | None]:
    """``gpu_layers.reference.batch_norm_input_gradient``, as a kernel."""
    return _input_gradient((dy, x, statistics, dgamma, dbeta, residual), (count, channels_last, activation))


def batch_norm_inference_backward(
    dy: Any,
    x: Any,
    statistics: Any,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
    out: tuple[Any | None, Any | None] = (None, None),
) -> tuple[Any, Any, Any, Any | None]:
    """``gpu_layers.reference.batch_norm_inference_backward``, as kernels."""
    return inference_backward((dy, x, statistics, residual, *out), (channels_last, activation))


def batch_norm_fold(
    statistics: Any,
    running: RunningStatistics,
    skipped: Any | None = None,
    accepted: Any | None = None,
    finite_only: bool = False,
) -> None:
    """``gpu_layers.reference.batch_norm_fold``, as a kernel."""
    arrays = (statistics, *running.arrays, skipped, accepted)
    _fold(arrays, (running.momentum, running.values, finite_only))


def _contiguous(arrays: Sequence[Any]) -> list[Any]:
    """Arrays that kernels change, or copies where they are strided; see :func:`_deliver`."""
    return [one if one is None or one.is_contiguous else ready(one) for one in arrays]


def _deliver(changed: Sequence[Any], arrays: Sequence[Any]) -> None:
    """Copy back what kernels have changed in copies."""
    for one, place in zip(changed, arrays, strict=True):
        if one is not None:
            delivered(one, place)


def _folding_rule(momentum: float, count: int, dtype: np.dtype) -> np.ndarray:
    """``FoldingRule`` of ``batch_norm_rules.cuh``."""
    numbers = (1 - momentum, momentum, count / max(count - 1, 1))
    return np.array(numbers, STRUCTS[f"FoldingRule<{c_name(dtype)}>"])


@Launcher
def forward(
    operands: Any, numbers: Any, eps: float, channels_last: bool, activation: str, folding: tuple[float, int] | None
) -> Any:
    """Of ``batch_norm_forward``."""
    x, gamma, beta, residual, *of_running, out = operands
    x = ready(x)
    gamma, beta, residual = (None if one is None else ready(one) for one in (gamma, beta, residual))
    plan, dtype = forward_plan(x.shape, x.dtype.itemsize, channels_last), accumulation_dtype(x.dtype)
    statistics = _new_statistics(x, plan, dtype)
    running, rule = _contiguous(of_running), _folding_rule(*(folding or (0.0, 2)), dtype)
    partial_moments, y = workspace(plan, 4, dtype, x), destination(out, x)
    if activation in PIECEWISE_LINEAR:
        before = (x, gamma, beta, residual, activation_number(activation), y, partial_moments, statistics, *running)
        if _FORWARD_RESIDENT.run(plan, x, before, (rule, eps)):
            _deliver(running, of_running)
            return delivered(y, out), statistics
    _launch_statistics(plan, x, dtype, (gamma, beta, partial_moments, statistics, *running, rule, eps))
    _deliver(running, of_running)
    _launch_normalize(x, Normalization.of(statistics, residual, activation), y, channels_last)
    return delivered(y, out), statistics


def _new_statistics(x: Any, plan: Plan, dtype: np.dtype) -> Any:
    return empty((len(ROWS), plan.channels), dtype, x)


@Launcher
def statistics_of_batch(
    operands: Any, numbers: Any, eps: float, channels_last: bool, folding: tuple[float, int] | None
) -> Any:
    """Of ``batch_norm_statistics``."""
    x, gamma, beta, *of_running = operands
    x = ready(x)
    gamma, beta = (None if one is None else ready(one) for one in (gamma, beta))
    plan, dtype = forward_plan(x.shape, x.dtype.itemsize, channels_last), accumulation_dtype(x.dtype)
    statistics = _new_statistics(x, plan, dtype)
    running, rule = _contiguous(of_running), _folding_rule(*(folding or (0.0, 2)), dtype)
    partial_moments = workspace(plan, 4, dtype, x)
    _launch_statistics(plan, x, dtype, (gamma, beta, partial_moments, statistics, *running, rule, eps))
    _deliver(running, of_running)
    return statistics


def _launch_statistics(plan: Plan, x: Any, dtype: np.dtype, results: tuple[Any, ...]) -> None:
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
    statistics = _new_statistics(x, plan, dtype)
    fused = _fusion(residual, activation)
    arguments = (x, mean, var, gamma, beta, residual, activation_number(activation), y, statistics, eps)
    _NORMALIZE.launch(plan, x, arguments, Epilogue=fused)
    return delivered(y, out), statistics


def keep_statistics(
    mean: Any, var: Any, gamma: Any | None, beta: Any | None, eps: float, channels: int, dtype: np.dtype
) -> Any:
    """Given statistics, as a forward keeps its own."""
    of_channels = [None if one is None else ready(one) for one in (mean, var, gamma, beta)]
    statistics = empty((len(ROWS), channels), dtype, mean)
    kernel = _KEEP_STATISTICS(A=c_name(dtype))
    launch(kernel, blocks_for(channels, THREADS), THREADS, (*of_channels, statistics, eps, channels))
    return statistics


def launch_normalize(x: Any, statistics: Any, y: Any, channels_last: bool, activation: str) -> None:
    """Fill y with phi of the normalised values."""
    _launch_normalize(x, Normalization.of(statistics, None, activation), y, channels_last)


def _launch_normalize(x: Any, rule: Normalization, y: Any, channels_last: bool) -> None:
    plan = elementwise_plan(x.shape, x.dtype.itemsize, channels_last)
    arguments = (x, *rule.of_channels, rule.residual, rule.number, y, None, 0.0)
    _NORMALIZE.launch(plan, x, arguments, Epilogue=_fusion(rule.residual, rule.activation))


@Launcher
def backward(operands: Any, numbers: Any, channels_last: bool, activation: str) -> Any:
    """Of ``batch_norm_backward``."""
    dy, x, statistics, residual, *out = operands
    dy, x, rule = ready(dy), ready(x), Normalization.of(statistics, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last)
    sums, inputs = sums_of_channels(plan, x), _of_inputs(x, rule, out)
    arguments, last = (dy, x, *_arguments(rule), *sums, *inputs), (1 / plan.count, plan.slots)
    if activation not in EXACT_GRADIENT or not _BACKWARD_RESIDENT.run(plan, x, arguments, last):
        _parameter_gradients(plan, dy, x, rule, sums)
        _input_gradients(dy, x, rule, sums[1:], plan.count, inputs, channels_last)
    return _gradients(inputs, out, sums)


def _gradients(inputs: tuple[Any, Any], out: Sequence[Any], sums: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    dx, dresidual = (one if one is None else delivered(one, place) for one, place in zip(inputs, out, strict=True))
    return dx, *sums[1:], dresidual


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
    inputs = _of_inputs(x, rule)
    _input_gradients(dy, x, rule, (ready(dgamma), ready(dbeta)), count, inputs, channels_last)
    return inputs


@Launcher
def inference_backward(operands: Any, numbers: Any, channels_last: bool, activation: str) -> Any:
    """Of ``batch_norm_inference_backward``."""
    dy, x, statistics, residual, *out = operands
    dy, x, rule = ready(dy), ready(x), Normalization.of(statistics, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last)
    sums, inputs = sums_of_channels(plan, x), _of_inputs(x, rule, out)
    _parameter_gradients(plan, dy, x, rule, sums)
    if _fusion(rule.residual, activation) != "kIdentity":
        _input_gradients(dy, x, rule, (None, None), plan.count, inputs, channels_last)
    else:
        # dx = gamma * inv_std * dy is the normalisation of dy with mean 0 and beta 0: x need not be read.
        _launch_normalize(dy, replace(rule, mean=None, beta=None), inputs[0], channels_last)
    return _gradients(inputs, out, sums)


@Launcher
def _fold(operands: Any, numbers: Any, momentum: float | None, count: int, finite_only: bool) -> None:
    statistics, *changed, accepted = operands
    mean, var, batches, skipped = _contiguous(changed)
    rule = _folding_rule(0.0 if momentum is None else momentum, count, mean.dtype)
    accepted = None if accepted is None else accepted.as_bytes()
    modes = (int(momentum is None), int(finite_only), int(count == 0))
    arguments = (ready(statistics), mean, var, batches, skipped, accepted, rule, *modes, mean.size)
    launch(_FOLD(A=c_name(mean.dtype)), 1, THREADS, arguments)
    _deliver((mean, var, batches, skipped), changed)


def _parameter_gradients(plan: Plan, dy: Any, x: Any, rule: Normalization, sums: tuple[Any | None, Any, Any]) -> None:
    _GRADIENT_SUMS.launch(plan, x, (dy, x, *_arguments(rule), *sums), Epilogue=_fusion(rule.residual, rule.activation))
    merge_gradients(plan, rule, sums)


def _input_gradients(
    dy: Any,
    x: Any,
    rule: Normalization,
    sums: tuple[Any | None, Any | None],
    count: int,
    inputs: tuple[Any, Any | None],
    channels_last: bool,
) -> None:
    """dx and dresidual, from dgamma and dbeta of all ``count`` values, or Nones where the statistics were given."""
    plan = elementwise_plan(x.shape, x.dtype.itemsize, channels_last)
    arguments = (dy, x, *_arguments(rule), *sums, *inputs, 1 / count)
    _INPUT_GRADIENT.launch(plan, x, arguments, Epilogue=_fusion(rule.residual, rule.activation))
