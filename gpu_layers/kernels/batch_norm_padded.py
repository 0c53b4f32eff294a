"""Launching ``batch_norm_padded.cu``: batch norm where only some positions of a batch count.

Each function takes what its namesake in ``gpu_layers.kernels.batch_norm`` does, and the positions. How many count is
no part of a program: the kernels are told in each call.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.valid import ValidPositions
from gpu_layers.kernels.arrays import delivered, destination, ready
from gpu_layers.kernels.batch_norm_common import (
    EXACT_GRADIENT,
    PIECEWISE_LINEAR,
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
from gpu_layers.kernels.batch_norm_plan import Plan, backward_plan, elementwise_plan, forward_plan
from gpu_layers.runtime.program import Launcher

_SOURCE = "batch_norm_padded.cu"
_FUSIONS = tuple({"Epilogue": name} for name in ("kPiecewiseLinear", "kSmooth"))
_FUSED: dict[str, Any] = {"of_nchw": _FUSIONS, "of_nhwc": _FUSIONS}
_STRAIGHT: dict[str, Any] = {"of_nchw": STRAIGHT_FUSIONS, "of_nhwc": STRAIGHT_FUSIONS}
_STATISTICS = LayoutPair(_SOURCE, "padded_batch_norm_statistics", initialised=RUNNING_ARRAYS)
_NORMALIZE = LayoutPair(_SOURCE, "padded_batch_norm_normalize", **_FUSED)
_GRADIENT_SUMS = LayoutPair(_SOURCE, "padded_batch_norm_gradient_sums", **_FUSED)
_INPUT_GRADIENT = LayoutPair(_SOURCE, "padded_batch_norm_input_gradient", **_FUSED)
_FORWARD_RESIDENT = PersistentKernel(_SOURCE, "padded_batch_norm_forward_persistent", **_STRAIGHT)
_BACKWARD_RESIDENT = PersistentKernel(_SOURCE, "padded_batch_norm_backward_persistent", **_STRAIGHT)
# The kernels count the values.
_UNCOUNTED = 0


def _fused(activation: str) -> str:
    return "kPiecewiseLinear" if activation in PIECEWISE_LINEAR else "kSmooth"


def forward(arrays: tuple[Any, ...], arguments: tuple[Any, ...], valid: ValidPositions) -> Any:
    """Of ``batch_norm_forward``."""
    *options, folding = arguments
    return _forward((*arrays, valid.words), (*options, folding and folding[0]), (valid.first,))


@Launcher
def _forward(
    operands: Any, numbers: Any, eps: float, channels_last: bool, activation: str, momentum: float | None
) -> Any:
    x, gamma, beta, residual, *of_running, out, words = operands
    x = ready(x)
    gamma, beta, residual = (None if one is None else ready(one) for one in (gamma, beta, residual))
    plan, dtype = forward_plan(x.shape, x.dtype.itemsize, channels_last), accumulation_dtype(x.dtype)
    statistics, running, rule = new_statistics(x, plan, dtype), contiguous(of_running), _rule(momentum, dtype)
    partial_moments, y, valid = workspace(plan, 4, dtype, x), destination(out, x), (words, *numbers)
    before = (x, gamma, beta, residual, activation_number(activation), y, partial_moments, statistics, *running)
    if activation in PIECEWISE_LINEAR:
        fused = fusion(residual, activation)
        if _FORWARD_RESIDENT.run(plan, x, before, (rule, eps, *valid), Epilogue=fused):
            deliver(running, of_running)
            return delivered(y, out), statistics
    _launch_statistics(plan, x, dtype, (gamma, beta, partial_moments, statistics, *running, rule, eps), valid)
    deliver(running, of_running)
    rules = Normalization.of(statistics, residual, activation)
    _launch_normalize(x, (*rules.of_channels, residual, rules.number, y, None, 0.0), words, activation, channels_last)
    return delivered(y, out), statistics


def _rule(momentum: float | None, dtype: np.dtype) -> np.ndarray:
    return folding_rule(0.0 if momentum is None else momentum, _UNCOUNTED, dtype)


def statistics_of_batch(arrays: tuple[Any, ...], arguments: tuple[Any, ...], valid: ValidPositions) -> Any:
    """Of ``batch_norm_statistics``."""
    *options, folding = arguments
    return _statistics((*arrays, valid.words), (*options, folding and folding[0]), (valid.first,))


@Launcher
def _statistics(operands: Any, numbers: Any, eps: float, channels_last: bool, momentum: float | None) -> Any:
    x, gamma, beta, *of_running, words = operands
    x = ready(x)
    gamma, beta = (None if one is None else ready(one) for one in (gamma, beta))
    plan, dtype = forward_plan(x.shape, x.dtype.itemsize, channels_last), accumulation_dtype(x.dtype)
    statistics, running, rule = new_statistics(x, plan, dtype), contiguous(of_running), _rule(momentum, dtype)
    partial_moments = workspace(plan, 4, dtype, x)
    results = (gamma, beta, partial_moments, statistics, *running, rule, eps)
    _launch_statistics(plan, x, dtype, results, (words, *numbers))
    deliver(running, of_running)
    return statistics


def _launch_statistics(plan: Plan, x: Array, dtype: np.dtype, results: tuple[Any, ...], valid: tuple[Any, Any]) -> None:
    _STATISTICS.launch(plan, x, (x, *results, *valid))
    merge_statistics(plan, results, dtype)


def _launch_normalize(x: Array, arguments: tuple[Any, ...], words: Array, activation: str, channels_last: bool) -> None:
    plan = elementwise_plan(x.shape, x.dtype.itemsize, channels_last)
    _NORMALIZE.launch(plan, x, (x, *arguments, words), Epilogue=_fused(activation))


def inference(arrays: tuple[Any, ...], arguments: tuple[Any, ...], valid: ValidPositions) -> Any:
    """Of ``batch_norm_inference``."""
    return _inference((*arrays, valid.words), arguments)


@Launcher
def _inference(operands: Any, numbers: Any, eps: float, channels_last: bool, activation: str) -> Any:
    x, mean, var, gamma, beta, residual, out, words = operands
    x = ready(x)
    of_channels = [None if one is None else ready(one) for one in (mean, var, gamma, beta)]
    residual = None if residual is None else ready(residual)
    y, dtype = destination(out, x), accumulation_dtype(x.dtype)
    statistics = new_statistics(x, elementwise_plan(x.shape, x.dtype.itemsize, channels_last), dtype)
    arguments = (*of_channels, residual, activation_number(activation), y, statistics, eps)
    _launch_normalize(x, arguments, words, activation, channels_last)
    return delivered(y, out), statistics


def backward(arrays: tuple[Any, ...], arguments: tuple[Any, ...], valid: ValidPositions) -> Any:
    """Of ``batch_norm_backward``."""
    return _backward((*arrays, valid.words), arguments, (valid.count,))


@Launcher
def _backward(operands: Any, numbers: Any, channels_last: bool, activation: str) -> Any:
    dy, x, statistics, residual, *out, words = operands
    dy, x, rule = ready(dy), ready(x), Normalization.of(statistics, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last)
    sums, inputs = sums_of_channels(plan, x), of_inputs(x, rule, out)
    arguments, valid = (dy, x, *rule.of_channels, rule.residual, rule.number, *sums, *inputs), (words, *numbers)
    last, fused = (plan.slots, *valid), fusion(residual, activation)
    if activation not in EXACT_GRADIENT or not _BACKWARD_RESIDENT.run(plan, x, arguments, last, Epilogue=fused):
        _parameter_gradients(plan, dy, x, rule, sums, words)
        _input_gradients(dy, x, rule, sums[1:], inputs, valid, channels_last)
    return gradients(inputs, out, sums)


def gradient_sums(arrays: tuple[Any, ...], arguments: tuple[Any, ...], valid: ValidPositions) -> Any:
    """Of ``batch_norm_gradient_sums``."""
    return _gradient_sums((*arrays, valid.words), arguments)


@Launcher
def _gradient_sums(operands: Any, numbers: Any, channels_last: bool, activation: str) -> Any:
    dy, x, statistics, residual, words = operands
    dy, x, rule = ready(dy), ready(x), Normalization.of(statistics, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last)
    sums = sums_of_channels(plan, x)
    _parameter_gradients(plan, dy, x, rule, sums, words)
    return sums[1:]


def input_gradient(arrays: tuple[Any, ...], arguments: tuple[Any, ...], valid: ValidPositions) -> Any:
    """Of ``batch_norm_input_gradient``."""
    count, *options = arguments
    return _input_gradient((*arrays, valid.words), tuple(options), (count,))


@Launcher
def _input_gradient(operands: Any, numbers: Any, channels_last: bool, activation: str) -> Any:
    dy, x, statistics, dgamma, dbeta, residual, words = operands
    dy, x, rule = ready(dy), ready(x), Normalization.of(statistics, residual, activation)
    inputs = of_inputs(x, rule)
    _input_gradients(dy, x, rule, (ready(dgamma), ready(dbeta)), inputs, (words, *numbers), channels_last)
    return inputs


def inference_backward(arrays: tuple[Any, ...], arguments: tuple[Any, ...], valid: ValidPositions) -> Any:
    """Of ``batch_norm_inference_backward``."""
    return _inference_backward((*arrays, valid.words), arguments, (valid.count,))


@Launcher
def _inference_backward(operands: Any, numbers: Any, channels_last: bool, activation: str) -> Any:
    dy, x, statistics, residual, *out, words = operands
    dy, x, rule = ready(dy), ready(x), Normalization.of(statistics, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last)
    sums, inputs = sums_of_channels(plan, x), of_inputs(x, rule, out)
    _parameter_gradients(plan, dy, x, rule, sums, words)
    _input_gradients(dy, x, rule, (None, None), inputs, (words, *numbers), channels_last)
    return gradients(inputs, out, sums)


def _parameter_gradients(
    plan: Plan, dy: Array, x: Array, rule: Normalization, sums: tuple[Any, Any, Any], words: Array
) -> None:
    arguments = (dy, x, *rule.of_channels, rule.residual, rule.number, *sums, words)
    _GRADIENT_SUMS.launch(plan, x, arguments, Epilogue=_fused(rule.activation))
    merge_gradients(plan, rule, sums)


def _input_gradients(
    dy: Array,
    x: Array,
    rule: Normalization,
    sums: tuple[Any | None, Any | None],
    inputs: tuple[Any, Any | None],
    valid: tuple[Any, Any],
    channels_last: bool,
) -> None:
    plan = elementwise_plan(x.shape, x.dtype.itemsize, channels_last)
    arguments = (dy, x, *rule.of_channels, rule.residual, rule.number, *sums, *inputs, *valid)
    _INPUT_GRADIENT.launch(plan, x, arguments, Epilogue=_fused(rule.activation))
