"""Launching ``batch_norm_max_pool.cu``, after the statistics of ``batch_norm.cu``."""

from __future__ import annotations

from typing import Any

from gpu_layers.kernels.arrays import ELEMENT_TYPES, element_type, ready, vector_width
from gpu_layers.kernels.batch_norm import (
    SLOPED_ACTIVATIONS,
    activation_number,
    batch_norm_inference,
    batch_norm_statistics,
)
from gpu_layers.kernels.max_pool import max_pool_forward
from gpu_layers.kernels.pool_plan import STRUCTS, as_bytes, plan_for, spatial_empty
from gpu_layers.reference.pool_taps import tap_dtype
from gpu_layers.runtime.kernel import C_TYPES, KernelTemplate
from gpu_layers.window import Window

_FORWARD = KernelTemplate(
    "batch_norm_max_pool.cu",
    "batch_norm_max_pool_forward",
    "const T* x, const A* mean, const A* inv_std, const A* gamma, const A* beta, int activation, T* y, "
    "unsigned char* taps, PoolWindow window",
    [{"T": element, "Width": str(width)} for element in ELEMENT_TYPES for width in (vector_width(C_TYPES[element]), 1)],
    STRUCTS,
)


def batch_norm_max_pool(
    x: Any,
    gamma: Any | None,
    beta: Any | None,
    eps: float,
    window: Window,
    channels_last: bool = False,
    activation: str = "identity",
) -> tuple[Any, Any, Any, Any, Any]:
    """``gpu_layers.reference.batch_norm_max_pool``, as kernels."""
    x = ready(x)
    mean, var, inv_std = batch_norm_statistics(x, eps, channels_last)
    y, taps = batch_norm_max_pool_inference(x, mean, inv_std, gamma, beta, window, channels_last, activation)
    return y, taps, mean, var, inv_std


def batch_norm_max_pool_inference(
    x: Any,
    mean: Any,
    inv_std: Any,
    gamma: Any | None,
    beta: Any | None,
    window: Window,
    channels_last: bool = False,
    activation: str = "identity",
) -> tuple[Any, Any]:
    """``gpu_layers.reference.batch_norm_max_pool_inference``, as a kernel."""
    x = ready(x)
    plan = plan_for(x, window, "output", channels_last)
    if activation not in SLOPED_ACTIVATIONS or plan.template_arguments["Index"] != "int":
        # Rare: what takes longer to compute than to read, and planes of 2**31 elements.
        normalised = batch_norm_inference(x, mean, inv_std, gamma, beta, channels_last, None, activation)
        return max_pool_forward(normalised, window, channels_last)
    y = spatial_empty(x, window.output_shape, channels_last)
    taps = spatial_empty(x, window.output_shape, channels_last, tap_dtype(window))
    kernel = _FORWARD(T=element_type(x), Width=plan.template_arguments["Width"])
    gamma, beta = (None if array is None else ready(array) for array in (gamma, beta))
    arrays = (x, ready(mean), ready(inv_std), gamma, beta, activation_number(activation), y, as_bytes(taps))
    plan.run(kernel, (*arrays, plan.struct))
    return y, taps
