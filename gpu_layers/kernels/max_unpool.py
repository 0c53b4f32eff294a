"""Launching ``max_unpool.cu``."""

from __future__ import annotations

import math

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.reference_gpu import MULTIPROCESSORS, WARPS
from gpu_layers.kernels.arrays import ELEMENT_TYPES, delivered, element_type, empty, ready, result_like, vector_width
from gpu_layers.kernels.dropout import DIVISOR, divisor
from gpu_layers.kernels.elementwise import blocks_for
from gpu_layers.kernels.pool_plan import DIVISION, division, spatial_result
from gpu_layers.runtime.kernel import C_TYPES, Arguments, KernelTemplate, combinations
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.limits import limits
from gpu_layers.runtime.program import Launcher, Numbers, Operands

__all__ = ["max_unpool_backward", "max_unpool_forward", "max_unpool_keep"]

_THREADS = 256
# Blocks that fill any GPU: each leaves one flag to read back.
_KEEP_BLOCKS = 1024
# Threads that keep any GPU busy; below that, several of them share a plane.
_ENOUGH_THREADS = MULTIPROCESSORS * WARPS * 32 // 2
# Places of a plane's chunk at least: for each chunk all indices are read.
_LEAST_CHUNK = 1024
# Of a block at least, where there are planes enough; at most, so that a multiprocessor holds four blocks. A chunk is
# whole sectors.
_LEAST_PLACES, _MOST_PLACES, _SECTOR = 4096, 13 * 1024, 32

_KEEP = KernelTemplate("max_unpool.cu", "max_unpool_keep", combinations(Found=("unsigned char",)))
_FORWARD = KernelTemplate(
    "max_unpool.cu",
    "max_unpool_forward",
    [
        *combinations(T=ELEMENT_TYPES, Packed=("false",)),
        *combinations(T=[element for element in ELEMENT_TYPES if C_TYPES[element].itemsize == 2], Packed=("true",)),
    ],
    {"Divisor32": DIVISION},
)
_BACKWARD = KernelTemplate(
    "max_unpool.cu", "max_unpool_backward", combinations(T=ELEMENT_TYPES), {"Divisor64": DIVISOR}
)
_FORWARD_LAST = KernelTemplate("max_unpool.cu", "max_unpool_forward_last", combinations(T=ELEMENT_TYPES))


def max_unpool_keep(indices: Array, plane: int) -> tuple[Array, Array]:
    """``gpu_layers.reference.max_unpool_keep``, as a kernel: a flag for each of its blocks."""
    return _keep((indices,), (plane,))


def max_unpool_forward(
    x: Array,
    indices: Array,
    output_shape: tuple[int, ...],
    channels_last: bool = False,
    keep: bool = False,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """``gpu_layers.reference.max_unpool_forward``, as a kernel."""
    return _forward((x, indices, out), (output_shape, channels_last, keep))


def max_unpool_backward(dy: Array, indices: Array, channels_last: bool = False, out: Array | None = None) -> Array:
    """``gpu_layers.reference.max_unpool_backward``, as a kernel."""
    return _backward((dy, indices, out), (channels_last,))


@Launcher
def _keep(operands: Operands, numbers: Numbers, plane: int) -> tuple[Array, Array]:
    indices = ready(operands[0])
    kept = empty(indices.shape, np.int64, indices)
    found = empty((min(blocks_for(indices.size, _THREADS), _KEEP_BLOCKS),), np.uint8, indices)
    launch(_KEEP(Found="unsigned char"), found.size, _THREADS, (indices, kept, found, plane, indices.size))
    return kept, found


def _chunks(workers: int, enough: int, plane: int) -> int:
    """Chunks of a plane, each for a worker that reads all of the plane's indices."""
    return max(1, min(enough // workers, plane // _LEAST_CHUNK))


@Launcher
def _forward(
    operands: Operands, numbers: Numbers, output_shape: tuple[int, ...], channels_last: bool, keep: bool
) -> tuple[Array, Array]:
    x, indices, out = operands
    x, indices = ready(x), ready(indices)
    y = spatial_result(out, x, output_shape, channels_last)
    kept = empty(indices.shape, np.int64, indices) if keep else None
    if not y.size:
        return delivered(y, out), kept
    samples, channels, values = _sizes(x.shape, channels_last)
    planes, plane = samples * channels, math.prod(output_shape)
    if channels_last:
        chunks = _chunks(planes, _ENOUGH_THREADS, plane)
        blocks = blocks_for(planes * chunks, _THREADS)
        arguments: Arguments = (x, indices, kept, y, samples, channels, values, plane, chunks)
        launch(_FORWARD_LAST(T=element_type(x)), blocks, _THREADS, arguments)
    else:
        together, enough = 1, limits().full_grid
        while 2 * together * max(plane / _LEAST_PLACES, enough / planes) <= 1:
            together *= 2
        chunks = max(-(-plane // _MOST_PLACES), _chunks(planes, enough, plane))
        size = -(-plane // (chunks * _SECTOR)) * _SECTOR
        chunks = -(-plane // size)
        shared_bytes = 16 * -(-(together * min(size, plane) + 2 * vector_width(x.dtype)) // 4)
        arguments = (x, indices, kept, y, planes, values, plane, together, chunks, size, division(values))
        packed = x.dtype.itemsize == 2 and together * values < 2**16
        kernel = _FORWARD(T=element_type(x), Packed=str(packed).lower())
        blocks = blocks_for(-(-planes // together) * chunks, 1)
        launch(kernel, blocks, _THREADS, arguments, shared_bytes=shared_bytes)
    return delivered(y, out), kept


@Launcher
def _backward(operands: Operands, numbers: Numbers, channels_last: bool) -> Array:
    dy, indices, out = operands
    dy, indices = ready(dy), ready(indices)
    dx = result_like(out, indices.shape, dy)
    if dx.size:
        samples, channels, values = _sizes(indices.shape, channels_last)
        _, _, plane = _sizes(dy.shape, channels_last)
        # Planes one after another are samples of one channel.
        samples, channels = (samples, channels) if channels_last else (samples * channels, 1)
        divisors = divisor(values * channels), divisor(channels)
        blocks = blocks_for(dx.size, _THREADS * vector_width(dx.dtype))
        launch(_BACKWARD(T=element_type(dy)), blocks, _THREADS, (dy, indices, dx, dx.size, channels, plane, *divisors))
    return delivered(dx, out)


def _sizes(shape: tuple[int, ...], channels_last: bool) -> tuple[int, int, int]:
    """Samples, channels, and values of a plane."""
    channels, *spatial = (shape[-1], *shape[1:-1]) if channels_last else shape[1:]
    return shape[0], channels, math.prod(spatial)
