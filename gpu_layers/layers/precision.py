"""The precision in which layers with weights work.

Parameters, their gradients and the optimizer's state are float32, or float64 in a layer made for float64 input. The
activations between layers may be float16, bfloat16, float32 (float64). A layer converts its input to the dtype of its
parameters, multiplies, and rounds the result once, to the dtype of its input. So a small update is not lost in a
half-precision weight, sums do not overflow, and NumPy, which has no BLAS for half types, stays fast.
"""

from __future__ import annotations

import contextlib

import numpy as np

from gpu_layers.core.array import Array, DTypeLike
from gpu_layers.core.cuda import array_module
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.ops.checks import check_dtype
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.copying import natural


def parameter_dtype(dtype: DTypeLike) -> np.dtype:
    """float32 or float64 as a NumPy dtype.

    Raises
    ------
    TypeError
        For another dtype.
    """
    found = None
    # NumPy takes None for float64, and has errors of its own for what is no dtype.
    with contextlib.suppress(TypeError, ValueError):
        found = None if dtype is None else np.dtype(dtype)
    if found not in (np.float32, np.float64):
        raise TypeError(
            f"dtype must be 'float32', or 'float64' for float64 input (float32 serves the half types), got {dtype}"
        )
    return found


def check_layer_dtype(x: Array, dtype: np.dtype) -> None:
    """TypeError unless a layer of this dtype takes x: float64 takes float64, float32 all others."""
    needed = accumulation_dtype(x.dtype)
    if needed != dtype:
        raise TypeError(f"{x.dtype} input needs a layer of dtype={needed.name!r}, got a layer of {dtype.name}")


def check_input(x: Array, weight: Array, rank: int, channels: int) -> None:
    """Raise unless a layer with this weight takes x: its array type, dtype, rank and second axis.

    Raises
    ------
    TypeError
        If x is not an array of the weight's type, or has a dtype that the layer does not take.
    ValueError
        For a wrong rank or number of channels.
    """
    backend_for(x, weight)
    check_dtype(x)
    check_layer_dtype(x, weight.dtype)
    if x.ndim != rank:
        raise ValueError(f"expected {rank}D input (got {x.ndim}D input)")
    if x.shape[1] != channels:
        raise ValueError(f"expected input with {channels} channels, got {x.shape[1]} (shape {list(x.shape)})")


def widened(values: Array, dtype: np.dtype) -> Array:
    """The values in the dtype of a layer's parameters, at addresses that the array library works on."""
    return natural(values).astype(dtype, copy=False)


def rounded(values: Array, dtype: np.dtype) -> Array:
    """The values in another dtype, C-contiguous; values that are too large for it become infinity."""
    with np.errstate(over="ignore"):
        return array_module(values).ascontiguousarray(values.astype(dtype, copy=False))
