"""Launching ``avg_pool.cu``."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_layers.core.array import Array
from gpu_layers.core.window import Window
from gpu_layers.kernels import global_pool
from gpu_layers.kernels.arrays import delivered, element_type, ready, ready_if_given
from gpu_layers.kernels.pool_plan import (
    TiledKernels,
    adaptive_backward_plan,
    adaptive_forward_plan,
    adaptive_template,
    apart,
    divisor_struct,
    general_template,
    plan_for,
    spatial_result,
)
from gpu_layers.runtime.program import Launcher, Numbers

__all__ = ["avg_pool_backward", "avg_pool_forward"]

_FORWARD = general_template("avg_pool.cu", "avg_pool_forward")
_BACKWARD = general_template("avg_pool.cu", "avg_pool_backward")
_SCATTER = general_template("avg_pool.cu", "avg_pool_scatter")
_FORWARD_ADAPTIVE = adaptive_template("avg_pool_forward_adaptive")
_BACKWARD_ADAPTIVE = adaptive_template("avg_pool_backward_adaptive")

_FORWARD_TILED = TiledKernels("avg_pool_tiled.cu", "avg_pool_forward_tiled")
_BACKWARD_TILED = TiledKernels("avg_pool_tiled.cu", "avg_pool_backward_tiled")


def avg_pool_forward(
    x: Array,
    window: Window,
    channels_last: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    lengths: Array | None = None,
    out: Array | None = None,
) -> Array:
    """``gpu_layers.reference.avg_pool_forward``, as a kernel."""
    return _forward((x, lengths, out), (window, channels_last, count_include_pad, divisor_override))


def avg_pool_backward(
    dy: Array,
    window: Window,
    channels_last: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    lengths: Array | None = None,
    out: Array | None = None,
) -> Array:
    """``gpu_layers.reference.avg_pool_backward``, as a kernel."""
    return _backward((dy, lengths, out), (window, channels_last, count_include_pad, divisor_override))


@Launcher
def _forward(
    operands: Sequence[Array],
    numbers: Numbers,
    window: Window,
    channels_last: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Array:
    x, lengths, out = operands
    x = ready(x)
    element = element_type(x)
    y = spatial_result(out, x, window.output_shape, channels_last)
    if global_pool.takes(x, window, channels_last, lengths):
        global_pool.global_avg_forward(x, y, window, channels_last, divisor_override)
        return delivered(y, out)
    divisor = divisor_struct(window, element, count_include_pad, divisor_override, lengths)
    tiled = _FORWARD_TILED.launch_for(x, window, "output", channels_last, lengths)
    if tiled is not None:
        tiled.run((x, y), (divisor,))
    elif (adaptive := adaptive_forward_plan(x, window, channels_last, lengths)) is not None:
        adaptive.run(_FORWARD_ADAPTIVE, x, (x, y, adaptive.lanes), (divisor,))
    else:
        plan = plan_for(x, window, "output", channels_last, window.taps)
        kernel = _FORWARD(T=element, **plan.template_arguments)
        plan.run(kernel, (x, y, ready_if_given(lengths), plan.struct, divisor))
    return delivered(y, out)


@Launcher
def _backward(
    operands: Sequence[Array],
    numbers: Numbers,
    window: Window,
    channels_last: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Array:
    dy, lengths, out = operands
    dy = ready(dy)
    element = element_type(dy)
    dx = spatial_result(out, dy, window.input_shape, channels_last)
    if global_pool.takes(dy, window, channels_last, lengths):
        global_pool.global_backward(dy, None, dx, window, channels_last, divisor_override)
        return delivered(dx, out)
    divisor = divisor_struct(window, element, count_include_pad, divisor_override, lengths)
    tiled = _BACKWARD_TILED.launch_for(dy, window, "input", channels_last, lengths)
    if tiled is not None:
        tiled.run((dy, dx), (divisor,))
    elif (adaptive := adaptive_backward_plan(dy, window, channels_last, lengths)) is not None:
        adaptive.run(_BACKWARD_ADAPTIVE, dy, (dy, dx), (divisor,))
    elif apart(window, lengths):
        plan = plan_for(dy, window, "output", channels_last, window.taps)
        kernel = _SCATTER(T=element, **plan.template_arguments)
        plan.run(kernel, (dy, dx, plan.struct, divisor))
    else:
        plan = plan_for(dy, window, "input", channels_last, window.taps)
        kernel = _BACKWARD(T=element, **plan.template_arguments)
        plan.run(kernel, (dy, dx, ready_if_given(lengths), plan.struct, divisor))
    return delivered(dx, out)
