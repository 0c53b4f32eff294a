"""Cases of the poolings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpu_layers import ops
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.runtime.kernel import FLOAT_DTYPES, INTEGER_DTYPES
from gpu_layers.verification.comparison import Arrays, Case, epsilon, smallest
from gpu_layers.verification.inputs import (
    generator,
    launched_nowhere,
    negative_zeros,
    normal,
    with_several_nan,
    with_special_values,
    with_ties,
)

# (N, C, *spatial), window: compiled-in windows and general ones; planes that are smaller and larger than a block;
# channels that do and do not make 16-byte vectors; one and three axes; more than 256 taps.
_CASES: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
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
    (
        (1, 8, 10, 5, 8),
        {"kernel_size": (2, 3, 3), "stride": (3, 2, 2), "padding": (0, 1, 1), "dilation": (3, 1, 1)},
    ),
)

# (N, C, *spatial), lengths, window: as long as the batch, shorter, empty.
_LENGTHS: tuple[tuple[tuple[int, ...], Any, dict[str, Any]], ...] = (
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


def _shapes() -> Iterator[tuple[str, tuple[int, ...], dict[str, Any]]]:
    for shape, window in _CASES:
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


def _view(label: str, x: Any) -> Any:
    return x[:, ::2, ::-1] if label == "non-contiguous" else x


def _max_forward(x: Any, window: dict[str, Any]) -> tuple[Any, ops.MaxPoolSaved]:
    forward: Any = ops.adaptive_max_pool_forward if "output_size" in window else ops.max_pool_forward
    return forward(x, **window)


def _avg_forward(x: Any, window: dict[str, Any]) -> tuple[Any, ops.AvgPoolSaved]:
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


def _of_all_kernels() -> Iterator[tuple[str, tuple[int, ...], dict[str, Any]]]:
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


def _max_pool_of_nan(dtype: Any) -> Case:
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


def _of_negative_zeros(op: str, dtype: Any, forward: Callable[..., Any], backward: Callable[..., Any]) -> Case:
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


# (N, C, *spatial), kernel, outputs: windows that overlap and leave gaps; one output; a whole axis; three axes; nothing.
_FRACTIONAL: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...] = (
    ((2, 3, 13, 11), (2, 3), (6, 5)),
    ((2, 5, 9, 10), (3, 3), (7, 8)),
    ((1, 4, 20, 19), (2, 2), (5, 4)),
    ((2, 2, 6, 6), (2, 6), (1, 1)),
    ((1, 3, 7, 8, 9), (2, 2, 3), (4, 5, 1)),
    ((0, 3, 6, 6), (2, 2), (3, 3)),
)


def fractional_max_pool_cases() -> Iterator[Case]:
    """Windows by samples that are given, and by random numbers of this library; both layouts."""
    for dtype in FLOAT_DTYPES:
        for shape, kernel, outputs in _FRACTIONAL:
            for channels_last in (False, True):
                yield _fractional_max_pool(dtype, shape, kernel, outputs, channels_last)


def _fractional_max_pool(dtype, shape, kernel, outputs, channels_last) -> Case:
    in_memory = (shape[0], *shape[2:], shape[1]) if channels_last else shape
    out_shape = (shape[0], *outputs, shape[1]) if channels_last else (*shape[:2], *outputs)

    def inputs() -> Arrays:
        samples = generator("samples", shape).random((*shape[:2], len(kernel))).astype(accumulation_dtype(dtype))
        x = with_special_values(with_ties(in_memory, dtype))
        rng_state = np.array([1, 2**64 - 1, 0], np.uint64)
        return {"x": x, "dy": normal(out_shape, dtype, "dy"), "samples": samples, "rng_state": rng_state}

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        calls: dict[str, dict[str, Any]] = {
            "samples": {"samples": arrays["samples"]},
            "numbers": {"seed": 2**63 + 1, "offset": 2**40},
            "rng_state": {"rng_state": arrays["rng_state"]},
        }
        for name, options in calls.items():
            y, saved = ops.fractional_max_pool_forward(
                arrays["x"], kernel, outputs, channels_last=channels_last, **options
            )
            results |= {f"y {name}": y, f"taps {name}": saved.argmax, f"starts {name}": saved.starts}
            results[f"indices {name}"] = ops.fractional_max_pool_indices(saved)
            results[f"dx {name}"] = ops.fractional_max_pool_backward(arrays["dy"], saved)
        return results

    label = f"{list(in_memory)} kernel_size={kernel} output_size={outputs}{', channels_last' * channels_last}"
    return Case("fractional_max_pool", dtype, label, inputs, run)


def integer_max_pool_cases() -> Iterator[Case]:
    """Of whole numbers values and taps alone."""
    for dtype in (*INTEGER_DTYPES, np.dtype(np.bool_)):
        yield _integer_max_pool(dtype)


def _integer_max_pool(dtype) -> Case:
    windows: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
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


def _max_pool(dtype, label, shape, window) -> Case:
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


def _avg_pool(dtype, label, shape, window) -> Case:
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


# Of the windows above, those that are enough: most kernels are the general ones, whose geometry is tested there.
_LP_CASES = [case for case in _CASES if case[0] in ((2, 3, 8, 10), (2, 5, 13, 9), (1, 2, 20, 19), (2, 8, 5, 6, 7))]
# Windows side by side, by tiles: whole ones, of one axis with one input left, and of three axes.
_LP_TILED: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((2, 8, 6, 16), {"kernel_size": (2, 2)}),
    ((1, 8, 13), {"kernel_size": (2,)}),
    ((1, 8, 3, 5, 8), {"kernel_size": (1, 2, 2)}),
)
_POWERS = (1.0, 2.0, 2.5, 3.0, 100.0, 2000.0, np.inf)
# Windows cut off before by padding and after by ceil mode; values whose squares are beyond float32, infinities, NaN.
_LP_CUT_OFF: tuple[tuple[int, ...], dict[str, Any]] = (
    (2, 2, 8, 10),
    {"kernel_size": (3, 4), "stride": (2, 3), "padding": ((1, 0), (0, 2)), "dilation": (2, 1), "ceil_mode": True},
)
_LP_SIZES = {"tiny": 1e-30, "large": 1e30, "special": 1.0}


def lp_pool_cases() -> Iterator[Case]:
    """Sums in the order of the reference; powers as good as CUDA promises."""
    for dtype in FLOAT_DTYPES:
        for p in _POWERS:
            for shape, window in (*_LP_CASES, _LP_CUT_OFF):
                yield _lp_pool(dtype, p, shape, window)
            (batch, channels, *spatial), window = _LP_CASES[1]
            yield _lp_pool(dtype, p, (batch, *spatial, channels), {**window, "channels_last": True})
        for p in (1.0, 2.0):
            for (batch, channels, *spatial), window in _LP_TILED:
                yield _lp_pool(dtype, p, (batch, channels, *spatial), window)
                yield _lp_pool(dtype, p, (batch, *spatial, channels), {**window, "channels_last": True})
        if dtype != np.float16:
            for p in (2.0, 20.0):
                for sizes in _LP_SIZES:
                    yield _lp_pool(dtype, p, *_LP_CASES[0], sizes)
        yield _lp_pool_special(dtype)


def _lp_pool(dtype, p, shape, window, sizes="") -> Case:
    accumulate = accumulation_dtype(dtype)

    def inputs() -> Arrays:
        x = normal(shape, dtype, "x")
        x = (x * x.dtype.type(_LP_SIZES.get(sizes, 1.0))).astype(dtype)
        x = with_special_values(x) if sizes == "special" else x
        y = launched_nowhere(lambda: ops.lp_pool_forward(x, p, **window)[0])
        return {"x": x, "dy": normal(y.shape, dtype, "dy")}

    def run(arrays: Arrays) -> Arrays:
        y, saved = ops.lp_pool_forward(arrays["x"], p, **window)
        results = {"y": y, "dx": ops.lp_pool_backward(arrays["dy"], saved)}
        return results if saved.argmax is None else {**results, "argmax": saved.argmax}

    def bounds(inputs: Arrays, expected: Arrays) -> Arrays:
        if p == np.inf:
            return {}  # nothing but what IEEE 754 defines to the last bit
        # The reference computes in float64, and rounds. So does the kernel of float32: the results may fall to either
        # side, which is a unit in the last place. Half types are computed in float32, with p products of 2 roundings
        # each, of which forward's root leaves the p-th part, and a root within 4 units. In float64 pow is within 1 unit
        # here and there; so are a quotient, a root, and what they are multiplied by. Its values are rounded before
        # powers are taken only if p is beyond 900.
        half = dtype not in (np.float32, np.float64)
        power = epsilon(np.float32) if half else epsilon(np.float64)
        y = np.abs(expected["y"].astype(np.float64)) * (epsilon(dtype) + 8 * power) + smallest(dtype)
        # The gradient has a power of p - 1, and slopes that may be rounded to the accumulation dtype.
        _, saved = ops.lp_pool_forward(inputs["x"].astype(np.float64), p, **window)
        total = np.abs(ops.lp_pool_backward(np.abs(inputs["dy"].astype(np.float64)), saved))
        products = 0 if dtype == np.float64 and p <= 900 else 2 * p
        dx = total * (epsilon(accumulate) + (products + 16) * power) + smallest(dtype)
        dx = dx + np.abs(expected["dx"].astype(np.float64)) * epsilon(dtype)
        return {"y": y, "dx": dx}

    options = ", ".join(f"{name}={value}" for name, value in window.items())
    return Case("lp_pool", dtype, f"{list(shape)} p={p:g}, {options}{sizes and ', '}{sizes}", inputs, run, bounds)


def _lp_pool_special(dtype: Any) -> Case:
    """The last of several NaN is the largest; a gradient of -0 is a sum, and has the sign of x."""

    def inputs() -> Arrays:
        arrays: Arrays = {}
        for number, (shape, window) in enumerate(_LP_CASES):
            x = normal(shape, dtype, "x")
            y = launched_nowhere(lambda: ops.lp_pool_forward(x, 2.0, **window)[0])  # noqa: B023
            arrays |= {f"x {number}": x, f"dy {number}": negative_zeros(y.shape, dtype)}
            arrays[f"NaN {number}"] = with_several_nan(with_ties(shape, dtype))
        return arrays

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        for number, (_, window) in enumerate(_LP_CASES):
            y, saved = ops.lp_pool_forward(arrays[f"NaN {number}"], np.inf, **window)
            results |= {f"y {number}": y, f"argmax {number}": saved.argmax}
            for p in _POWERS:
                _, saved = ops.lp_pool_forward(arrays[f"x {number}"], p, **window)
                results[f"dx {number} p={p:g}"] = ops.lp_pool_backward(arrays[f"dy {number}"], saved)
        return results

    return Case("lp_pool", dtype, "several NaN, gradients of -0", inputs, run)


# (N, C, *spatial) of the values, output size: planes of one part and of several, more values than places.
_UNPOOL_CASES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((2, 3, 4, 5), (9, 11)),
    ((1, 2, 40, 33), (81, 66)),
    ((3, 2, 70), (20,)),
    ((1, 2, 2, 3, 3), (4, 6, 6)),
    ((0, 2, 3), (6,)),
)


def max_unpool_cases() -> Iterator[Case]:
    """Values move: every bit must be the reference's. Some indices are equal, some are outside the plane."""
    for dtype in FLOAT_DTYPES:
        for shape, size in _UNPOOL_CASES:
            for channels_last in (False, True):
                yield _max_unpool(dtype, shape, size, channels_last)


def _max_unpool(dtype, shape, size, channels_last) -> Case:
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
