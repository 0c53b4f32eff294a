"""Launching ``max_pool.cu``."""

from __future__ import annotations

import math

import numpy as np

from gpu_layers.core.argmax import argmax_dtype
from gpu_layers.core.array import Array
from gpu_layers.core.window import Window
from gpu_layers.kernels import global_pool
from gpu_layers.kernels.arrays import ELEMENT_TYPES, delivered, element_type, empty, ready, ready_if_given
from gpu_layers.kernels.dropout import divisor
from gpu_layers.kernels.elementwise import blocks_for
from gpu_layers.kernels.pool_boxes import BOX_BYTES, BOXES, boxed
from gpu_layers.kernels.pool_plan import (
    ALL_TILES,
    STRUCTS,
    TiledKernels,
    WideKernels,
    adaptive_backward_plan,
    adaptive_forward_plan,
    adaptive_template,
    apart,
    general_template,
    nchw_template,
    plan_for,
    spatial_empty,
    spatial_result,
)
from gpu_layers.runtime.kernel import INTEGER_DTYPES, KernelTemplate, c_name, combinations
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.program import Launcher, Numbers, Operands

__all__ = ["max_pool_backward", "max_pool_forward", "max_pool_gather", "max_pool_indices"]

_FORWARD = general_template("max_pool.cu", "max_pool_forward")
_BACKWARD = general_template("max_pool.cu", "max_pool_backward")
_GATHER = general_template("max_pool.cu", "max_pool_gather")
# Outputs of a thread: ``kGatherOutputs`` of ``max_pool.cu``.
_GATHER_OUTPUTS = 8
_GATHER_NCHW = nchw_template("max_pool.cu", "max_pool_gather_nchw")
_SCATTER = general_template("max_pool.cu", "max_pool_scatter")
_FORWARD_ADAPTIVE = adaptive_template("max_pool_forward_adaptive")
# ``kBoxThreads`` of ``adaptive_pool.cu``.
_BOX_THREADS = 128
_BACKWARD_ADAPTIVE = KernelTemplate(
    "adaptive_pool.cu", "max_pool_backward_adaptive", combinations(T=ELEMENT_TYPES), {**STRUCTS, "PoolBoxes": BOXES}
)

_FORWARD_INTEGER = general_template(
    "max_pool_integer.cu", "max_pool_integer_forward", tuple(c_name(dtype) for dtype in INTEGER_DTYPES)
)

_INDICES = KernelTemplate("max_pool.cu", "max_pool_indices", combinations(Index=("int", "long long")), STRUCTS)

_FORWARD_TILED = TiledKernels("max_pool_tiled.cu", "max_pool_forward_tiled", ALL_TILES)
_BACKWARD_TILED = TiledKernels("max_pool_tiled.cu", "max_pool_backward_tiled")
_BACKWARD_WIDE = WideKernels("max_pool_wide.cu", "max_pool_backward_wide")


def max_pool_forward(
    x: Array, window: Window, channels_last: bool = False, lengths: Array | None = None, out: Array | None = None
) -> tuple[Array, Array]:
    """``gpu_layers.reference.max_pool_forward``, as a kernel."""
    return forward((x, lengths, out), (window, channels_last))


def max_pool_backward(
    dy: Array,
    argmax: Array,
    window: Window,
    channels_last: bool = False,
    lengths: Array | None = None,
    out: Array | None = None,
) -> Array:
    """``gpu_layers.reference.max_pool_backward``, as a kernel."""
    return backward((dy, argmax, lengths, out), (window, channels_last))


def max_pool_gather(
    x: Array,
    argmax: Array,
    window: Window,
    channels_last: bool = False,
    lengths: Array | None = None,
    out: Array | None = None,
) -> Array:
    """``gpu_layers.reference.max_pool_gather``, as a kernel."""
    return _gather((x, argmax, lengths, out), (window, channels_last))


def max_pool_indices(argmax: Array, window: Window, channels_last: bool = False, lengths: Array | None = None) -> Array:
    """``gpu_layers.reference.max_pool_indices``, as a kernel."""
    return _indices((argmax, lengths), (window, channels_last))


@Launcher
def forward(operands: Operands, numbers: Numbers, window: Window, channels_last: bool) -> tuple[Array, Array]:
    """Of ``max_pool_forward``."""
    x, lengths, out = operands
    x = ready(x)
    y = spatial_result(out, x, window.output_shape, channels_last)
    argmax = spatial_empty(x, window.output_shape, channels_last, argmax_dtype(window))
    if x.dtype.kind in "iu":
        plan = plan_for(x, window, "output", channels_last)
        kernel = _FORWARD_INTEGER(T=element_type(x), **plan.template_arguments)
        plan.run(kernel, (x, y, argmax.as_bytes(), ready_if_given(lengths), plan.struct))
        return delivered(y, out), argmax
    if global_pool.takes(x, window, channels_last, lengths, numbered=True):
        global_pool.global_max_forward(x, y, argmax, window, channels_last)
        return delivered(y, out), argmax
    tiled = _FORWARD_TILED.launch_for(x, window, "output", channels_last, lengths)
    if tiled is not None:
        tiled.run((x, y, argmax.as_bytes()))
        return delivered(y, out), argmax
    adaptive = adaptive_forward_plan(x, window, channels_last, lengths)
    if adaptive is not None:
        adaptive.run(_FORWARD_ADAPTIVE, x, (x, y, argmax.as_bytes(), adaptive.lanes))
        return delivered(y, out), argmax
    plan = plan_for(x, window, "output", channels_last)
    kernel = _FORWARD(T=element_type(x), **plan.template_arguments)
    plan.run(kernel, (x, y, argmax.as_bytes(), ready_if_given(lengths), plan.struct))
    return delivered(y, out), argmax


@Launcher
def _gather(operands: Operands, numbers: Numbers, window: Window, channels_last: bool) -> Array:
    x, argmax, lengths, out = operands
    x, argmax = ready(x), ready(argmax)
    y = spatial_result(out, x, window.output_shape, channels_last)
    plan = plan_for(x, window, "output", channels_last)
    if not channels_last and not window.adaptive and lengths is None and plan.template_arguments["Index"] == "int":
        arguments = (x, argmax.as_bytes(), y, divisor(math.prod(window.output_shape)), plan.struct)
        plan.run(_GATHER_NCHW(T=element_type(x)), arguments, _GATHER_OUTPUTS)
        return delivered(y, out)
    kernel = _GATHER(T=element_type(x), **plan.template_arguments)
    plan.run(kernel, (x, argmax.as_bytes(), y, ready_if_given(lengths), plan.struct))
    return delivered(y, out)


@Launcher
def _indices(operands: Operands, numbers: Numbers, window: Window, channels_last: bool) -> Array:
    argmax, lengths = operands
    argmax = ready(argmax)
    indices = empty(argmax.shape, np.int64, argmax)
    plan = plan_for(argmax, window, "output", channels_last, most_in_vectors=0)
    kernel = _INDICES(Index=plan.template_arguments["Index"])
    plan.run(kernel, (argmax.as_bytes(), indices, ready_if_given(lengths), plan.struct))
    return indices


@Launcher
def backward(operands: Operands, numbers: Numbers, window: Window, channels_last: bool) -> Array:
    """Of ``max_pool_backward``."""
    dy, argmax, lengths, out = operands
    dy, argmax = ready(dy), ready(argmax)
    dx = spatial_result(out, dy, window.input_shape, channels_last)
    _fill_gradient(dy, argmax, dx, window, channels_last, lengths)
    return delivered(dx, out)


def _fill_gradient(
    dy: Array, argmax: Array, dx: Array, window: Window, channels_last: bool, lengths: Array | None
) -> None:
    if global_pool.takes(dy, window, channels_last, lengths, numbered=True):
        global_pool.global_backward(dy, argmax, dx, window, channels_last)
        return
    if lengths is None and _BACKWARD_WIDE.run(dy, window, channels_last, (dy, argmax.as_bytes(), dx)):
        return
    tiled = _BACKWARD_TILED.launch_for(dy, window, "input", channels_last, lengths)
    if tiled is not None:
        tiled.run((dy, argmax.as_bytes(), dx))
    elif (adaptive := adaptive_backward_plan(dy, window, channels_last, lengths)) is not None:
        if dx.size:
            _launch_adaptive(dy, argmax, dx, window, channels_last, adaptive.plan.struct)
    elif apart(window, lengths):
        plan = plan_for(dy, window, "output", channels_last)
        kernel = _SCATTER(T=element_type(dy), **plan.template_arguments)
        plan.run(kernel, (dy, argmax.as_bytes(), dx, plan.struct))
    else:
        plan = plan_for(dy, window, "input", channels_last)
        kernel = _BACKWARD(T=element_type(dy), **plan.template_arguments)
        plan.run(kernel, (dy, argmax.as_bytes(), dx, ready_if_given(lengths), plan.struct))


def _launch_adaptive(
    dy: Array, argmax: Array, dx: Array, window: Window, channels_last: bool, struct: np.ndarray
) -> None:
    depth, height, width = (1,) * (3 - window.rank) + window.input_shape
    slices, rows, columns = (1,) * (3 - window.rank) + window.output_shape
    most = BOX_BYTES // dx.dtype.itemsize
    number, boxes = boxed((depth, height, width), dy.shape, channels_last, most, (slices, rows, columns), _BOX_THREADS)
    arguments = (dy, argmax.as_bytes(), dx, struct, boxes)
    launch(_BACKWARD_ADAPTIVE(T=element_type(dy)), blocks_for(number, 1), _BOX_THREADS, arguments)
