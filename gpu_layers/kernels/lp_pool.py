"""Launching ``lp_pool.cu``."""

from __future__ import annotations

import math

import numpy as np

from gpu_layers.core.argmax import argmax_dtype
from gpu_layers.core.array import Array
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.window import Window
from gpu_layers.kernels.arrays import ELEMENT_TYPES, delivered, element_type, ready
from gpu_layers.kernels.pool_plan import (
    SIDE_BY_SIDE,
    STRUCTS,
    TiledKernels,
    TiledLaunch,
    plan_for,
    spatial_empty,
    spatial_result,
)
from gpu_layers.runtime.kernel import KernelTemplate, combinations
from gpu_layers.runtime.program import Launcher, Numbers, Operands

__all__ = ["lp_pool_backward", "lp_pool_forward"]

_INSTANTIATIONS = combinations(T=ELEMENT_TYPES, Index=("int", "long long"))
_RULE = np.dtype(
    [
        ("p", np.float64),
        ("root", np.float64),
        ("taps", np.float64),
        ("whole", np.int32),
        ("cuts_off", np.int32),
        ("pad_after", np.int32, 3),
    ],
    align=True,
)
_STRUCTS = {**STRUCTS, "PowerRule": _RULE}

_FORWARD = KernelTemplate("lp_pool.cu", "lp_pool_forward", _INSTANTIATIONS, _STRUCTS)
_BACKWARD = KernelTemplate("lp_pool.cu", "lp_pool_backward", _INSTANTIATIONS, _STRUCTS)
# Of p = 1 and 2.
_FORWARD_TILED = TiledKernels("lp_pool_tiled.cu", "lp_pool_forward_tiled", SIDE_BY_SIDE, sums_alike=False)
_BACKWARD_TILED = TiledKernels("lp_pool_tiled.cu", "lp_pool_backward_tiled", SIDE_BY_SIDE, sums_alike=False)


def lp_pool_forward(
    x: Array, window: Window, norm_type: float, channels_last: bool = False, out: Array | None = None
) -> tuple[Array, Array | None]:
    """``gpu_layers.reference.lp_pool_forward``, as a kernel."""
    return _forward((x, out), (window, norm_type, channels_last))


def lp_pool_backward(
    dy: Array,
    x: Array,
    argmax: Array | None,
    window: Window,
    norm_type: float,
    channels_last: bool = False,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """``gpu_layers.reference.lp_pool_backward``, as a kernel."""
    return _backward((dy, x, argmax, out), (window, norm_type, channels_last))


@Launcher
def _forward(
    operands: Operands, numbers: Numbers, window: Window, norm_type: float, channels_last: bool
) -> tuple[Array, Array]:
    x, out = operands
    x = ready(x)
    y, argmax = spatial_result(out, x, window.output_shape, channels_last), None
    tiled = _tiled(_FORWARD_TILED, x, window, "output", norm_type, channels_last)
    if tiled is not None:
        tiled.run((x, y), (int(norm_type),))
    else:
        if math.isinf(norm_type):
            argmax = spatial_empty(x, window.output_shape, channels_last, argmax_dtype(window))
        _launch_forward(x, y, argmax, None, None, window, norm_type, channels_last)
    return delivered(y, out), argmax


@Launcher
def _backward(operands: Operands, numbers: Numbers, window: Window, norm_type: float, channels_last: bool) -> Array:
    dy, x, argmax, out = operands
    dy, x, argmax = ready(dy), ready(x), None if argmax is None else ready(argmax)
    dx = spatial_result(out, dy, window.input_shape, channels_last)
    tiled = _tiled(_BACKWARD_TILED, dy, window, "input", norm_type, channels_last)
    if tiled is not None:
        tiled.run((dy, x, dx), (int(norm_type),))
        return delivered(dx, out)
    largest = slopes = None
    if norm_type != 1 and argmax is None:
        largest = spatial_empty(x, window.output_shape, channels_last)
        slopes = spatial_empty(x, window.output_shape, channels_last, accumulation_dtype(x.dtype))
        _launch_forward(x, None, None, largest, slopes, window, norm_type, channels_last)
    plan = plan_for(dy, window, "input", channels_last, 0)
    kernel = _BACKWARD(T=element_type(dy), Index=plan.template_arguments["Index"])
    plan.run(kernel, (dy, x, _bytes(argmax), largest, slopes, dx, _rule(window, norm_type, dy.dtype), plan.struct))
    return delivered(dx, out)


def _launch_forward(
    x: Array,
    y: Array | None,
    argmax: Array | None,
    largest: Array | None,
    slopes: Array | None,
    window: Window,
    norm_type: float,
    channels_last: bool,
) -> None:
    plan = plan_for(x, window, "output", channels_last, 0)
    kernel = _FORWARD(T=element_type(x), Index=plan.template_arguments["Index"])
    plan.run(kernel, (x, y, _bytes(argmax), largest, slopes, _rule(window, norm_type, x.dtype), plan.struct))


def _tiled(
    kernels: TiledKernels, array: Array, window: Window, side: str, norm_type: float, channels_last: bool
) -> TiledLaunch | None:
    """The tiled kernel for p = 1 or 2 and windows of one tap along depth, none of them cut off, if there is one."""
    if norm_type not in (1, 2) or window.is_cut_off or (window.rank == 3 and window.kernel[0] > 1):
        return None
    return kernels.launch_for(array, window, side, channels_last)


def _rule(window: Window, p: float, dtype: np.dtype) -> np.ndarray:
    """``PowerRule`` of ``lp_pool.cu``."""
    rule = np.zeros((), _RULE)
    rule["p"], rule["root"], rule["taps"] = p, 1 / p, float(window.taps)
    # p - 1 products have as many roundings, pow has about two: float64 has no bits to spare for more.
    most = 3 if dtype == np.float64 else 100
    rule["whole"] = int(p) if p <= most and p == int(p) else 0
    rule["cuts_off"] = window.is_cut_off
    rule["pad_after"] = (0,) * (3 - window.rank) + window.pad_after
    return rule


def _bytes(argmax: Array | None) -> Array | None:
    return None if argmax is None else argmax.as_bytes()
