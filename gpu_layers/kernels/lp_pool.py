"""Launching ``lp_pool.cu``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpu_layers.core.argmax import argmax_dtype
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.window import Window
from gpu_layers.kernels.arrays import ELEMENT_TYPES, delivered, element_type, ready
from gpu_layers.kernels.pool_plan import STRUCTS, plan_for, spatial_empty, spatial_result
from gpu_layers.runtime.kernel import KernelTemplate, combinations
from gpu_layers.runtime.program import Launcher

__all__ = ["lp_pool_backward", "lp_pool_forward"]

# The powers are what costs: 64-bit indices for all sizes, one kernel less for each type.
_INDEX = "long long"
_INSTANTIATIONS = combinations(T=ELEMENT_TYPES, Index=(_INDEX,))
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


def lp_pool_forward(
    x: Any, window: Window, norm_type: float, channels_last: bool = False, out: Any | None = None
) -> tuple[Any, Any | None, Any | None, Any | None]:
    """``gpu_layers.reference.lp_pool_forward``, as a kernel."""
    return _forward((x, out), (window, norm_type, channels_last))


def lp_pool_backward(
    dy: Any,
    x: Any,
    argmax: Any | None,
    largest: Any | None,
    slopes: Any | None,
    window: Window,
    norm_type: float,
    channels_last: bool = False,
    out: Any | None = None,
) -> Any:
    """``gpu_layers.reference.lp_pool_backward``, as a kernel."""
    return _backward((dy, x, argmax, largest, slopes, out), (window, norm_type, channels_last))


@Launcher
def _forward(operands: Any, numbers: Any, window: Window, norm_type: float, channels_last: bool) -> Any:
    x, out = operands
    x = ready(x)
    y = spatial_result(out, x, window.output_shape, channels_last)
    argmax = largest = slopes = None
    if math.isinf(norm_type):
        argmax = spatial_empty(x, window.output_shape, channels_last, argmax_dtype(window))
    elif norm_type != 1:
        largest = spatial_empty(x, window.output_shape, channels_last)
        slopes = spatial_empty(x, window.output_shape, channels_last, accumulation_dtype(x.dtype))
    plan = plan_for(x, window, "output", channels_last, 0)
    arguments = (x, y, _bytes(argmax), largest, slopes, _rule(window, norm_type, x.dtype), plan.struct)
    plan.run(_FORWARD(T=element_type(x), Index=_INDEX), arguments)
    return delivered(y, out), argmax, largest, slopes


@Launcher
def _backward(operands: Any, numbers: Any, window: Window, norm_type: float, channels_last: bool) -> Any:
    dy, x, argmax, largest, slopes, out = operands
    dy, x = ready(dy), ready(x)
    argmax, largest, slopes = (None if one is None else ready(one) for one in (argmax, largest, slopes))
    dx = spatial_result(out, dy, window.input_shape, channels_last)
    plan = plan_for(dy, window, "input", channels_last, 0)
    arguments = (dy, x, _bytes(argmax), largest, slopes, dx, _rule(window, norm_type, dy.dtype), plan.struct)
    plan.run(_BACKWARD(T=element_type(dy), Index=_INDEX), arguments)
    return delivered(dx, out)


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


def _bytes(argmax: Any | None) -> Any | None:
    return None if argmax is None else argmax.as_bytes()
