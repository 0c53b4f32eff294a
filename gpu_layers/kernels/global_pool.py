"""Launching ``global_pool.cu``: pooling with one window, the whole plane."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.reference_gpu import MULTIPROCESSORS, WARPS
from gpu_layers.core.window import Window
from gpu_layers.kernels.arrays import ELEMENT_TYPES, element_type, empty, vector_width
from gpu_layers.kernels.dropout import DIVISOR, divisor
from gpu_layers.kernels.elementwise import blocks_for
from gpu_layers.kernels.pool_plan import DIVISION, division
from gpu_layers.runtime.kernel import FLOAT_DTYPES, Arguments, Kernel, KernelTemplate, c_name, combinations
from gpu_layers.runtime.launch import launch

_THREADS = 256
_WARP = 32
# Positions of the largest values are counted in 32 bits; others are not. Not of ``limits()``: another kernel would add
# up in another order.
_NUMBERED_BELOW = 2**31 - 1
# What a thread reads at least before others help it with the plane.
_VALUES_A_LANE = 8
# Of the gradients of planes one after another: ``kGlobalAtOnce``.
_VECTORS_A_THREAD = 4
# From this size on a block has a plane, or a chunk of it, not a warp.
_BLOCK_PLANE = 16384
# Elements that a thread adds up before it compensates: ``kTakes`` of ``Sum``. A chunk has as many for each at least.
_TAKES = 32
# Of these blocks a GPU holds no more than a quarter at once. If there are fewer, planes are reduced in chunks.
_ENOUGH_BLOCKS = 4 * MULTIPROCESSORS * WARPS // (_THREADS // _WARP)
# Blocks of planes side by side that it holds at once.
_HELD_BLOCKS = 4 * MULTIPROCESSORS
_MOST_OF_CHUNK = 2**28
# Chunks that a thread merges.
_CHUNKS_A_LANE = 4
# Small planes that are no whole vectors: positions for a thread, and elements of a block (``kStaged``).
_STAGED_A_LANE = 16
_STAGED_LANES = (4, _WARP)
# Elements of a vector of half types.
_HALF_WIDTH = 8

_LAYOUT = np.dtype(
    [
        ("planes", np.int64),
        ("positions", np.int64),
        ("samples", np.int64),
        ("chunk", np.int64),
        ("chunks", np.int32),
        ("lanes", np.int32),
        ("argmax_bytes", np.int32),
        ("staged", np.int32),
    ],
    align=True,
)
_STRUCTS = {"GlobalLayout": _LAYOUT, "Divisor64": DIVISOR, "Divisor32": DIVISION}


# Of channels side by side: of so many together.
_WIDTHS = [{"T": c_name(dtype), "Width": str(width)} for dtype in FLOAT_DTYPES for width in (vector_width(dtype), 1)]


def _template(function: str, arguments: list[dict[str, str]] | None = None) -> KernelTemplate:
    return KernelTemplate("global_pool.cu", function, arguments or combinations(T=ELEMENT_TYPES), _STRUCTS)


_MAX = {"nchw": _template("global_max_nchw"), "nhwc": _template("global_max_nhwc", _WIDTHS)}
_AVG = {"nchw": _template("global_avg_nchw"), "nhwc": _template("global_avg_nhwc", _WIDTHS)}
_MERGE_MAX = _template("global_max_merge")
_MERGE_AVG = _template("global_avg_merge")
_SPREAD_PLANES = _template("global_spread_nchw")
_SPREAD_ROWS = _template("global_spread_nhwc", _WIDTHS)
# Channels that make no vectors come one by one where a plane has so many positions; else general kernels are as good.
_ONE_BY_ONE_FROM = 64


def takes(
    array: Array, window: Window, channels_last: bool, lengths: Array | None = None, numbered: bool = False
) -> bool:
    """Whether these kernels do a pooling: one window that is the plane.

    Channels of small planes that make no vectors are left to the general kernels, and planes of 2**31 - 1 positions and
    more where the positions are numbered.
    """
    fits = window.is_global and lengths is None and not (numbered and window.taps >= _NUMBERED_BELOW)
    return fits and (_width(array, channels_last) > 1 or window.taps >= _ONE_BY_ONE_FROM)


def _width(array: Array, channels_last: bool) -> int:
    """Of a vector; of one channel where they make no vectors side by side."""
    width = vector_width(array.dtype)
    return 1 if channels_last and array.shape[-1] % width else width


def _power_of_two(value: int) -> int:
    """The lowest one that is no less."""
    return 1 << (max(value, 1) - 1).bit_length()


@dataclass(frozen=True)
class _Plan:
    """Which kind of kernel, its blocks, and what it takes; and that for merging chunks, if there are several."""

    kind: str
    blocks: int
    layout: np.ndarray
    merge_blocks: int
    merge_layout: np.ndarray

    def partials(self, array: Array) -> Array | None:
        """Where the values of chunks go, if planes are reduced in chunks."""
        chunks = int(self.layout["chunks"])
        if chunks == 1:
            return None
        count = int(self.merge_layout["planes"]) * chunks
        return empty((count, 2), accumulation_dtype(array.dtype), array).as_bytes()


def _chunk(positions: int, blocks: int, unit: int) -> int:
    """Positions of a chunk of a plane, a multiple of ``unit``: so many that there are blocks enough."""
    return min(unit * max(1, positions * blocks // (unit * _ENOUGH_BLOCKS)), _MOST_OF_CHUNK)


def _chunk_of_rows(positions: int, blocks: int, least: int) -> int:
    """Of planes side by side: so many positions that a GPU holds all blocks at once, or has two full rounds of them."""
    chunks = max(_HELD_BLOCKS // blocks, 1)
    if chunks == 1:
        chunks = max(2 * _HELD_BLOCKS // blocks, 1)
    return min(max(-(-positions // chunks), least), _MOST_OF_CHUNK)


@lru_cache(maxsize=1024)
def _plan(shape: tuple[int, ...], positions: int, width: int, channels_last: bool, argmax_bytes: int) -> _Plan:
    layout = np.zeros((), _LAYOUT)
    layout["positions"], layout["argmax_bytes"] = positions, argmax_bytes
    chunk = positions
    if channels_last:
        kind, planes, vectors = "nhwc", shape[0] * shape[-1], shape[-1] // width
        lanes = min(_power_of_two(vectors), _WARP)
        blocks = shape[0] * -(-vectors // lanes)
        layout["planes"], layout["samples"] = vectors, shape[0]
        chunk = _chunk_of_rows(positions, blocks, _THREADS // lanes * _TAKES)
    else:
        kind, planes = "nchw", shape[0] * shape[1]
        layout["planes"], layout["samples"] = planes, 1
        lanes = min(_power_of_two(positions // _VALUES_A_LANE), _WARP)
        staged = max(_power_of_two(-(-positions // _STAGED_A_LANE)), _STAGED_LANES[0])
        if positions % width and staged <= _STAGED_LANES[1]:
            layout["staged"], lanes = 1, staged
        elif positions >= _BLOCK_PLANE:
            lanes, chunk = _THREADS, _chunk(positions, planes, _THREADS * _TAKES)
        # ``kStagedPlanes``.
        together = 2 if layout["staged"] and width == _HALF_WIDTH else 1
        blocks = -(-planes * lanes // (together * _THREADS))
    chunks = max(1, -(-positions // chunk))
    layout["chunk"], layout["chunks"], layout["lanes"] = chunk, chunks, lanes
    merge = layout.copy()
    # A warp's, or all of a block.
    merge_lanes = min(_power_of_two(-(-chunks // _CHUNKS_A_LANE)), _WARP) if chunks <= _THREADS else _THREADS
    merge["planes"], merge["samples"], merge["lanes"] = planes, 1, merge_lanes
    return _Plan(kind, blocks * chunks, layout, -(-planes * merge_lanes // _THREADS), merge)


def _plan_for(array: Array, window: Window, channels_last: bool, argmax_bytes: int) -> _Plan:
    return _plan(array.shape, window.taps, _width(array, channels_last), channels_last, argmax_bytes)


def _kernel(templates: dict[str, KernelTemplate], plan: _Plan, array: Array) -> Kernel:
    if plan.kind == "nhwc":
        return templates["nhwc"](T=element_type(array), Width=str(_width(array, channels_last=True)))
    return templates[plan.kind](T=element_type(array))


def _grid(plan: _Plan, blocks: int) -> int:
    # Blocks of planes side by side have no others to go on with.
    return blocks if plan.kind == "nhwc" else blocks_for(blocks, 1)


def global_max_forward(x: Array, y: Array, argmax: Array, window: Window, channels_last: bool) -> None:
    """Fill y and taps as ``max_pool_forward`` does."""
    if not y.size:
        return
    plan = _plan_for(x, window, channels_last, argmax.dtype.itemsize)
    element, partials = element_type(x), plan.partials(x)
    arguments: Arguments = (x, y, argmax.as_bytes(), partials, plan.layout)
    launch(_kernel(_MAX, plan, x), _grid(plan, plan.blocks), _THREADS, arguments)
    if partials is not None:
        merged = (partials, y, argmax.as_bytes(), plan.merge_layout)
        launch(_MERGE_MAX(T=element), blocks_for(plan.merge_blocks, 1), _THREADS, merged)


def global_avg_forward(x: Array, y: Array, window: Window, channels_last: bool, divisor_override: int | None) -> None:
    """Fill y as ``avg_pool_forward`` does."""
    if not y.size:
        return
    plan, factor = _plan_for(x, window, channels_last, 0), _factor(window, divisor_override)
    element, partials = element_type(x), plan.partials(x)
    arguments: Arguments = (x, y, partials, factor, plan.layout)
    launch(_kernel(_AVG, plan, x), _grid(plan, plan.blocks), _THREADS, arguments)
    if partials is not None:
        merged = (partials, y, factor, plan.merge_layout)
        launch(_MERGE_AVG(T=element), blocks_for(plan.merge_blocks, 1), _THREADS, merged)


def global_backward(
    dy: Array, argmax: Array | None, dx: Array, window: Window, channels_last: bool, divisor_override: int | None = None
) -> None:
    """Fill dx from the gradient of each plane: as the backward of max pooling if there are taps, else as that of
    average pooling."""
    if not dx.size:
        return
    argmax_bytes = 0 if argmax is None else argmax.dtype.itemsize
    factor = _factor(window, divisor_override) if argmax is None else 1.0
    bytes_of_taps = None if argmax is None else argmax.as_bytes()
    if channels_last:
        layout = _plan_for(dy, window, channels_last, argmax_bytes).layout
        lanes = int(layout["lanes"])
        tiles = dy.shape[0] * -(-int(layout["planes"]) // lanes)
        # Positions that a thread writes, one after another.
        rows = _THREADS // lanes
        chunks = -(-window.taps // (rows * _VALUES_A_LANE))
        kernel = _SPREAD_ROWS(T=element_type(dy), Width=str(_width(dy, channels_last)))
        launch(kernel, tiles * chunks, _THREADS, (dy, bytes_of_taps, dx, factor, chunks, layout))
        return
    layout = _plan_for(dy, window, channels_last, argmax_bytes).layout
    blocks = blocks_for(dx.size, _THREADS * vector_width(dx.dtype) * _VECTORS_A_THREAD)
    divisors = divisor(window.taps), np.array(division(window.taps), DIVISION)
    kernel = _SPREAD_PLANES(T=element_type(dy))
    launch(kernel, blocks, _THREADS, (dy, bytes_of_taps, dx, factor, *divisors, layout))


def _factor(window: Window, divisor_override: int | None) -> float:
    return 1 / (window.taps if divisor_override is None else divisor_override)
