"""Launching ``batch_norm_persistent.cu`` where a plan says so, else ``batch_norm.cu``.

Of a padded batch, where only some positions count, ``batch_norm_padded.cu`` is both. How many count is no part of a
program: the kernels are told in each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.batch_norm_saved import BatchNormSaved
from gpu_layers.core.cuda import array_module, place_of
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.running import RunningStatistics
from gpu_layers.core.valid import ValidPositions
from gpu_layers.kernels.arrays import ACCUMULATE_TYPES, delivered, destination, empty, ready
from gpu_layers.kernels.batch_norm_common import (
    EXACT_GRADIENT,
    PIECEWISE_LINEAR,
    ROWS,
    RUNNING_ARRAYS,
    STRAIGHT_FUSIONS,
    Folding,
    LayoutKernel,
    Normalization,
    PersistentKernel,
    activation_number,
    all_delivered,
    arrivals,
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
    unbiased_bits,
    workspace,
)
from gpu_layers.kernels.batch_norm_plan import STRUCTS, THREADS, Plan, backward_plan, elementwise_plan, forward_plan
from gpu_layers.kernels.elementwise import blocks_for
from gpu_layers.kernels.valid_positions import few_lengths, pack_lengths
from gpu_layers.runtime.kernel import Arguments, KernelTemplate, c_name, combinations
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.program import Launcher, Numbers, Operands

__all__ = [
    "batch_norm_backward",
    "batch_norm_fold",
    "batch_norm_forward",
    "batch_norm_gradient_sums",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "batch_norm_input_gradient",
    "batch_norm_merge_parts",
    "batch_norm_statistics",
]


_FUSIONS = (*STRAIGHT_FUSIONS, {"Epilogue": "kSmooth"})


class _Kernels:
    """The kernels of whole batches, or those of padded ones.

    Parameters
    ----------
    source, persistent_source : str
    name : str
        What their names begin with.
    """

    def __init__(self, source: str, persistent_source: str, name: str) -> None:
        self.statistics = LayoutKernel(source, f"{name}_statistics", initialised=RUNNING_ARRAYS)
        self.normalize = LayoutKernel(source, f"{name}_normalize", fusions=_FUSIONS)
        self.gradient_sums = LayoutKernel(source, f"{name}_gradient_sums", fusions=_FUSIONS)
        self.input_gradient = LayoutKernel(source, f"{name}_input_gradient", fusions=_FUSIONS)
        self.forward = PersistentKernel(persistent_source, f"{name}_forward_persistent", fusions=STRAIGHT_FUSIONS)
        self.backward = PersistentKernel(persistent_source, f"{name}_backward_persistent", fusions=STRAIGHT_FUSIONS)


_WHOLE = _Kernels("batch_norm.cu", "batch_norm_persistent.cu", "batch_norm")
_PADDED = _Kernels("batch_norm_padded.cu", "batch_norm_padded.cu", "padded_batch_norm")
_FOLD = KernelTemplate("batch_norm.cu", "batch_norm_fold", combinations(A=ACCUMULATE_TYPES), STRUCTS, RUNNING_ARRAYS)
_MERGE_PARTS = KernelTemplate(
    "batch_norm.cu", "batch_norm_merge_parts", combinations(A=ACCUMULATE_TYPES), STRUCTS, RUNNING_ARRAYS
)
_ADD_GRADIENTS = KernelTemplate("batch_norm.cu", "batch_norm_add_gradients", combinations(A=ACCUMULATE_TYPES))
_KEEP_STATISTICS = KernelTemplate("batch_norm.cu", "batch_norm_keep_statistics", combinations(A=ACCUMULATE_TYPES))


# The kernels are told in each call how many values a channel has.
_TOLD = 0
# Numbers of :func:`of_positions`.
_OF_POSITIONS = 2


def _of(words: Array | None, numbers: Sequence[Any]) -> tuple[_Kernels, tuple[Array, ...]]:
    """The kernels, and what those of padded batches take in addition: the positions that count, and numbers."""
    return (_WHOLE, ()) if words is None else (_PADDED, (words, *numbers))


def _arguments(norm: Normalization) -> tuple[Array, ...]:
    return *norm.of_channels, norm.residual, norm.number


def of_running_statistics(
    running: RunningStatistics | None, valid: ValidPositions | None = None
) -> tuple[tuple[Array, ...], Folding | None]:
    """The arrays of running statistics, and how a batch is folded in; Nones if there are none."""
    if running is None:
        return (None, None, None, None), None
    values = running.values if valid is None and isinstance(running.values, int) else _TOLD
    return running.arrays, (running.momentum, values, running.finite_only)


def of_positions(valid: ValidPositions, x: Array) -> tuple[Array, tuple[int, int]]:
    """What forwards take of a padded batch x: words, and numbers of the call."""
    return valid.words(x), _numbers_of(valid, x)


def _numbers_of(valid: ValidPositions, x: Array) -> tuple[int, int]:
    return valid.first, unbiased_bits(valid.count, x.dtype)


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
    statistics: Array | None = None,
) -> tuple[Array, Array]:
    """``gpu_layers.reference.batch_norm_forward``, as kernels."""
    of_running, folding = of_running_statistics(running, valid)
    arguments = (eps, channels_last, activation, folding)
    if valid is not None and valid.packed is None and valid.lengths is not None and (few := few_lengths(valid.lengths)):
        arrays = (x, gamma, beta, residual, *of_running, out, None, statistics)
        y, statistics, valid.packed = forward(arrays, (*arguments, valid.shape), (*_numbers_of(valid, x), *few))
        return y, statistics
    words, numbers = (None, ()) if valid is None else of_positions(valid, x)
    return forward((x, gamma, beta, residual, *of_running, out, words, statistics), arguments, numbers)


def batch_norm_statistics(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    channels_last: bool = False,
    running: RunningStatistics | None = None,
    valid: ValidPositions | None = None,
) -> Array:
    """``gpu_layers.reference.batch_norm_statistics``, as a kernel that reads x once and writes nothing like it."""
    of_running, folding = of_running_statistics(running, valid)
    words, numbers = (None, ()) if valid is None else of_positions(valid, x)
    return statistics_of_batch((x, gamma, beta, *of_running, words, None), (eps, channels_last, folding), numbers)


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
) -> tuple[Array, Array]:
    """``gpu_layers.reference.batch_norm_inference``, as a kernel."""
    words = None if valid is None else valid.words(x)
    return inference((x, mean, var, gamma, beta, residual, out, words), (eps, channels_last, activation))


def batch_norm_backward(
    dy: Array, saved: BatchNormSaved, out: tuple[Array | None, ...] = (None, None, None, None)
) -> tuple[Array, Array, Array, Array | None]:
    """``gpu_layers.reference.batch_norm_backward``, as kernels."""
    words, numbers = (None, ()) if saved.valid is None else (saved.valid.words(saved.x), (saved.valid.count,))
    arrays = (dy, saved.x, saved.statistics, saved.residual, *out, words)
    return backward(arrays, (saved.channels_last, saved.activation), numbers)


def batch_norm_gradient_sums(dy: Array, saved: BatchNormSaved) -> tuple[Array, Array]:
    """``gpu_layers.reference.batch_norm_gradient_sums``, as a kernel."""
    arrays = (
        dy,
        saved.x,
        saved.statistics,
        saved.residual,
        None if saved.valid is None else saved.valid.words(saved.x),
    )
    return gradient_sums((*arrays, None, None), (saved.channels_last, saved.activation))


def batch_norm_input_gradient(
    dy: Array,
    saved: BatchNormSaved,
    dgamma: Array,
    dbeta: Array,
    count: int,
    out: tuple[Array | None, ...] = (None, None),
) -> tuple[Array, Array | None]:
    """``gpu_layers.reference.batch_norm_input_gradient``, as a kernel."""
    words, numbers = (None, ()) if saved.valid is None else (saved.valid.words(saved.x), (count,))
    arrays = (dy, saved.x, saved.statistics, dgamma, dbeta, saved.residual, *out, words)
    return input_gradient(arrays, (_TOLD if numbers else count, saved.channels_last, saved.activation), numbers)


def batch_norm_inference_backward(
    dy: Array, saved: BatchNormSaved, out: tuple[Array | None, ...] = (None, None, None, None)
) -> tuple[Array, Array, Array, Array | None]:
    """``gpu_layers.reference.batch_norm_inference_backward``, as kernels."""
    words, numbers = (None, ()) if saved.valid is None else (saved.valid.words(saved.x), (saved.valid.count,))
    arrays = (dy, saved.x, saved.statistics, saved.residual, *out, words)
    return inference_backward(arrays, (saved.channels_last, saved.activation), numbers)


def batch_norm_fold(statistics: Array, running: RunningStatistics, accepted: Array | None = None) -> None:
    """``gpu_layers.reference.batch_norm_fold``, as a kernel."""
    values, told = (running.values, None) if isinstance(running.values, int) else (_TOLD, running.values)
    _fold((statistics, *running.arrays, accepted, told), ((running.momentum, values, running.finite_only),))


def batch_norm_merge_parts(
    parts: Array, counts: tuple[int, ...] | Array, channels: int, running: RunningStatistics | None = None
) -> tuple[Array, Array]:
    """``gpu_layers.reference.batch_norm_merge_parts``, as a kernel."""
    of_running, folding = of_running_statistics(running)
    if not isinstance(counts, tuple):
        return merge_parts((parts, counts, *of_running), (channels, folding), (0, 0))
    told, numbers = told_counts(counts, parts)
    return merge_parts((parts, told, *of_running), (channels, folding), numbers)[0], sum(counts)


def told_counts(counts: tuple[int, ...], like: Array) -> tuple[Array | None, tuple[int, int]]:
    """Values of parts for :func:`merge_parts`: an array, where all but the last are not alike; and two numbers."""
    told = None
    if counts[:-1].count(counts[0]) < len(counts) - 1:
        with place_of(like):
            told = array_module(like).asarray(np.array(counts, np.float64))
    return told, (counts[0], counts[-1])


@Launcher
def forward(
    operands: Operands,
    numbers: Numbers,
    eps: float,
    channels_last: bool,
    activation: str,
    folding: Folding | None,
    padded: tuple[int, ...] | None = None,
) -> Array:
    """Of ``batch_norm_forward``. ``padded``: the shape of positions whose lengths are more numbers, to be packed."""
    x, gamma, beta, residual, *of_running, out, words, kept = operands
    packed: tuple[Array, ...] = ()
    if padded is not None:
        words = pack_lengths(x, padded, numbers[_OF_POSITIONS:])
        packed = (words,)
    kernels, valid = _of(words, numbers[:_OF_POSITIONS])
    x = ready(x)
    gamma, beta, residual = (None if one is None else ready(one) for one in (gamma, beta, residual))
    plan = forward_plan(x.shape, x.dtype.itemsize, channels_last, words is not None)
    dtype = accumulation_dtype(x.dtype)
    statistics = new_statistics(x, plan, dtype) if kept is None else kept
    running, rule = contiguous(of_running), folding_rule(folding, dtype)
    partial_moments, y = workspace(plan, 4, dtype, x), destination(out, x)
    if activation in PIECEWISE_LINEAR:
        before = (x, gamma, beta, residual, activation_number(activation), y, partial_moments, statistics, *running)
        last = (rule, eps, plan.slots, *valid) if valid else (rule, eps)
        if kernels.forward.run(plan, x, before, last, folding, Epilogue=fusion(residual, activation)):
            deliver(running, of_running)
            return delivered(y, out), statistics, *packed
    results = (gamma, beta, partial_moments, statistics, *running, arrivals(folding, x), rule, eps)
    _launch_statistics(plan, x, dtype, results, kernels, valid)
    deliver(running, of_running)
    _launch_normalize(x, Normalization.of(statistics, residual, activation), y, channels_last, words)
    return delivered(y, out), statistics, *packed


@Launcher
def statistics_of_batch(
    operands: Operands, numbers: Numbers, eps: float, channels_last: bool, folding: Folding | None
) -> Array:
    """Of ``batch_norm_statistics``."""
    x, gamma, beta, *of_running, words, kept = operands
    x = ready(x)
    gamma, beta = (None if one is None else ready(one) for one in (gamma, beta))
    plan = forward_plan(x.shape, x.dtype.itemsize, channels_last, words is not None)
    dtype = accumulation_dtype(x.dtype)
    statistics = new_statistics(x, plan, dtype) if kept is None else kept
    running, rule = contiguous(of_running), folding_rule(folding, dtype)
    partial_moments = workspace(plan, 4, dtype, x)
    results = (gamma, beta, partial_moments, statistics, *running, arrivals(folding, x), rule, eps)
    _launch_statistics(plan, x, dtype, results, *_of(words, numbers))
    deliver(running, of_running)
    return statistics


def _launch_statistics(
    plan: Plan, x: Array, dtype: np.dtype, results: Arguments, kernels: _Kernels, valid: Arguments
) -> None:
    kernels.statistics.launch(plan, x, (x, *results, *valid))
    merge_statistics(plan, results, dtype, valid[-1] if valid else unbiased_bits(plan.count, dtype))


@Launcher
def inference(operands: Operands, numbers: Numbers, eps: float, channels_last: bool, activation: str) -> Array:
    """Of ``batch_norm_inference``."""
    x, mean, var, gamma, beta, residual, out, words = operands
    kernels, valid = _of(words, ())
    x = ready(x)
    mean, var, gamma, beta = contiguous((mean, var, gamma, beta))
    residual = None if residual is None else ready(residual)
    y, dtype = destination(out, x), accumulation_dtype(x.dtype)
    if not x.size:
        channels = x.shape[-1 if channels_last else 1]
        return delivered(y, out), keep_statistics(mean, var, gamma, beta, eps, channels, dtype)
    plan = elementwise_plan(x.shape, x.dtype.itemsize, channels_last)
    statistics = new_statistics(x, plan, dtype)
    arguments = (x, mean, var, gamma, beta, residual, activation_number(activation), y, statistics, eps, *valid)
    kernels.normalize.launch(plan, x, arguments, Epilogue=fusion(residual, activation))
    return delivered(y, out), statistics


def keep_statistics(
    mean: Array, var: Array, gamma: Array | None, beta: Array | None, eps: float, channels: int, dtype: np.dtype
) -> Array:
    """Given statistics, as a forward keeps its own."""
    of_channels = [None if one is None else ready(one) for one in (mean, var, gamma, beta)]
    statistics = empty((len(ROWS), channels), dtype, mean)
    kernel = _KEEP_STATISTICS(A=c_name(dtype))
    launch(kernel, blocks_for(channels, THREADS), THREADS, (*of_channels, statistics, eps, channels))
    return statistics


def launch_normalize(x: Array, statistics: Array, y: Array, channels_last: bool, activation: str) -> None:
    """Fill y with phi of the normalised values."""
    _launch_normalize(x, Normalization.of(statistics, None, activation), y, channels_last)


def _launch_normalize(x: Array, norm: Normalization, y: Array, channels_last: bool, words: Array | None = None) -> None:
    kernels, valid = _of(words, ())
    plan = elementwise_plan(x.shape, x.dtype.itemsize, channels_last)
    arguments = (x, *_arguments(norm), y, None, 0.0, *valid)
    kernels.normalize.launch(plan, x, arguments, Epilogue=fusion(norm.residual, norm.activation))


@Launcher
def backward(operands: Operands, numbers: Numbers, channels_last: bool, activation: str) -> Array:
    """Of ``batch_norm_backward``."""
    dy, x, statistics, residual, *out, words = operands
    dy, x, norm = ready(dy), ready(x), Normalization.of(statistics, residual, activation)
    kernels, valid = _of(words, numbers)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last, words is not None)
    sums, inputs = sums_of_channels(plan, x, out[1:3]), of_inputs(x, norm, out)
    arguments, fused = (dy, x, *_arguments(norm), *sums, *inputs), fusion(residual, activation)
    last = (plan.slots, *valid) if valid else (1 / plan.count, plan.slots)
    if activation not in EXACT_GRADIENT or not kernels.backward.run(plan, x, arguments, last, Epilogue=fused):
        _parameter_gradients(plan, dy, x, norm, sums, words)
        _input_gradients(dy, x, norm, sums[1:], plan.count, inputs, channels_last, words, numbers)
    return gradients(inputs, out, sums)


@Launcher
def gradient_sums(operands: Operands, numbers: Numbers, channels_last: bool, activation: str) -> Array:
    """Of ``batch_norm_gradient_sums``."""
    dy, x, statistics, residual, words, *out = operands
    dy, x, norm = ready(dy), ready(x), Normalization.of(statistics, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last, words is not None)
    sums = sums_of_channels(plan, x, out)
    _parameter_gradients(plan, dy, x, norm, sums, words)
    return sums[1:]


@Launcher
def input_gradient(operands: Operands, numbers: Numbers, count: int, channels_last: bool, activation: str) -> Array:
    """Of ``batch_norm_input_gradient``."""
    dy, x, statistics, dgamma, dbeta, residual, *out, words = operands
    dy, x, norm = ready(dy), ready(x), Normalization.of(statistics, residual, activation)
    inputs = of_inputs(x, norm, out)
    sums = (ready(dgamma), ready(dbeta))
    _input_gradients(dy, x, norm, sums, count, inputs, channels_last, words, numbers)
    return all_delivered(inputs, out)


@Launcher
def inference_backward(operands: Operands, numbers: Numbers, channels_last: bool, activation: str) -> Array:
    """Of ``batch_norm_inference_backward``."""
    dy, x, statistics, residual, *out, words = operands
    dy, x, norm = ready(dy), ready(x), Normalization.of(statistics, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last, words is not None)
    sums, inputs = sums_of_channels(plan, x, out[1:3]), of_inputs(x, norm, out)
    _parameter_gradients(plan, dy, x, norm, sums, words)
    if words is not None or fusion(norm.residual, activation) != "kIdentity":
        _input_gradients(dy, x, norm, (None, None), plan.count, inputs, channels_last, words, numbers)
    else:
        # dx = gamma * inv_std * dy is the normalisation of dy with mean 0 and beta 0: x need not be read.
        _launch_normalize(dy, replace(norm, mean=None, beta=None), inputs[0], channels_last)
    return gradients(inputs, out, sums)


@Launcher
def _fold(operands: Operands, numbers: Numbers, folding: Folding) -> None:
    statistics, *changed, accepted, values = operands
    running = contiguous(changed)
    mean, rule = running[0], folding_rule(folding, running[0].dtype)
    accepted = None if accepted is None else accepted.as_bytes()
    arguments = (ready(statistics), *running, accepted, values, rule, int(folding[1] == 0), mean.size)
    launch(_FOLD(A=c_name(mean.dtype)), 1, THREADS, arguments)
    deliver(running, changed)


@Launcher
def merge_parts(
    operands: Operands, numbers: Numbers, channels: int, folding: Folding | None, apart: int = 1
) -> tuple[Array, Array]:
    """Of ``batch_norm_merge_parts``. ``apart``: counts from one part's to the next."""
    parts, counts, *of_running = operands
    parts, counts = ready(parts), None if counts is None else ready(counts)
    statistics = empty((2, channels), parts.dtype, parts)
    total = None if counts is None else empty((), counts.dtype, counts)
    running = contiguous(of_running)
    launch_merge(parts, counts, numbers, channels, statistics, total, running, folding, apart)
    deliver(running, of_running)
    return statistics, total


def launch_merge(
    parts: Array,
    counts: Array | None,
    numbers: Numbers,
    channels: int,
    statistics: Array,
    total: Array | None,
    running: Sequence[Array] = (None, None, None, None),
    folding: Folding | None = None,
    apart: int = 1,
) -> None:
    """Merge into ``statistics``, (2, C), and ``total``; of no channels into the latter alone."""
    folded = (*running, arrivals(folding, parts), folding_rule(folding, parts.dtype), apart)
    arguments = (parts, counts, *numbers, statistics, total, *folded, *parts.shape, channels)
    launch(_MERGE_PARTS(A=c_name(parts.dtype)), max(-(-channels // THREADS), 1), THREADS, arguments)


@Launcher
def add_gradients(operands: Operands, numbers: Numbers) -> tuple[Array, Array]:
    """``gpu_layers.reference.batch_norm.batch_norm_add_gradients``, of operands."""
    sums, count = ready(operands[0]), operands[1]
    parts, _, channels = sums.shape
    dgamma, dbeta = (empty((channels,), sums.dtype, sums) for _ in range(2))
    blocks = max(-(-2 * channels // THREADS), 1)
    launch(_ADD_GRADIENTS(A=c_name(sums.dtype)), blocks, THREADS, (sums, count, dgamma, dbeta, parts, channels))
    return dgamma, dbeta


def _parameter_gradients(
    plan: Plan, dy: Array, x: Array, norm: Normalization, sums: tuple[Array | None, Array, Array], words: Array | None
) -> None:
    kernels, valid = _of(words, ())
    arguments = (dy, x, *_arguments(norm), *sums, *valid)
    kernels.gradient_sums.launch(plan, x, arguments, Epilogue=fusion(norm.residual, norm.activation))
    merge_gradients(plan, norm, sums)


def _input_gradients(
    dy: Array,
    x: Array,
    norm: Normalization,
    sums: tuple[Array | None, Array | None],
    count: int,
    inputs: tuple[Array, Array | None],
    channels_last: bool,
    words: Array | None,
    numbers: Sequence[Any],
) -> None:
    """dx and dresidual, from dgamma and dbeta of all ``count`` values, or Nones where the statistics were given."""
    kernels, valid = _of(words, numbers)
    plan = elementwise_plan(x.shape, x.dtype.itemsize, channels_last)
    arguments = (dy, x, *_arguments(norm), *sums, *inputs, *(valid or (1 / count,)))
    kernels.input_gradient.launch(plan, x, arguments, Epilogue=fusion(norm.residual, norm.activation))
