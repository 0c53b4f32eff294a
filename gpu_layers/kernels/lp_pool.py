"""Launching ``lp_pool.cu``."""

from __future__ import annotations

import math
from typing import Any

from gpu_layers.kernels.arrays import ELEMENT_TYPES, element_type, ready
from gpu_layers.kernels.pool_plan import STRUCTS, plan_for, spatial_empty
from gpu_layers.reference.pool_taps import tap_dtype
from gpu_layers.runtime.kernel import KernelTemplate, combinations
from gpu_layers.runtime.program import Launcher
from gpu_layers.window import Window

# The powers are what costs: 64-bit indices for all sizes, one kernel less for each type.
_INDEX = "long long"
_INSTANTIATIONS = combinations(T=ELEMENT_TYPES, Index=(_INDEX,))

_FORWARD = KernelTemplate(
    "lp_pool.cu",
    "lp_pool_forward",
    "const T* x, T* y, unsigned char* taps, A p, A root, PoolWindow window",
    _INSTANTIATIONS,
    STRUCTS,
)
_BACKWARD = KernelTemplate(
    "lp_pool.cu",
    "lp_pool_backward",
    "const T* dy, const T* x, const T* y, const unsigned char* taps, T* dx, A exponent, PoolWindow window",
    _INSTANTIATIONS,
    STRUCTS,
)


def lp_pool_forward(x: Any, window: Window, norm_type: float, channels_last: bool = False) -> tuple[Any, Any | None]:
    """``gpu_layers.reference.lp_pool_forward``, as a kernel."""
    return _forward((x,), (window, norm_type, channels_last))


def lp_pool_backward(
    dy: Any,
    x: Any,
    y: Any | None,
    taps: Any | None,
    window: Window,
    norm_type: float,
    channels_last: bool = False,
) -> Any:
    """``gpu_layers.reference.lp_pool_backward``, as a kernel."""
    return _backward((dy, x, y, taps), (window, norm_type, channels_last))


@Launcher
def _forward(operands: Any, numbers: Any, window: Window, norm_type: float, channels_last: bool) -> Any:
    x = ready(operands[0])
    y = spatial_empty(x, window.output_shape, channels_last)
    largest = math.isinf(norm_type)
    taps = spatial_empty(x, window.output_shape, channels_last, tap_dtype(window)) if largest else None
    plan = plan_for(x, window, "output", channels_last, 0)
    p, root = (1.0, 1.0) if largest else (norm_type, 1 / norm_type)
    plan.run(_FORWARD(T=element_type(x), Index=_INDEX), (x, y, _bytes(taps), p, root, plan.struct))
    return y, taps


@Launcher
def _backward(operands: Any, numbers: Any, window: Window, norm_type: float, channels_last: bool) -> Any:
    dy, x, y, taps = operands
    dy, x = ready(dy), ready(x)
    y, taps = (None if one is None else ready(one) for one in (y, taps))
    dx = spatial_empty(dy, window.input_shape, channels_last)
    plan = plan_for(dy, window, "input", channels_last, 0)
    exponent = 0.0 if taps is not None else norm_type - 1
    plan.run(_BACKWARD(T=element_type(dy), Index=_INDEX), (dy, x, y, _bytes(taps), dx, exponent, plan.struct))
    return dx


def _bytes(taps: Any | None) -> Any | None:
    return None if taps is None else taps.as_bytes()
