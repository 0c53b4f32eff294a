"""Batch norm and max pooling: in one read where blocks keep planes whole, else by two; and their backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpu_layers.core.argmax import argmax_dtype
from gpu_layers.core.array import Array
from gpu_layers.core.batch_norm_saved import BatchNormSaved
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.running import RunningStatistics
from gpu_layers.core.window import Window
from gpu_layers.kernels import batch_norm, max_pool
from gpu_layers.kernels.arrays import ELEMENT_TYPES, delivered, destination, element_type, empty, ready, vector_width
from gpu_layers.kernels.batch_norm import keep_statistics, launch_normalize, of_running_statistics, statistics_of_batch
from gpu_layers.kernels.batch_norm_common import (
    EXACT_GRADIENT,
    PIECEWISE_LINEAR,
    Folding,
    LayoutKernel,
    Normalization,
    PersistentKernel,
    activation_number,
    contiguous,
    deliver,
    folding_rule,
    merge_gradients,
    new_statistics,
    sums_of_channels,
    workspace,
)
from gpu_layers.kernels.batch_norm_plan import backward_plan, forward_plan
from gpu_layers.kernels.pool_plan import (
    STRUCTS,
    TWO_APART,
    Plan,
    TiledKernels,
    apart,
    plan_for,
    spatial_empty,
    spatial_result,
)
from gpu_layers.runtime.kernel import C_TYPES, KernelTemplate
from gpu_layers.runtime.limits import limits
from gpu_layers.runtime.program import Launcher, Numbers, Operands

__all__ = [
    "batch_norm_max_pool",
    "batch_norm_max_pool_backward",
    "batch_norm_max_pool_inference",
    "batch_norm_max_pool_inference_backward",
]

_FORWARD = KernelTemplate(
    "batch_norm_max_pool.cu",
    "batch_norm_max_pool_forward",
    [{"T": element, "Width": str(width)} for element in ELEMENT_TYPES for width in (vector_width(C_TYPES[element]), 1)],
    STRUCTS,
)

_FORWARD_TILED = TiledKernels("batch_norm_max_pool.cu", "batch_norm_max_pool_forward_tiled", TWO_APART)

# Kernel, stride and padding that kernels know when compiled.
_KNOWN = ((2, 2, 0), (3, 2, 1))
_KNOWN_ARGUMENTS = [{"Kernel": str(kernel), "Stride": str(stride), "Pad": str(pad)} for kernel, stride, pad in _KNOWN]
_OF_PLANES: dict[str, Any] = {"of_nchw": _KNOWN_ARGUMENTS, "structs": STRUCTS}
# Of a band of gradients, which leaves any GPU enough for what the kernels use beside it; and the lengths of its strips,
# of which the longest is taken that leaves room.
_MOST_BAND_BYTES = 40 * 1024
_STRIPS = (2, 1)
_FORWARD_PERSISTENT = PersistentKernel(
    "batch_norm_max_pool_persistent.cu", "batch_norm_max_pool_forward_persistent", fusions=(), **_OF_PLANES
)
_GRADIENT_SUMS = LayoutKernel(
    "batch_norm_max_pool_backward.cu",
    "batch_norm_max_pool_gradient_sums",
    fusions=_KNOWN_ARGUMENTS,
    single_channels=False,
    structs=STRUCTS,
)
_INPUT_GRADIENT = TiledKernels(
    "batch_norm_max_pool_backward.cu", "batch_norm_max_pool_input_gradient", TWO_APART, ELEMENT_TYPES
)
_BACKWARD_PERSISTENT = PersistentKernel(
    "batch_norm_max_pool_backward.cu", "batch_norm_max_pool_backward_persistent", **_OF_PLANES
)


def batch_norm_max_pool(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    window: Window,
    channels_last: bool = False,
    activation: str = "identity",
    running: RunningStatistics | None = None,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """``gpu_layers.reference.batch_norm_max_pool``, as kernels."""
    of_running, folding = of_running_statistics(running)
    return _forward((x, gamma, beta, *of_running, out), (eps, window, channels_last, activation, folding))


def batch_norm_max_pool_inference(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    window: Window,
    channels_last: bool = False,
    activation: str = "identity",
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """``gpu_layers.reference.batch_norm_max_pool_inference``, as kernels."""
    return _inference((x, mean, var, gamma, beta, out), (eps, window, channels_last, activation))


@Launcher
def _forward(
    operands: Operands,
    numbers: Numbers,
    eps: float,
    window: Window,
    channels_last: bool,
    activation: str,
    folding: Folding | None,
) -> Array:
    x, gamma, beta, *of_running, out = operands
    x = ready(x)
    strips = strips_of(window, x.shape, x.dtype.itemsize, channels_last, activation)
    if strips is not None:
        plan, dtype = forward_plan(x.shape, x.dtype.itemsize, False), accumulation_dtype(x.dtype)
        gamma, beta = (None if one is None else ready(one) for one in (gamma, beta))
        statistics, running = new_statistics(x, plan, dtype), contiguous(of_running)
        y = spatial_result(out, x, window.output_shape, False)
        argmax = spatial_empty(x, window.output_shape, False, np.uint8)
        before = (x, gamma, beta, activation_number(activation), y, argmax, workspace(plan, 4, dtype, x), statistics)
        last = (folding_rule(folding, dtype), eps, strips.rows, strips.window)
        if _FORWARD_PERSISTENT.run(plan, x, (*before, *running), last, folding, **strips.template_arguments):
            deliver(running, of_running)
            return delivered(y, out), argmax, statistics
    statistics = statistics_of_batch((x, gamma, beta, *of_running, None, None), (eps, channels_last, folding))
    return *_pooled(x, statistics, window, channels_last, activation, out), statistics


@dataclass(frozen=True)
class Strips:
    """How the threads of a block that keeps whole planes share their outputs.

    Attributes
    ----------
    rows : int
        Of outputs, of a strip.
    window : ndarray
        ``PoolWindow``, whose units are strips of tiles.
    template_arguments : dict of str to str
    """

    rows: int
    window: np.ndarray
    template_arguments: dict[str, str]


@lru_cache(maxsize=1024)
def strips_of(
    window: Window, shape: tuple[int, ...], itemsize: int, channels_last: bool, activation: str
) -> Strips | None:
    """None where planes are not kept whole, or the kernel does not know the window: then x is read twice."""
    arguments = None if channels_last else _known_window(window, itemsize)
    plan = forward_plan(shape, itemsize, False)
    if arguments is None or activation not in PIECEWISE_LINEAR:
        return None
    if plan.slots is None or plan.layout["chunks_per_plane"] != 1:
        return None
    columns, outputs = window.input_shape[-1] * itemsize // 16, window.output_shape[0]
    tiles = int(plan.layout["chunks_per_block"]) * columns

    def rounds(rows: int) -> int:
        """Rows of inputs that a thread takes one after another: two for each output, and one at the strip's begin."""
        return -(-tiles * -(-outputs // rows) // plan.block[0] // plan.block[1]) * (2 * rows + 1)

    rows = min(range(1, outputs + 1), key=rounds)
    units = (-(-outputs // rows), columns)
    return Strips(rows, Plan(window, units, (shape[0], shape[1]), 1, False, arguments).struct, arguments)


def _known_window(window: Window, itemsize: int) -> dict[str, str] | None:
    """What kernels of planes know of it; None if they do not, or if vectors are of two rows."""
    known, size, outputs = _known(window), window.input_shape[-1], window.output_shape[-1]
    if known is None or size % (16 // itemsize) or outputs * int(known["Stride"]) != size:
        return None
    return known


def _known(window: Window) -> dict[str, str] | None:
    """What kernels know of it when compiled, or None."""
    axes = set(zip(window.kernel, window.stride, window.pad_before, strict=True))
    if window.rank != 2 or window.adaptive or set(window.dilation) != {1} or len(axes) != 1:
        return None
    axis = axes.pop()
    return _KNOWN_ARGUMENTS[_KNOWN.index(axis)] if axis in _KNOWN else None


@Launcher
def _inference(
    operands: Operands, numbers: Numbers, eps: float, window: Window, channels_last: bool, activation: str
) -> Array:
    x, mean, var, gamma, beta, out = operands
    x = ready(x)
    channels = x.shape[-1 if channels_last else 1]
    statistics = keep_statistics(mean, var, gamma, beta, eps, channels, accumulation_dtype(x.dtype))
    return *_pooled(x, statistics, window, channels_last, activation, out), statistics


def _pooled(
    x: Array, statistics: Array, window: Window, channels_last: bool, activation: str, out: Array | None
) -> tuple[Array, Array]:
    """The pooled values of x, normalised and activated, and which tap each is."""
    element, plan = element_type(x), plan_for(x, window, "output", channels_last)
    tiled = _FORWARD_TILED.launch_for(x, window, "output", channels_last)
    if activation not in PIECEWISE_LINEAR or not (tiled or _is_normalised_once(window, plan)):
        # What takes longer to compute, or to compute again for each window, than to write and read.
        normalised = empty(x.shape, x.dtype, x)
        launch_normalize(x, statistics, normalised, channels_last, activation)
        return max_pool.forward((normalised, None, out), (window, channels_last))
    y = spatial_result(out, x, window.output_shape, channels_last)
    argmax = spatial_empty(x, window.output_shape, channels_last, argmax_dtype(window))
    mean, _, inv_std, gamma, beta = statistics.program.rows(statistics)
    arrays = (x, mean, inv_std, gamma, beta, activation_number(activation), y, argmax.as_bytes())
    if tiled is not None:
        tiled.run(arrays)
    else:
        plan.run(_FORWARD(T=element, Width=plan.template_arguments["Width"]), (*arrays, plan.struct))
    return delivered(y, out), argmax


def _is_normalised_once(window: Window, plan: Plan) -> bool:
    """Whether the general kernel, which has a value normalised by each window that sees it, is the faster way.

    It has no code for planes of 2**31 elements.
    """
    return apart(window, None) and plan.template_arguments["Index"] == "int"


@dataclass(frozen=True)
class _Gather:
    """How kernels take the gradient of each normalised value from the windows over it.

    Attributes
    ----------
    window : ndarray
        ``PoolWindow``, whose units are vectors of x, or by bands squares of inputs.
    template_arguments : dict of str to str
    strip : int
        Squares of inputs, one below the other, that a thread gathers.
    shared_bytes : int
        Of a block, for bands.
    """

    window: np.ndarray
    template_arguments: dict[str, str]
    strip: int = 0
    shared_bytes: int = 0


@lru_cache(maxsize=1024)
def _gather(
    window: Window, shape: tuple[int, ...], itemsize: int, channels_last: bool, activation: str, below: int
) -> _Gather | None:
    """None where the two steps are taken: pooling's, whose result is written and read again, and batch norm's.

    That is where more than four windows are over an input, each of which it would look at; where positions are not
    vectors; and, of planes, where a vector is of two rows or its windows not known when compiled. Then the search for
    windows would take longer than to write and read what they give.
    """
    width = 16 // itemsize
    vectors = int(np.prod(shape, dtype=object)) // width
    axes = list(zip(window.kernel, window.stride, window.pad_before, strict=True))
    few = all(kernel <= 2 * stride for kernel, stride, _ in axes) and set(window.dilation) == {1}
    if activation not in EXACT_GRADIENT or window.rank > 2 or window.adaptive or not few:
        return None
    if argmax_dtype(window) != np.uint8 or vectors >= below:
        return None
    if channels_last:
        if shape[-1] % width:
            return None
        units, arguments = window.input_shape, {}
    else:
        known = _known_window(window, itemsize)
        if known is None:
            return None
        units, arguments = (window.input_shape[0], window.input_shape[1] // width), known
    samples, channels = shape[0], shape[-1 if channels_last else 1]
    plan = Plan(window, units, (samples, channels), width, channels_last, arguments)
    return _Gather(plan.struct, arguments, 0 if channels_last else _strip_of_planes(window, shape, itemsize))


def _strip_of_planes(window: Window, shape: tuple[int, ...], itemsize: int) -> int:
    """Rows of windows that a thread of a block that keeps planes takes: with as few as can be in all."""
    plan = backward_plan(shape, itemsize, False)
    stride, columns = window.stride[0], window.input_shape[1] * itemsize // 16
    rows = -(-int(plan.layout["chunk"]) // window.input_shape[1] // stride)

    def taken(strip: int) -> int:
        """One more than a strip has, for each."""
        return -(-columns * -(-rows // strip) // plan.block[0]) * (strip + 1)

    return min(range(1, rows + 1), key=taken)


def batch_norm_max_pool_backward(
    dy: Array, argmax: Array, window: Window, norm: BatchNormSaved, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """``gpu_layers.reference.batch_norm_max_pool_backward``, as kernels."""
    arrays = (dy, argmax, norm.x, norm.statistics, out)
    return _backward(arrays, (window, norm.channels_last, norm.activation, True))


def batch_norm_max_pool_inference_backward(
    dy: Array, argmax: Array, window: Window, norm: BatchNormSaved, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """``gpu_layers.reference.batch_norm_max_pool_inference_backward``, as kernels."""
    arrays = (dy, argmax, norm.x, norm.statistics, out)
    return _backward(arrays, (window, norm.channels_last, norm.activation, False))


@lru_cache(maxsize=1024)
def _bands(window: Window, shape: tuple[int, ...], itemsize: int) -> _Gather | None:
    """By bands, see ``pooled_bands.cuh``; None where the kernels do not know the window, or a band is too large."""
    known, width = _known(window), 16 // itemsize
    if known is None:
        return None
    stride = int(known["Stride"])
    units = tuple(-(-size // stride) for size in window.input_shape)
    x, y = backward_plan(shape, itemsize, True).block
    of_row = max(1, y // units[1]) * stride * window.input_shape[1] * x * 16
    strip = next((length for length in _STRIPS if length * of_row <= _MOST_BAND_BYTES), None)
    if strip is None:
        return None
    plan = Plan(window, units, (shape[0], shape[-1]), width, True, known)
    of_channels = 3 * max(itemsize, 4) * width * x
    return _Gather(plan.struct, known, strip, strip * of_row + of_channels)


@Launcher
def _backward(
    operands: Operands, numbers: Numbers, window: Window, channels_last: bool, activation: str, depends: bool
) -> tuple[Array, Array, Array]:
    """``depends``: whether the statistics are those of x."""
    dy, argmax, x, statistics, out = operands
    dy, argmax, x = ready(dy), ready(argmax), ready(x)
    shape, itemsize = x.shape, x.dtype.itemsize
    gather = _gather(window, shape, itemsize, channels_last, activation, limits().index32_below)
    plan = backward_plan(shape, itemsize, channels_last)
    bands = _bands(window, shape, itemsize) if gather is not None and channels_last else None
    if gather is not None:
        norm = Normalization.of(statistics, None, activation)
        sums, dx, more = sums_of_channels(plan, x), destination(out, x), gather.template_arguments
        source = (dy, argmax.as_bytes(), x, *norm.of_channels, norm.number)
        last = (1 / plan.count, plan.slots, gather.strip, gather.window)
        if depends and _BACKWARD_PERSISTENT.run(plan, x, (*source, *sums, dx), last, **more):
            return delivered(dx, out), *sums[1:]
    by = gather if not channels_last else bands
    tiled = None if by is None else _INPUT_GRADIENT.launch_for(x, window, "input", channels_last)
    if by is None or tiled is None:
        dz = max_pool.backward((dy, argmax, None, None), (window, channels_last))
        step = batch_norm.backward if depends else batch_norm.inference_backward
        return step((dz, x, statistics, None, out, *[None] * 4), (channels_last, activation))[:3]
    _GRADIENT_SUMS.launch(
        plan, x, (*source, *sums, by.strip, by.window), shared_bytes=by.shared_bytes, **by.template_arguments
    )
    merge_gradients(plan, norm, sums)
    tiled.run((*source, *(sums[1:] if depends else (None, None)), dx, 1 / plan.count))
    return delivered(dx, out), *sums[1:]
