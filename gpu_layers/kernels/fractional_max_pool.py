"""Launching ``fractional_max_pool.cu``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.fractional_window import FractionalWindow
from gpu_layers.kernels.arrays import ACCUMULATE_TYPES, ELEMENT_TYPES, delivered, element_type, empty, ready
from gpu_layers.kernels.dropout import DIVISOR, STRUCTS, divisor
from gpu_layers.kernels.elementwise import blocks_for
from gpu_layers.kernels.pool_plan import spatial_empty, spatial_result
from gpu_layers.runtime.kernel import C_TYPES, KernelTemplate, accumulate_name, combinations
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.program import Launcher

__all__ = ["fractional_max_pool_backward", "fractional_max_pool_forward", "fractional_pool_starts"]

_SOURCE, _THREADS = "fractional_max_pool.cu", 256
_POOL = np.dtype(
    [
        ("input", DIVISOR, (3,)),
        ("output", DIVISOR, (3,)),
        *((name, DIVISOR) for name in ("input_plane", "output_plane", "channels", "starts")),
        ("kernel", np.int32, (3,)),
        ("sample_of", np.int32, (3,)),
        ("samples", np.int32),
        ("channels_last", np.int32),
        ("planes", np.int64),
    ],
    align=True,
)
_STRUCTS = {**STRUCTS, "FractionalPool": _POOL}
_TYPES = combinations(T=ELEMENT_TYPES)
_STARTS = KernelTemplate(_SOURCE, "fractional_pool_starts", combinations(A=ACCUMULATE_TYPES), _STRUCTS)
_FORWARD = KernelTemplate(_SOURCE, "fractional_max_pool_forward", _TYPES, _STRUCTS)
_BACKWARD = KernelTemplate(_SOURCE, "fractional_max_pool_backward", _TYPES, _STRUCTS)


def _struct(window: FractionalWindow, planes: int, channels: int, channels_last: bool) -> np.ndarray:
    pool = np.zeros((), _POOL)
    for name, sizes in (("input", window.input_shape), ("output", window.output_shape)):
        for axis, size in enumerate(sizes):
            pool[name][axis] = divisor(size)
        pool[f"{name}_plane"] = divisor(math.prod(sizes))
    pool["channels"] = divisor(channels)
    pool["starts"] = divisor(sum(window.output_shape))
    pool["kernel"], pool["sample_of"] = window.kernel, window.sample_of
    pool["samples"], pool["channels_last"], pool["planes"] = window.samples, channels_last, planes
    return pool


def fractional_pool_starts(
    like: Array,
    planes: int,
    window: FractionalWindow,
    samples: Array | None,
    seed: int,
    offset: int,
    rng_state: Array | None,
) -> Any:
    """``gpu_layers.reference.fractional_pool_starts``, as a kernel."""
    return _starts((like, samples, rng_state), (planes, window), (seed, offset))


def fractional_max_pool_forward(
    x: Array, starts: Array, window: FractionalWindow, channels_last: bool = False, out: Array | None = None
) -> tuple[Any, Any]:
    """``gpu_layers.reference.fractional_max_pool_forward``, as a kernel."""
    return _forward((x, starts, out), (window, channels_last))


def fractional_max_pool_backward(
    dy: Array,
    argmax: Array,
    starts: Array,
    window: FractionalWindow,
    channels_last: bool = False,
    out: Array | None = None,
) -> Any:
    """``gpu_layers.reference.fractional_max_pool_backward``, as a kernel."""
    return _backward((dy, argmax, starts, out), (window, channels_last))


@Launcher
def _starts(operands: Any, numbers: Any, planes: int, window: FractionalWindow) -> Any:
    like, samples, rng_state = operands
    samples = None if samples is None else ready(samples)
    wide = accumulate_name(element_type(like))
    outputs = sum(window.output_shape)
    starts = empty((planes, outputs), np.int32, like)
    if planes:
        number = C_TYPES[wide].type
        sizes = zip(window.input_shape, window.kernel, window.output_shape, strict=True)
        alphas = [float(number(size - kernel) / number(max(count - 1, 1))) for size, kernel, count in sizes]
        arguments = (samples, starts, *alphas, *numbers, rng_state, _struct(window, planes, 1, False))
        launch(_STARTS(A=wide), blocks_for(starts.size, _THREADS), _THREADS, arguments)
    return starts


def _pool(array: Array, window: FractionalWindow, channels_last: bool) -> np.ndarray:
    channels = array.shape[-1 if channels_last else 1]
    return _struct(window, array.shape[0] * channels, channels, channels_last)


@Launcher
def _forward(operands: Any, numbers: Any, window: FractionalWindow, channels_last: bool) -> Any:
    x, starts, out = operands
    x, starts = ready(x), ready(starts)
    y = spatial_result(out, x, window.output_shape, channels_last)
    argmax = spatial_empty(x, window.output_shape, channels_last, np.uint8)
    if y.size:
        arguments = (x, starts, y, argmax, _pool(x, window, channels_last))
        launch(_FORWARD(T=element_type(x)), blocks_for(y.size, _THREADS), _THREADS, arguments)
    return delivered(y, out), argmax


@Launcher
def _backward(operands: Any, numbers: Any, window: FractionalWindow, channels_last: bool) -> Any:
    dy, argmax, starts, out = operands
    dy, argmax, starts = ready(dy), ready(argmax), ready(starts)
    dx = spatial_result(out, dy, window.input_shape, channels_last)
    if dx.size:
        arguments = (dy, argmax, starts, dx, _pool(dy, window, channels_last))
        launch(_BACKWARD(T=element_type(dy)), blocks_for(dx.size, _THREADS), _THREADS, arguments)
    return delivered(dx, out)
