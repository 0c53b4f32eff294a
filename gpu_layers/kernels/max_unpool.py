"""Launching ``max_unpool.cu``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpu_layers.kernels.arrays import ELEMENT_TYPES, delivered, element_type, empty, ready, result_like
from gpu_layers.kernels.elementwise import blocks_for
from gpu_layers.runtime.kernel import KernelTemplate, combinations
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.program import Launcher

_THREADS = 256
_WARPS = _THREADS // 32
# Blocks that fill any GPU: each leaves one flag to read back.
_CHECK_BLOCKS = 1024
# Warps that keep any GPU busy; below that, several of them share a plane.
_ENOUGH_WARPS = 132 * 32
# Values of a plane's part at least: each part reads all indices.
_LEAST_PART = 1024

_CHECK = KernelTemplate(
    "max_unpool.cu",
    "max_unpool_check",
    "const long long* indices, Found* found, long long plane, long long n",
    combinations(Found=("unsigned char",)),
)
_FORWARD = KernelTemplate(
    "max_unpool.cu",
    "max_unpool_forward",
    "const T* x, const long long* indices, T* y, long long planes, long long values, long long plane, "
    "long long segments",
    combinations(T=ELEMENT_TYPES),
)
_BACKWARD = KernelTemplate(
    "max_unpool.cu",
    "max_unpool_backward",
    "const T* dy, const long long* indices, T* dx, long long planes, long long values, long long plane",
    combinations(T=ELEMENT_TYPES),
)


def max_unpool_indices_valid(indices: Any, plane: int) -> bool:
    """``gpu_layers.reference.max_unpool_indices_valid``, as a kernel; waits for it."""
    return not indices.size or not bool(_check((indices,), (plane,)).any())


def max_unpool_forward(x: Any, indices: Any, output_shape: tuple[int, ...], out: Any | None = None) -> Any:
    """``gpu_layers.reference.max_unpool_forward``, as a kernel."""
    return _forward((x, indices, out), (output_shape,))


def max_unpool_backward(dy: Any, indices: Any, out: Any | None = None) -> Any:
    """``gpu_layers.reference.max_unpool_backward``, as a kernel."""
    return _backward((dy, indices, out))


@Launcher
def _check(operands: Any, numbers: Any, plane: int) -> Any:
    indices = ready(operands[0])
    found = empty((min(blocks_for(indices.size, _THREADS), _CHECK_BLOCKS),), np.uint8, indices)
    launch(_CHECK(Found="unsigned char"), found.size, _THREADS, (indices, found, plane, indices.size))
    return found


@Launcher
def _forward(operands: Any, numbers: Any, output_shape: tuple[int, ...]) -> Any:
    x, indices, out = operands
    x, indices = ready(x), ready(indices)
    planes, plane = math.prod(x.shape[:2]), math.prod(output_shape)
    y = result_like(out, (*x.shape[:2], *output_shape), x)
    if y.size:
        segments = max(1, min(_ENOUGH_WARPS // planes, plane // _LEAST_PART))
        blocks = blocks_for(planes * segments, _WARPS)
        arguments = (x, indices, y, planes, math.prod(x.shape[2:]), plane, segments)
        launch(_FORWARD(T=element_type(x)), blocks, _THREADS, arguments)
    return delivered(y, out)


@Launcher
def _backward(operands: Any, numbers: Any) -> Any:
    dy, indices, out = operands
    dy, indices = ready(dy), ready(indices)
    dx = result_like(out, indices.shape, dy)
    if dx.size:
        planes, values, plane = math.prod(dy.shape[:2]), math.prod(indices.shape[2:]), math.prod(dy.shape[2:])
        blocks = blocks_for(dx.size, _THREADS)
        launch(_BACKWARD(T=element_type(dy)), blocks, _THREADS, (dy, indices, dx, planes, values, plane))
    return delivered(dx, out)
