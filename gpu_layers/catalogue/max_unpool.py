"""Unpooling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from gpu_layers import layers, ops
from gpu_layers.catalogue.case import Arrays, Case
from gpu_layers.catalogue.inputs import generator, normal, with_special_values
from gpu_layers.catalogue.operation import (
    BACKWARD,
    LARGE_IMAGES,
    SMALL_IMAGES,
    Called,
    Operation,
    Shape,
    Sizes,
    of_ranks,
    per_pass,
)
from gpu_layers.catalogue.pooling import touched_bytes
from gpu_layers.catalogue.traffic import TrafficCase, passes
from gpu_layers.core.array import Array
from gpu_layers.core.cuda import array_module
from gpu_layers.runtime.backend import use_backend
from gpu_layers.runtime.kernel import FLOAT_DTYPES

#: The page of the documents that has these operations.
PAGE = "pooling"

# (N, C, *spatial) of the values, output size: planes of one part and of several, more values than places, more than
# 16 bits count.
_UNPOOL_CASES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((2, 3, 4, 5), (9, 11)),
    ((1, 2, 40, 33), (81, 66)),
    ((3, 2, 70), (20,)),
    ((1, 2, 2, 3, 3), (4, 6, 6)),
    ((0, 2, 3), (6,)),
    ((1, 1, 65_537), (20,)),
)


def max_unpool_cases() -> Iterator[Case]:
    """Values move: every bit must be the reference's. Some indices are equal, some are outside the plane."""
    for dtype in FLOAT_DTYPES:
        for shape, size in _UNPOOL_CASES:
            for channels_last in (False, True):
                yield _max_unpool(dtype, shape, size, channels_last)


def _max_unpool(dtype: np.dtype, shape: tuple[int, ...], size: tuple[int, ...], channels_last: bool) -> Case:
    plane = math.prod(size)
    wide = (*shape[:2], *size)
    if channels_last:
        shape, wide = ((*sizes[:1], *sizes[2:], sizes[1]) for sizes in (shape, wide))

    def inputs() -> Arrays:
        indices = generator("indices", shape).integers(-1, plane + 1, shape)
        values = {"x": normal(shape, dtype, "x"), "dy": normal(wide, dtype, "dy")}
        return {name: with_special_values(array) for name, array in values.items()} | {"indices": indices}

    def run(arrays: Arrays) -> Arrays:
        x, indices, layout = arrays["x"], arrays["indices"], {"channels_last": channels_last}
        y, saved = ops.max_unpool_forward(x, indices, size, check=False, **layout)
        checked, _ = ops.max_unpool_forward(x, indices.clip(0, plane - 1), size, **layout)
        return {"y": y, "checked": checked, "dx": ops.max_unpool_backward(arrays["dy"], saved)}

    label = f"{list(shape)} to {list(size)}{', channels_last' if channels_last else ''}"
    return Case("max_unpool", dtype, label, inputs, run)


# ---- what is timed, and whose bytes are counted ----------------------------------------------------------------------


def _floor(s: Sizes, direction: str, touched: int | None = None) -> int:
    """The forward copies the indices.

    ``touched``: bytes of the sectors of the gradient that an index points into; every other row by default.
    """
    if direction == BACKWARD:
        return s.elements(1) + 8 * s.inputs + (s.elements(2) if touched is None else touched)
    return s.elements(1, 1) + 16 * s.inputs


@cache
def _chosen(shape: Shape, dtype: np.dtype, channels_last: bool) -> Array:
    """The indices of a max pooling of an array of this shape, by windows of 2 x 2."""
    with use_backend("reference"):
        _, pooled = ops.max_pool_forward(normal(shape, dtype), (2, 2), channels_last=channels_last)
        return ops.max_pool_indices(pooled)


def _traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    shape, size = (2, 16, 32, 32), (64, 64)

    def floor(s: Sizes, direction: str, saved: Any) -> int:
        return _floor(s, direction, touched_bytes(saved.indices, math.prod(size), s.itemsize, s.channels_last))

    for layout in ("NCHW", "NHWC"):

        def forward(x: Array, last: bool = layout == "NHWC") -> Called:
            indices = _chosen((shape[0], *size, shape[1]) if last else (*shape[:2], *size), dtype, last)
            return ops.max_unpool_forward(x, indices, size, check=False, channels_last=last)

        kept = 8 * math.prod(shape)
        yield from passes(operation, "max_unpool", dtype, shape, layout, forward=forward, floor=floor, torch_saved=kept)


@cache
def _places(module: ModuleType, shape: Shape) -> Array:
    """Of values, the first place in their windows of 2 x 2: flat in a plane of twice the sizes."""
    *_, rows, columns = shape
    first = 2 * (2 * columns) * np.arange(rows)[:, None] + 2 * np.arange(columns)
    return module.asarray(np.ascontiguousarray(np.broadcast_to(first, shape)))


def _doubled(a: Arrays, channels_last: bool) -> Called:
    x = a["x"]
    size = tuple(2 * length for length in x.shape[2:])
    return ops.max_unpool_forward(x, _places(array_module(x), x.shape), size, check=False)


MAX_UNPOOL = Operation(
    name="max_unpool",
    shapes=(LARGE_IMAGES[0], *SMALL_IMAGES),
    forward=_doubled,
    backward=ops.max_unpool_backward,
    floor=_floor,
    torch_bytes=per_pass(lambda s: s.elements(1, 1) + 8 * s.inputs, lambda s: s.elements(3) + 8 * s.inputs),
    cases=(max_unpool_cases,),
    traffic=_traffic,
    layers=of_ranks(layers.MaxUnpool1d, layers.MaxUnpool2d, layers.MaxUnpool3d, arguments=(2,), inputs=2),
    output_shape=lambda shape: (*shape[:2], *(2 * size for size in shape[2:])),
)
