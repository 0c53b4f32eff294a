"""Launching ``global_pool.cu``: pooling with one window, the whole plane."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpu_layers.core.window import Window
from gpu_layers.kernels.arrays import ELEMENT_TYPES, element_type, vector_width
from gpu_layers.kernels.dropout import DIVISOR, divisor
from gpu_layers.kernels.elementwise import blocks_for
from gpu_layers.runtime.kernel import KernelTemplate, combinations
from gpu_layers.runtime.launch import launch

_THREADS = 256
_WARP = 32
# Positions of a plane are counted in 32 bits. Not one of ``limits()``: another kernel would add up in another order.
_POSITIONS_BELOW = 2**30
# What a thread reads at least before others help it with the plane.
_VALUES_A_LANE = 8
# From this size on a block has a plane, not a warp.
_BLOCK_PLANE = 16384

_LAYOUT = np.dtype(
    [
        ("planes", np.int64),
        ("positions", np.int64),
        ("samples", np.int64),
        ("lanes", np.int32),
        ("argmax_bytes", np.int32),
    ],
    align=True,
)
_STRUCTS = {"GlobalLayout": _LAYOUT, "Divisor64": DIVISOR}


def _template(function: str) -> KernelTemplate:
    return KernelTemplate("global_pool.cu", function, combinations(T=ELEMENT_TYPES), _STRUCTS)


_MAX = {name: _template(f"global_max_{name}") for name in ("nchw", "nhwc")}
_AVG = {name: _template(f"global_avg_{name}") for name in ("nchw", "nhwc")}
_SPREAD_PLANES = _template("global_spread_nchw")
_SPREAD_ROWS = _template("global_spread_nhwc")


def takes(array: Any, window: Window, channels_last: bool, lengths: Any | None = None) -> bool:
    """Whether these kernels do a pooling: one window that is the plane, of fewer than 2**30 positions.

    Channels that make no vectors are left to the general kernels.
    """
    fits = window.is_global and window.taps < _POSITIONS_BELOW and lengths is None
    return fits and not (channels_last and array.shape[-1] % vector_width(array.dtype))


def _layout(array: Any, window: Window, channels_last: bool, argmax_bytes: int) -> tuple[str, int, np.ndarray]:
    """Which kind of kernel, its blocks, and what it takes."""
    if channels_last:
        vectors = array.shape[-1] // vector_width(array.dtype)
        lanes = min(1 << (vectors - 1).bit_length(), _WARP)
        blocks = array.shape[0] * -(-vectors // lanes)
        return "nhwc", blocks, np.array((vectors, window.taps, array.shape[0], lanes, argmax_bytes), _LAYOUT)
    planes = array.shape[0] * array.shape[1]
    lanes = _THREADS
    if window.taps < _BLOCK_PLANE:
        lanes = min(1 << (max(window.taps // _VALUES_A_LANE, 1) - 1).bit_length(), _WARP)
    layout = np.array((planes, window.taps, 1, lanes, argmax_bytes), _LAYOUT)
    return "nchw", blocks_for(planes, _THREADS // lanes), layout


def global_max_forward(x: Any, y: Any, argmax: Any, window: Window, channels_last: bool) -> None:
    """Fill y and taps as ``max_pool_forward`` does."""
    kind, blocks, layout = _layout(x, window, channels_last, argmax.dtype.itemsize)
    if y.size:
        launch(_MAX[kind](T=element_type(x)), blocks, _THREADS, (x, y, argmax.as_bytes(), layout))


def global_avg_forward(x: Any, y: Any, window: Window, channels_last: bool, divisor_override: int | None) -> None:
    """Fill y as ``avg_pool_forward`` does."""
    kind, blocks, layout = _layout(x, window, channels_last, 0)
    if y.size:
        factor = _factor(window, divisor_override)
        launch(_AVG[kind](T=element_type(x)), blocks, _THREADS, (x, y, factor, layout))


def global_backward(
    dy: Any, argmax: Any | None, dx: Any, window: Window, channels_last: bool, divisor_override: int | None = None
) -> None:
    """Fill dx from the gradient of each plane: as the backward of max pooling if there are taps, else as that of
    average pooling."""
    if not dx.size:
        return
    argmax_bytes = 0 if argmax is None else argmax.dtype.itemsize
    factor = _factor(window, divisor_override) if argmax is None else 1.0
    bytes_of_taps = None if argmax is None else argmax.as_bytes()
    if channels_last:
        _, tiles, layout = _layout(dy, window, channels_last, argmax_bytes)
        # Positions that a thread writes, one after another.
        rows = _THREADS // int(layout["lanes"])
        chunks = -(-window.taps // (rows * _VALUES_A_LANE))
        kernel = _SPREAD_ROWS(T=element_type(dy))
        launch(kernel, tiles * chunks, _THREADS, (dy, bytes_of_taps, dx, factor, chunks, layout))
        return
    layout = np.array((math.prod(dy.shape[:2]), window.taps, 1, 1, argmax_bytes), _LAYOUT)
    blocks = blocks_for(dx.size, _THREADS * vector_width(dx.dtype))
    kernel = _SPREAD_PLANES(T=element_type(dy))
    launch(kernel, blocks, _THREADS, (dy, bytes_of_taps, dx, factor, divisor(window.taps), layout))


def _factor(window: Window, divisor_override: int | None) -> float:
    return 1 / (window.taps if divisor_override is None else divisor_override)
