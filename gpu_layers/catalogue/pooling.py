"""Max and average pooling: by windows, adaptive, and of the whole plane."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np

from gpu_layers import layers, ops
from gpu_layers.catalogue.case import Arrays, Case, epsilon, smallest
from gpu_layers.catalogue.inputs import (
    generator,
    launched_nowhere,
    negative_zeros,
    normal,
    with_several_nan,
    with_special_values,
    with_ties,
)
from gpu_layers.catalogue.operation import IMAGES, LARGE_IMAGES, Bytes, Operation, Shape, Sizes, of_ranks, per_pass
from gpu_layers.catalogue.traffic import SECTOR, Prepared, TrafficCase, in_layout, passes
from gpu_layers.core.array import Array, Options
from gpu_layers.core.cuda import array_module
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.runtime.kernel import FLOAT_DTYPES, INTEGER_DTYPES

#: The page of the documents that has these operations.
PAGE = "pooling"

# (N, C, *spatial), window: compiled-in windows and general ones; planes that are smaller and larger than a block;
# channels that do and do not make 16-byte vectors; one and three axes; more than 256 taps.
WINDOWS: tuple[tuple[tuple[int, ...], Options], ...] = (
    ((2, 3, 8, 10), {"kernel_size": (2, 2)}),
    ((2, 8, 9, 11), {"kernel_size": (3, 3), "stride": 2, "padding": 1}),
    ((1, 16, 7, 30), {"kernel_size": (3, 3), "stride": 1, "padding": 1}),
    ((2, 8, 6, 16), {"kernel_size": (2, 2)}),
    ((1, 8, 5, 32), {"kernel_size": (3, 3), "stride": 2, "padding": 1}),
    ((1, 8, 3, 16), {"kernel_size": (3, 3), "stride": 1, "padding": 1}),
    ((1, 8, 4, 6, 16), {"kernel_size": (2, 2, 2)}),
    ((1, 8, 5, 6, 7), {"kernel_size": (3, 2, 2), "stride": (1, 2, 2)}),
    ((2, 8, 32), {"kernel_size": (3,), "stride": 2, "padding": 1}),
    ((1, 8, 13), {"kernel_size": (2,)}),
    ((1, 8, 3, 5, 6), {"kernel_size": (3, 3, 3), "stride": 1, "padding": 1}),
    ((1, 8, 4, 5, 16), {"kernel_size": (3, 3, 3), "stride": 2, "padding": 1}),
    ((1, 8, 3, 5, 8), {"kernel_size": (1, 3, 3), "stride": 2, "padding": (0, 1, 1)}),
    ((2, 8, 7, 7), {"kernel_size": (3, 3), "stride": 2, "padding": 1, "ceil_mode": True}),
    ((2, 5, 13, 9), {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "ceil_mode": True}),
    ((1, 8, 12, 12), {"kernel_size": (2, 3), "stride": 1, "dilation": (3, 2)}),
    ((3, 2, 5, 5), {"kernel_size": (2, 2), "stride": 4}),
    ((1, 8, 8, 10), {"kernel_size": (3, 3), "stride": 3, "padding": 1}),
    ((2, 8, 7, 9), {"kernel_size": (2, 3), "stride": (3, 4), "ceil_mode": True}),
    ((1, 2, 5, 6, 7), {"kernel_size": (2, 1, 3), "stride": (2, 2, 3), "dilation": (1, 3, 1)}),
    ((300, 3, 2, 2), {"kernel_size": (2, 2)}),
    ((1, 2, 20, 19), {"kernel_size": (17, 17), "stride": 2, "padding": 8}),
    ((2, 4, 33), {"kernel_size": (4,), "stride": 3, "padding": 2}),
    ((2, 8, 5, 6, 7), {"kernel_size": (2, 3, 3), "stride": (1, 2, 2), "padding": (1, 1, 0)}),
    ((1, 8, 6, 13), {"kernel_size": (5, 5), "stride": 1, "padding": 2}),
    ((1, 8, 5, 16), {"kernel_size": (5, 5), "stride": 1, "padding": 2}),
    ((0, 4, 6, 6), {"kernel_size": (2, 2)}),
    ((2, 4, 9, 7), {"kernel_size": (3, 2), "stride": 2, "padding": ((2, 0), (0, 1))}),
    ((1, 8, 10, 13), {"kernel_size": (3, 4), "stride": (2, 3), "padding": "same_lower"}),
    # Cut off by one tap; windows that meet in depth by their taps, not by their sizes.
    ((2, 4, 10, 8), {"kernel_size": (3, 3), "stride": 2, "padding": 1, "ceil_mode": True}),
    ((1, 8, 10, 5, 8), {"kernel_size": (2, 3, 3), "stride": (3, 2, 2), "padding": (0, 1, 1), "dilation": (3, 1, 1)}),
)

# (N, C, *spatial), lengths, window: as long as the batch, shorter, empty.
_LENGTHS: tuple[tuple[tuple[int, ...], Any, Options], ...] = (
    ((4, 4, 21), [21, 9, 1, 0], {"kernel_size": (3,), "stride": 2, "padding": 1}),
    ((3, 8, 9, 10), [[9, 10], [5, 7], [0, 3]], {"kernel_size": (3, 3), "stride": 2, "padding": 1, "ceil_mode": True}),
)

# (N, C, *spatial), output size: not divisible, more outputs than inputs, whole planes of any size; planes side by side
# that are no whole number of the 32 vectors of a block; a last plane that ends within a vector; rows of whole vectors;
# planes in parts, one after another and side by side; one that is no whole vectors, too large to be staged; windows of
# more than 128 taps, over rows of whole vectors and others, of three axes and of one.
_ADAPTIVE: tuple[tuple[tuple[int, ...], tuple[int | None, ...]], ...] = (
    ((2, 8, 10, 13), (3, 4)),
    ((2, 3, 5, 4), (7, 4)),
    ((2, 4, 17), (5,)),
    ((2, 3, 6, 16), (4, 5)),
    ((1, 8, 5, 6, 7), (2, None, 3)),
    ((3, 8, 7, 7), (1, 1)),
    ((1, 2, 129, 128), (1, 1)),
    ((2, 24, 9, 31), (1, 1)),
    ((2, 3, 40, 30), (1, 1)),
    ((2, 328, 4, 4), (1, 1)),
    ((1, 3, 5, 5), (1, 1)),
    ((1, 264, 17, 17), (1, 1)),
    ((1, 3, 23, 25), (1, 1)),
    ((1, 8, 33, 40), (2, 3)),
    ((1, 24, 40, 33), (2, 3)),
    ((1, 8, 9, 10, 24), (2, 2, 3)),
    ((2, 8, 400), (3,)),
    ((5, 16, 1), (1,)),
    ((0, 2, 5), (2,)),
)


def _shapes() -> Iterator[tuple[str, tuple[int, ...], Options]]:
    for shape, window in WINDOWS:
        label = f"{list(shape)} {', '.join(f'{name}={value}' for name, value in window.items())}"
        yield label, shape, window
        yield f"{label}, channels_last", (shape[0], *shape[2:], shape[1]), {**window, "channels_last": True}
    for shape, lengths, window in _LENGTHS:
        label = f"{list(shape)} lengths={lengths}"
        yield label, shape, {**window, "lengths": lengths}
        last = {**window, "lengths": lengths, "channels_last": True}
        yield f"{label}, channels_last", (shape[0], *shape[2:], shape[1]), last
    for shape, outputs in _ADAPTIVE:
        label = f"{list(shape)} output_size={outputs}"
        yield label, shape, {"output_size": outputs}
        last = {"output_size": outputs, "channels_last": True}
        yield f"{label}, channels_last", (shape[0], *shape[2:], shape[1]), last
    yield "non-contiguous", (2, 6, 12, 9), {"kernel_size": (3, 3), "stride": 2, "padding": 1}
    yield "unbatched", (4, 9, 8), {"kernel_size": (2, 2)}


def _view(label: str, x: Array) -> Array:
    return x[:, ::2, ::-1] if label == "non-contiguous" else x


def _max_forward(x: Array, window: Options) -> tuple[Array, ops.MaxPoolSaved]:
    forward: Any = ops.adaptive_max_pool_forward if "output_size" in window else ops.max_pool_forward
    return forward(x, **window)


def _avg_forward(x: Array, window: Options) -> tuple[Array, ops.AvgPoolSaved]:
    forward: Any = ops.adaptive_avg_pool_forward if "output_size" in window else ops.avg_pool_forward
    return forward(x, **window)


# Shapes of ``_shapes()`` that together run every kernel: tiles of all three windows and general windows, that overlap
# and do not, with gaps, dilated, of three axes, adaptive, of lengths, and whole planes of less than a vector and more.
_ALL_KERNELS = (
    (2, 3, 8, 10),
    (2, 8, 9, 11),
    (1, 16, 7, 30),
    (1, 8, 5, 6, 7),
    (2, 8, 7, 9),
    (3, 2, 5, 5),
    (1, 8, 12, 12),
    (2, 3, 5, 4),
    (4, 4, 21),
    (3, 8, 7, 7),
    (1, 3, 5, 5),
)


def _of_all_kernels() -> Iterator[tuple[str, tuple[int, ...], Options]]:
    for label, shape, window in _shapes():
        first = (shape[0], shape[-1], *shape[1:-1]) if window.get("channels_last") else shape
        if first in _ALL_KERNELS:
            yield label, shape, window


def max_pool_cases() -> Iterator[Case]:
    """Values and gradients move, they are not computed with: every bit must be the reference's."""
    for dtype in FLOAT_DTYPES:
        for label, shape, window in _shapes():
            yield _max_pool(dtype, label, shape, window)
        yield _max_pool_of_nan(dtype)
        yield _of_negative_zeros("max_pool", dtype, _max_forward, ops.max_pool_backward)


def _max_pool_of_nan(dtype: np.dtype) -> Case:
    """The last of several NaN is the one that counts, whichever threads have them."""

    def inputs() -> Arrays:
        return {label: with_several_nan(with_ties(shape, dtype)) for label, shape, _ in _of_all_kernels()}

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        for label, _, window in _of_all_kernels():
            y, saved = _max_forward(arrays[label], window)
            results |= {f"y {label}": y, f"argmax {label}": saved.argmax}
        return results

    return Case("max_pool", dtype, "several NaN", inputs, run)


def _of_negative_zeros(op: str, dtype: np.dtype, forward: Callable[..., Any], backward: Callable[..., Any]) -> Case:
    """A gradient is a sum, were it of one value: of -0 it is +0. Nothing is rounded, so every bit counts."""

    def inputs() -> Arrays:
        arrays: Arrays = {}
        for label, shape, window in _of_all_kernels():
            x = normal(shape, dtype, "x")
            y = launched_nowhere(lambda: forward(x, window)[0])  # noqa: B023
            arrays |= {f"x {label}": x, f"dy {label}": negative_zeros(y.shape, dtype)}
        return arrays

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        for label, _, window in _of_all_kernels():
            _, saved = forward(arrays[f"x {label}"], window)
            results[f"dx {label}"] = backward(arrays[f"dy {label}"], saved)
        return results

    return Case(op, dtype, "gradients of -0", inputs, run)


def integer_max_pool_cases() -> Iterator[Case]:
    """Of whole numbers values and taps alone."""
    for dtype in (*INTEGER_DTYPES, np.dtype(np.bool_)):
        yield _integer_max_pool(dtype)


def _integer_max_pool(dtype: np.dtype) -> Case:
    windows: tuple[tuple[tuple[int, ...], Options], ...] = (
        ((2, 3, 9, 11), {"kernel_size": (3, 3), "stride": 2, "padding": 1}),
        ((2, 5, 6, 16), {"kernel_size": (2, 2), "channels_last": True}),
        ((1, 2, 20, 19), {"kernel_size": (17, 17), "stride": 2, "padding": 8}),
        ((2, 4, 9), {"kernel_size": (2,), "dilation": 5, "padding": 1}),
        ((1, 4, 5, 6, 7), {"output_size": (2, 3, 3)}),
        ((2, 9, 8, 3), {"kernel_size": (2, 3), "stride": 2, "channels_last": True, "lengths": [[9, 8], [3, 0]]}),
        ((0, 2, 4), {"kernel_size": (2,)}),
    )

    def inputs() -> Arrays:
        low, high = (0, 1) if dtype == np.bool_ else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        values = generator("integers", dtype).integers(-3 if low else 0, 3, (400,)) % (2 if dtype == np.bool_ else 400)
        x = values.astype(dtype)
        x[::37], x[5::41] = low, high
        return {"x": np.tile(x, 20)}

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        for shape, window in windows:
            x = arrays["x"][: math.prod(shape)].reshape(shape)
            y, saved = _max_forward(x, window)
            name = f"{list(shape)} {window}"
            results |= {f"y {name}": y, f"argmax {name}": saved.argmax, f"indices {name}": ops.max_pool_indices(saved)}
        return {name: one.view(np.uint8) if one.dtype == np.bool_ else one for name, one in results.items()}

    return Case("max_pool", dtype, "whole numbers", inputs, run)


def _max_pool(dtype: np.dtype, label: str, shape: tuple[int, ...], window: Options) -> Case:
    def inputs() -> Arrays:
        x = with_special_values(with_ties(shape, dtype))
        y = launched_nowhere(lambda: _max_forward(_view(label, x), window)[0])
        return {"x": x, "dy": normal(y.shape, dtype, "dy"), "tangent": normal(shape, dtype, "tangent")}

    def run(arrays: Arrays) -> Arrays:
        y, saved = _max_forward(_view(label, arrays["x"]), window)
        dx = ops.max_pool_backward(arrays["dy"], saved)
        gathered = ops.max_pool_gather(_view(label, arrays["tangent"]), saved)
        return {"y": y, "argmax": saved.argmax, "indices": ops.max_pool_indices(saved), "dx": dx, "gathered": gathered}

    return Case("max_pool", dtype, label, inputs, run)


def avg_pool_cases() -> Iterator[Case]:
    """Sums in the order of the reference; divisions replaced by products with reciprocals."""
    for dtype in FLOAT_DTYPES:
        for label, shape, window in _shapes():
            yield _avg_pool(dtype, label, shape, window)
        shape, window = (2, 3, 9, 10), {"kernel_size": (3, 3), "stride": 2, "padding": 1, "ceil_mode": True}
        yield _avg_pool(dtype, "count_include_pad=False", shape, {**window, "count_include_pad": False})
        tile = {"kernel_size": (3, 3), "stride": 1, "padding": 1, "count_include_pad": False}
        yield _avg_pool(dtype, "3 x 3, count_include_pad=False", (1, 8, 5, 8), tile)
        yield _avg_pool(dtype, "divisor_override=-7", shape, {**window, "divisor_override": -7})
        window = {"kernel_size": (2, 3), "stride": 2, "padding": 1, "dilation": 2, "count_include_pad": False}
        yield _avg_pool(dtype, "dilation, count_include_pad=False", shape, window)
        yield _of_negative_zeros("avg_pool", dtype, _avg_forward, ops.avg_pool_backward)


def _avg_pool(dtype: np.dtype, label: str, shape: tuple[int, ...], window: Options) -> Case:
    accumulate = accumulation_dtype(dtype)

    def inputs() -> Arrays:
        x = normal(shape, dtype, "x")
        y = launched_nowhere(lambda: _avg_forward(_view(label, x), window)[0])
        return {"x": x, "dy": normal(y.shape, dtype, "dy")}

    def run(arrays: Arrays) -> Arrays:
        y, saved = _avg_forward(_view(label, arrays["x"]), window)
        return {"y": y, "dx": ops.avg_pool_backward(arrays["dy"], saved)}

    def bounds(inputs: Arrays, expected: Arrays) -> Arrays:
        _, saved = _avg_forward(_view(label, inputs["x"]).astype(np.float64), window)
        # The sums are the same to the last bit. A product with a rounded reciprocal is within 1.5 units in the last
        # place of the quotient, which within half a unit of the exact one: two roundings of the accumulation dtype,
        # and then one of the dtype, which may fall to the other side.
        rounding = 2 * epsilon(accumulate) + (epsilon(dtype) if dtype != accumulate else 0)
        y = np.abs(expected["y"].astype(np.float64)) * rounding + smallest(dtype)
        if saved.window.is_global or saved.window.taps > 128:
            # Sums in another order: each addition of either may be off by half a unit of the sum of the sizes. Kernels
            # add 32 values without compensation at most; the reference has none or, up to 128 taps, one for each.
            sizes, _ = _avg_forward(np.abs(_view(label, inputs["x"]).astype(np.float64)), window)
            y = y + min(saved.window.taps, 34) * epsilon(accumulate) * np.abs(sizes)
        # In the backward each of at most k shares is off by as much, and each addition rounds once more here and
        # there; the shares' absolute values are the gradient of |dy|.
        magnitude = np.abs(inputs["dy"].astype(np.float64))
        total = np.abs(ops.avg_pool_backward(magnitude, saved))
        covering = math.prod(
            -(-kernel // stride) if not saved.window.adaptive else -(-outputs // size) + 1
            for kernel, stride, outputs, size in zip(
                saved.window.kernel,
                saved.window.stride,
                saved.window.output_shape,
                saved.window.input_shape,
                strict=True,
            )
        )
        dx = total * (epsilon(accumulate) * (2 + covering)) + smallest(dtype)
        if dtype != accumulate:
            dx = dx + np.abs(expected["dx"].astype(np.float64)) * epsilon(dtype)
        return {"y": y, "dx": dx}

    return Case("avg_pool", dtype, label, inputs, run, bounds)


# ---- what is timed, and whose bytes are counted ----------------------------------------------------------------------

# Kernel, stride, padding: the windows of ResNet's stem and of spatial pyramids for the maximum, and halving.
MAX_WINDOW, _PYRAMID_WINDOW, HALVING = (3, 2, 1), (5, 1, 2), (2, 2, 0)


def pooled(window: tuple[int, int, int]) -> Callable[[Shape], Shape]:
    """The shape of a pooling's result by that of its input."""
    kernel, stride, padding = window
    return lambda shape: (*shape[:2], *((size + 2 * padding - kernel) // stride + 1 for size in shape[2:]))


def pool_floor(s: Sizes, taps: int = 0, seen: int | None = None) -> int:
    """A pass of pooling: ``taps`` bytes for each maximum, ``seen`` elements of x, if not all, that lie in a window."""
    return s.itemsize * (s.inputs if seen is None else seen) + s.elements(0, 1) + taps * s.outputs


def pool_bytes(extra: int) -> Bytes:
    """x and y, and this many bytes of state for each output."""
    return lambda s, direction: s.elements(1, 1) + extra * s.outputs


def argmax_bytes(saved: object) -> int:
    """Bytes that are kept of the place of each maximum, if any are."""
    argmax = getattr(saved, "argmax", None)
    return 0 if argmax is None else argmax.itemsize


def touched_bytes(indices: np.ndarray, plane: int, itemsize: int, channels_last: bool) -> int:
    """Bytes of the sectors that indices in planes of this many elements point into."""
    if channels_last:
        channels = indices.shape[-1]
        samples = np.arange(len(indices)).reshape(-1, 1, 1, 1) * plane
        places = (samples + indices) * channels + np.arange(channels)
    else:
        places = np.arange(math.prod(indices.shape[:2])).reshape(*indices.shape[:2], 1, 1) * plane + indices
    return np.unique(places * itemsize // SECTOR).size * SECTOR


def _floor_of_saved(s: Sizes, direction: str, saved: object) -> int:
    return pool_floor(s, argmax_bytes(saved))


# Shape and layouts, of two, one and three axes; kernel, stride, padding, and the most that may be moved.
_COUNTED: tuple[tuple[Shape, tuple[str, ...]], ...] = (
    ((2, 16, 112, 112), ("NCHW", "NHWC")),
    ((2, 16, 56, 56), ("NCHW", "NHWC")),
    ((4, 16, 1024), ("NCHW",)),
    ((1, 16, 8, 16, 32), ("NCHW",)),
)
_COUNTED_WINDOWS = ((2, 2, 0, 1.05), (3, 2, 1, 1.10), (3, 1, 1, 1.10))


def _window_traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    kind = operation.name.partition("_")[0]
    for (shape, layouts), window in itertools.product(_COUNTED, _COUNTED_WINDOWS):
        (size, stride, padding, limit), rank = window, len(shape) - 2
        if rank != 2 and stride == 1:
            continue
        name = f"{kind}_pool {size}x{size} s{stride}" if rank == 2 else f"{kind}_pool{rank}d {size} s{stride}"
        kept = _kept_by_torch(kind, shape, dtype, pooled((size, stride, padding))(shape))
        for layout in layouts:
            run = partial(
                getattr(ops, f"{kind}_pool_forward"),
                kernel_size=(size,) * rank,
                stride=stride,
                padding=padding,
                channels_last=layout == "NHWC",
            )
            options: Options = {"floor": _floor_of_saved, "limit": limit, "torch_saved": kept}
            yield from passes(operation, name, dtype, shape, layout, forward=run, **options)
            if kind == "max" and rank == 2:
                prepare = partial(_gather, run, shape, dtype, layout)
                yield TrafficCase(f"{name} gather", dtype, shape, layout, prepare, limit)


def _kept_by_torch(kind: str, shape: Shape, dtype: np.dtype, outputs: Shape) -> int:
    """Its input, and for a maximum an index of 8 bytes."""
    return math.prod(shape) * dtype.itemsize + (8 * math.prod(outputs) if kind == "max" else 0)


def _gather(run: Callable[[Array], Any], shape: Shape, dtype: np.dtype, layout: str) -> Prepared:
    x = in_layout(shape, dtype, layout)
    y, saved = run(x)
    read = touched_bytes(ops.max_pool_indices(saved), math.prod(shape[2:]), x.itemsize, layout == "NHWC")
    return lambda: ops.max_pool_gather(x, saved), y.nbytes + saved.argmax.nbytes + read


def _max_pool_traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    if dtype.kind not in "iu":
        yield from _window_traffic(operation, dtype)
        return
    for layout in ("NCHW", "NHWC"):
        prepare = partial(_of_integers, (2, 16, 112, 112), dtype, layout)
        yield TrafficCase("max_pool 3x3 s2 of integers", dtype, (2, 16, 112, 112), layout, prepare)


def _of_integers(shape: Shape, dtype: np.dtype, layout: str) -> Prepared:
    x = np.abs(in_layout(shape, np.float64, layout) * 50).astype(dtype)
    run = partial(ops.max_pool_forward, x, (3, 3), 2, 1, channels_last=layout == "NHWC")
    y, saved = run()
    return run, pool_floor(Sizes(x.size, y.size, x.itemsize), argmax_bytes(saved))


# Name, output's size, and the most that may be moved.
_WHOLE, _UNEVEN = ("global", (1, 1), 1.05), ("adaptive", (5, 6), 1.10)


def _adaptive(kind: str, *calls: tuple[str, tuple[int, int], float]) -> Callable[..., Iterator[TrafficCase]]:
    forward, shape = getattr(ops, f"adaptive_{kind}_pool_forward"), (2, 32, 32, 32)

    def traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
        for (name, outputs, limit), layout in itertools.product(calls, ("NCHW", "NHWC")):
            run = partial(forward, output_size=outputs, channels_last=layout == "NHWC")
            # PyTorch takes the mean of the whole plane as a sum, which needs nothing.
            needs = kind == "max" or name != "global"
            kept = _kept_by_torch(kind, shape, dtype, (*shape[:2], *outputs)) if needs else None
            options: Options = {"floor": _floor_of_saved, "limit": limit, "torch_saved": kept}
            yield from passes(operation, f"{name} {kind}", dtype, shape, layout, forward=run, **options)

    return traffic


def _taps(xp: ModuleType, x: Array, window: tuple[int, int, int], channels_last: bool, fill: float) -> list[Array]:
    """For each tap of the window, what it sees at every output: a strided view of the padded array."""
    kernel, stride, padding = window
    first = 1 if channels_last else 2
    pads = [(padding, padding) if axis in (first, first + 1) else (0, 0) for axis in range(4)]
    padded = xp.pad(x, pads, constant_values=fill)
    rows, columns = ((x.shape[first + i] + 2 * padding - kernel) // stride + 1 for i in range(2))
    views = []
    for row in range(kernel):
        for column in range(kernel):
            place = (
                slice(row, row + stride * (rows - 1) + 1, stride),
                slice(column, column + stride * (columns - 1) + 1, stride),
            )
            views.append(padded[(slice(None),) * first + place])
    return views


def _max_pool_expression(window: tuple[int, int, int]) -> Callable[[ModuleType, Arrays, bool], Array]:
    def expression(xp: ModuleType, arrays: Arrays, channels_last: bool) -> Array:
        first, *others = _taps(xp, arrays["x"], window, channels_last, -math.inf)
        for tap in others:
            first = xp.maximum(first, tap)
        return first

    return expression


def _avg_pool_expression(xp: ModuleType, arrays: Arrays, channels_last: bool) -> Array:
    return sum(_taps(xp, arrays["x"], HALVING, channels_last, 0.0)) / HALVING[0] ** 2


def _reduce_window(
    jax: ModuleType,
    x: Array,
    start: float,
    by: Callable[..., object],
    window: tuple[int, int, int],
    channels_last: bool,
) -> Array:
    kernel, stride, padding = window

    def spatial(value: object, rest: object) -> tuple:
        return (rest, value, value, rest) if channels_last else (rest, rest, value, value)

    pads = spatial((padding, padding), (0, 0))
    return jax.lax.reduce_window(x, x.dtype.type(start), by, spatial(kernel, 1), spatial(stride, 1), pads)


def _max_pool_timed(window: tuple[int, int, int], shapes: tuple[Shape, ...]) -> Options:
    kernel, stride, padding = window
    return {
        "shapes": shapes,
        "forward": lambda a, last: ops.max_pool_forward(a["x"], (kernel, kernel), stride, padding, channels_last=last),
        "torch": lambda F, t: F.max_pool2d(t["x"], *window),  # noqa: N803
        "expression": _max_pool_expression(window),
        "jax": lambda jax, a, last: _reduce_window(jax, a["x"], -math.inf, jax.lax.max, window, last),
        "output_shape": pooled(window),
    }


MAX_POOL = Operation(
    name="max_pool",
    **_max_pool_timed(MAX_WINDOW, IMAGES),
    backward=ops.max_pool_backward,
    floor=lambda s, direction: pool_floor(s, 1),
    torch_bytes=pool_bytes(8),
    cases=(max_pool_cases, integer_max_pool_cases),
    traffic=_max_pool_traffic,
    dtypes=(*FLOAT_DTYPES, np.dtype(np.uint8), np.dtype(np.int32)),
    layers=of_ranks(layers.MaxPool1d, layers.MaxPool2d, layers.MaxPool3d, arguments=(2, 1)),
    layouts=(False, True),
)

HALVING_MAX_POOL = MAX_POOL.called(
    "halving_max_pool",
    **_max_pool_timed(HALVING, IMAGES),
    # As of average pooling.
    floor=per_pass(lambda s: pool_floor(s, 1, seen=4 * s.outputs), lambda s: pool_floor(s, 1)),
)
PYRAMID_MAX_POOL = MAX_POOL.called(
    "pyramid_max_pool", **_max_pool_timed(_PYRAMID_WINDOW, ((64, 256, 40, 40), (64, 512, 20, 20)))
)


@cache
def _second_taps(module: ModuleType, shape: Shape) -> ops.MaxPoolSaved:
    """Of a pooling by windows of 2 x 2, each of which chose its second element."""
    _, saved = launched_nowhere(lambda: ops.max_pool_forward(np.empty(shape, np.float32), (2, 2)))
    return replace(saved, argmax=module.ones(saved.argmax.shape, np.uint8))


def _gathered(x: Array) -> Array:
    return ops.max_pool_gather(x, replace(_second_taps(array_module(x), x.shape), dtype=x.dtype))


MAX_POOL_GATHER = Operation(
    name="max_pool_gather",
    shapes=LARGE_IMAGES,
    forward=lambda a, last: (_gathered(a["x"]), None),
    backward=None,
    # Of the windows of 2 x 2 the first row.
    floor=lambda s, direction: s.elements(0, 1) + s.outputs + s.itemsize * s.inputs // 2,
    torch_bytes=lambda s, direction: s.elements(0, 1) + 8 * s.outputs + s.itemsize * s.inputs // 2,
    output_shape=pooled(HALVING),
    is_training=False,
)

ADAPTIVE_MAX_POOL = Operation(
    name="adaptive_max_pool",
    shapes=IMAGES[:3],
    forward=lambda a, last: ops.adaptive_max_pool_forward(a["x"], (5, 5), channels_last=last),
    backward=ops.max_pool_backward,
    floor=lambda s, direction: pool_floor(s, 1),
    torch_bytes=pool_bytes(8),
    traffic=_adaptive("max", _WHOLE, _UNEVEN),
    layers=of_ranks(layers.AdaptiveMaxPool1d, layers.AdaptiveMaxPool2d, layers.AdaptiveMaxPool3d, arguments=(4,)),
    torch=lambda F, t: F.adaptive_max_pool2d(t["x"], 5),  # noqa: N803
    output_shape=lambda shape: (*shape[:2], 5, 5),
    layouts=(False, True),
)

AVG_POOL = Operation(
    name="avg_pool",
    shapes=IMAGES,
    forward=lambda a, last: ops.avg_pool_forward(a["x"], (2, 2), channels_last=last),
    backward=ops.avg_pool_backward,
    # Forward reads what lies in a window: of an odd plane not the last row and column.
    floor=per_pass(lambda s: pool_floor(s, seen=4 * s.outputs), pool_floor),
    torch_bytes=per_pass(lambda s: s.elements(0, 5), lambda s: s.elements(1, 1)),
    cases=(avg_pool_cases,),
    traffic=_window_traffic,
    layers=of_ranks(layers.AvgPool1d, layers.AvgPool2d, layers.AvgPool3d, arguments=(2, 1, 1)),
    torch=lambda F, t: F.avg_pool2d(t["x"], *HALVING),  # noqa: N803
    expression=_avg_pool_expression,
    jax=lambda jax, a, last: _reduce_window(jax, a["x"], 0.0, jax.lax.add, HALVING, last) / HALVING[0] ** 2,
    output_shape=pooled(HALVING),
    layouts=(False, True),
)

ADAPTIVE_AVG_POOL = Operation(
    name="adaptive_avg_pool",
    shapes=IMAGES[:3],
    forward=lambda a, last: ops.adaptive_avg_pool_forward(a["x"], (5, 5), channels_last=last),
    backward=ops.avg_pool_backward,
    floor=pool_bytes(0),
    torch_bytes=pool_bytes(0),
    traffic=_adaptive("avg", _UNEVEN),
    layers=of_ranks(layers.AdaptiveAvgPool1d, layers.AdaptiveAvgPool2d, layers.AdaptiveAvgPool3d, arguments=(4,)),
    torch=lambda F, t: F.adaptive_avg_pool2d(t["x"], 5),  # noqa: N803
    output_shape=lambda shape: (*shape[:2], 5, 5),
    layouts=(False, True),
)

GLOBAL_AVG_POOL = Operation(
    name="global_avg_pool",
    shapes=IMAGES,
    forward=lambda a, last: ops.adaptive_avg_pool_forward(a["x"], (1, 1), channels_last=last),
    backward=ops.avg_pool_backward,
    floor=pool_bytes(0),
    torch_bytes=pool_bytes(0),
    traffic=_adaptive("avg", _WHOLE),
    torch=lambda F, t: F.adaptive_avg_pool2d(t["x"], 1),  # noqa: N803
    expression=lambda xp, a, last: a["x"].mean(axis=(1, 2) if last else (2, 3), keepdims=True),
    jax=lambda jax, a, last: a["x"].mean(axis=(1, 2) if last else (2, 3), keepdims=True),
    output_shape=lambda shape: (*shape[:2], 1, 1),
    layouts=(False, True),
)
