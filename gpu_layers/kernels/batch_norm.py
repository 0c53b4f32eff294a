"""Launching ``batch_norm.cu``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpu_layers.kernels.arrays import ACCUMULATE_TYPES, ELEMENT_TYPES, element_type, empty, ready, vector_width
from gpu_layers.reference.batch_norm import statistics_dtype
from gpu_layers.runtime.kernel import FLOAT_DTYPES, Kernel, KernelTemplate, c_name, combinations
from gpu_layers.runtime.launch import launch

_THREADS = 256
_UNROLL = 4
_WARP = 32
# Blocks that fill any GPU twice over (132 multiprocessors of 8 blocks of 256 threads), so that it is busy
# whatever the number of channels. A constant, not the GPU's own number: the partition fixes the order of the
# sums, which must not change from GPU to GPU.
_TARGET_BLOCKS = 2112

_PLANE_LAYOUT = np.dtype(
    [
        (name, np.int64)
        for name in ("channels", "plane", "segment", "segments_per_plane", "segments", "segments_per_part", "parts")
    ],
    align=True,
)
_ROW_LAYOUT = np.dtype(
    [(name, np.int64) for name in ("rows", "channels", "tiles", "rows_per_part", "parts")], align=True
)
_STRUCTS = {"PlaneLayout": _PLANE_LAYOUT, "RowLayout": _ROW_LAYOUT}


class _Pass:
    """One kernel in both layouts."""

    def __init__(self, name: str, parameters: str) -> None:
        planes, rows = f"{parameters}, PlaneLayout layout", f"{parameters}, RowLayout layout"
        every = combinations(T=ELEMENT_TYPES)
        each_width = [
            {"T": c_name(dtype), "Width": str(width)} for dtype in FLOAT_DTYPES for width in (vector_width(dtype), 1)
        ]
        self._planes = KernelTemplate("batch_norm.cu", f"{name}_planes", planes, every, _STRUCTS)
        self._rows = KernelTemplate("batch_norm.cu", f"{name}_rows", rows, each_width, _STRUCTS)

    def kernel(self, element: str, width: int | None) -> Kernel:
        """The kernel for rows, of this many channels a thread, or for planes."""
        return self._planes(T=element) if width is None else self._rows(T=element, Width=str(width))


_STATISTICS = _Pass("batch_norm_statistics", "const T* x, A* partial_moments")
_NORMALIZE = _Pass(
    "batch_norm_normalize", "const T* x, const A* mean, const A* inv_std, const A* gamma, const A* beta, T* y"
)
_GRADIENT_SUMS = _Pass("batch_norm_gradient_sums", "const T* dy, const T* x, const A* mean, A* partial_sums")
_INPUT_GRADIENT = _Pass(
    "batch_norm_input_gradient",
    "const T* dy, const T* x, const A* mean, const A* inv_std, const A* gamma, const A* dgamma, const A* dbeta, "
    "T* dx, A inv_count",
)
_MERGE_STATISTICS = KernelTemplate(
    "batch_norm.cu",
    "batch_norm_merge_statistics",
    "const A* partial_moments, A* mean, A* var, A* inv_std, long long channels, long long parts, A eps",
    combinations(A=ACCUMULATE_TYPES),
)
_MERGE_GRADIENTS = KernelTemplate(
    "batch_norm.cu",
    "batch_norm_merge_gradients",
    "const A* partial_sums, const A* inv_std, A* dgamma, A* dbeta, long long channels, long long parts",
    combinations(A=ACCUMULATE_TYPES),
)


@dataclass(frozen=True)
class _Plan:
    """How the blocks share the values of one shape."""

    width: int | None
    blocks: int
    block: tuple[int, int]
    layout: Any
    channels: int
    parts: int
    count: int

    def run(self, of: _Pass, element: str, arguments: tuple[Any, ...]) -> None:
        launch(of.kernel(element, self.width), self.blocks, self.block, (*arguments, self.layout))


def _power_of_two_up_to(value: float) -> int:
    return 1 << max(0, int(math.log2(max(value, 1))))


@lru_cache(maxsize=1024)
def _plan(shape: tuple[int, ...], itemsize: int, channels_last: bool) -> _Plan:
    if channels_last or len(shape) == 2:
        return _row_plan(math.prod(shape[:-1]), shape[-1], itemsize)
    return _plane_plan(shape[0], shape[1], math.prod(shape[2:]), itemsize)


def _plane_plan(batch: int, channels: int, plane: int, itemsize: int) -> _Plan:
    width = 16 // itemsize
    # Threads along a segment: enough for some six vectors each, so that the loop with several loads in flight
    # is entered and what is left over stays small.
    along = min(max(_power_of_two_up_to(plane / width / 6), 4), _THREADS)
    segment = -(-min(plane, along * width * _UNROLL * 4) // width) * width
    segments_per_plane = -(-plane // segment)
    segments = batch * segments_per_plane
    slots = _THREADS // along
    parts = max(1, min(-(-_TARGET_BLOCKS // channels), -(-segments // slots)))
    segments_per_part = -(-segments // parts)
    parts = -(-segments // segments_per_part)
    values = (channels, plane, segment, segments_per_plane, segments, segments_per_part, parts)
    layout = np.array(values, _PLANE_LAYOUT)
    return _Plan(None, channels * parts, (along, slots), layout, channels, parts, batch * plane)


def _row_plan(rows: int, channels: int, itemsize: int) -> _Plan:
    width = 16 // itemsize
    if channels % width:
        width = 1
    vectors = channels // width
    along = min(_power_of_two_up_to(2 * vectors - 1), 32)
    slots = _THREADS // along
    tiles = -(-vectors // along)
    parts = max(1, min(-(-_TARGET_BLOCKS // tiles), -(-rows // (slots * _UNROLL))))
    rows_per_part = -(-rows // parts)
    parts = -(-rows // rows_per_part)
    layout = np.array((rows, channels, tiles, rows_per_part, parts), _ROW_LAYOUT)
    return _Plan(width, tiles * parts, (along, slots), layout, channels, parts, rows)


def _merge_blocks(channels: int) -> int:
    return -(-channels // (_THREADS // _WARP))


def _ready(array: Any | None) -> Any | None:
    return None if array is None else ready(array)


def batch_norm_forward(
    x: Any, gamma: Any | None, beta: Any | None, eps: float, channels_last: bool = False
) -> tuple[Any, Any, Any, Any]:
    """``gpu_layers.reference.batch_norm_forward``, as kernels."""
    x = ready(x)
    plan, dtype = _plan(x.shape, x.dtype.itemsize, channels_last), statistics_dtype(x.dtype)
    partial = empty((plan.channels, plan.parts, 4), dtype, x)
    plan.run(_STATISTICS, element_type(x), (x, partial))
    mean, var, inv_std = (empty((plan.channels,), dtype, x) for _ in range(3))
    merge = _MERGE_STATISTICS(A=c_name(dtype))
    arguments = (partial, mean, var, inv_std, plan.channels, plan.parts, eps)
    launch(merge, _merge_blocks(plan.channels), _THREADS, arguments)
    return batch_norm_inference(x, mean, inv_std, gamma, beta, channels_last), mean, var, inv_std


def batch_norm_inference(
    x: Any, mean: Any, inv_std: Any, gamma: Any | None, beta: Any | None, channels_last: bool = False
) -> Any:
    """``gpu_layers.reference.batch_norm_inference``, as a kernel."""
    return _normalized(ready(x), ready(mean), ready(inv_std), _ready(gamma), _ready(beta), channels_last)


def _normalized(
    x: Any, mean: Any | None, inv_std: Any, gamma: Any | None, beta: Any | None, channels_last: bool
) -> Any:
    plan = _plan(x.shape, x.dtype.itemsize, channels_last)
    y = empty(x.shape, x.dtype, x)
    plan.run(_NORMALIZE, element_type(x), (x, mean, inv_std, gamma, beta, y))
    return y


def batch_norm_backward(
    dy: Any, x: Any, mean: Any, inv_std: Any, gamma: Any | None, channels_last: bool = False
) -> tuple[Any, Any, Any]:
    """``gpu_layers.reference.batch_norm_backward``, as kernels."""
    dy, x, mean, inv_std, gamma = ready(dy), ready(x), ready(mean), ready(inv_std), _ready(gamma)
    plan = _plan(x.shape, x.dtype.itemsize, channels_last)
    dgamma, dbeta = _parameter_gradients(plan, dy, x, mean, inv_std)
    dx = empty(x.shape, x.dtype, x)
    arguments = (dy, x, mean, inv_std, gamma, dgamma, dbeta, dx, 1 / plan.count)
    plan.run(_INPUT_GRADIENT, element_type(x), arguments)
    return dx, dgamma, dbeta


def batch_norm_inference_backward(
    dy: Any, x: Any, mean: Any, inv_std: Any, gamma: Any | None, channels_last: bool = False
) -> tuple[Any, Any, Any]:
    """``gpu_layers.reference.batch_norm_inference_backward``, as kernels."""
    dy, x, mean, inv_std, gamma = ready(dy), ready(x), ready(mean), ready(inv_std), _ready(gamma)
    plan = _plan(x.shape, x.dtype.itemsize, channels_last)
    dgamma, dbeta = _parameter_gradients(plan, dy, x, mean, inv_std)
    # dx = gamma * inv_std * dy is the normalisation of dy with mean 0 and beta 0.
    return _normalized(dy, None, inv_std, gamma, None, channels_last), dgamma, dbeta


def _parameter_gradients(plan: _Plan, dy: Any, x: Any, mean: Any, inv_std: Any) -> tuple[Any, Any]:
    dtype = statistics_dtype(x.dtype)
    partial = empty((plan.channels, plan.parts, 2), dtype, x)
    plan.run(_GRADIENT_SUMS, element_type(x), (dy, x, mean, partial))
    dgamma, dbeta = (empty((plan.channels,), dtype, x) for _ in range(2))
    merge = _MERGE_GRADIENTS(A=c_name(dtype))
    arguments = (partial, inv_std, dgamma, dbeta, plan.channels, plan.parts)
    launch(merge, _merge_blocks(plan.channels), _THREADS, arguments)
    return dgamma, dbeta


def summation_depth(shape: tuple[int, ...], dtype: Any, channels_last: bool) -> int:
    """Additions on the way of one value into a sum over its channel, at most: what bounds the sum's rounding error.

    A thread adds its values one after another, a block those of its threads in a tree, and the lanes of a warp the
    blocks' results in turn and then in a tree.
    """
    plan = _plan(tuple(shape), np.dtype(dtype).itemsize, channels_last)
    along, slots = plan.block
    if plan.width is None:
        layout = plan.layout
        of_a_thread = -(-int(layout["segments_per_part"]) // slots) * (-(-int(layout["segment"]) // along) + 16)
    else:
        of_a_thread = -(-int(plan.layout["rows_per_part"]) // slots)
    return of_a_thread + _THREADS.bit_length() + -(-plan.parts // _WARP) + _WARP.bit_length()
