"""Pooling by powers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gpu_layers import layers, ops
from gpu_layers.catalogue.case import Arrays, Case, epsilon, smallest
from gpu_layers.catalogue.inputs import (
    launched_nowhere,
    negative_zeros,
    normal,
    with_several_nan,
    with_special_values,
    with_ties,
)
from gpu_layers.catalogue.operation import FORWARD, IMAGES, Operation, Sizes, of_ranks, per_pass
from gpu_layers.catalogue.pooling import HALVING, WINDOWS, argmax_bytes, pooled
from gpu_layers.catalogue.traffic import TrafficCase, passes
from gpu_layers.core.array import Options
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.runtime.kernel import FLOAT_DTYPES

#: The page of the documents that has these operations.
PAGE = "pooling"

# Those that are enough: most kernels are the general ones, whose geometry max and average pooling test.
_LP_CASES = [case for case in WINDOWS if case[0] in ((2, 3, 8, 10), (2, 5, 13, 9), (1, 2, 20, 19), (2, 8, 5, 6, 7))]
# Windows side by side, by tiles: whole ones, of one axis with one input left, and of three axes.
_LP_TILED: tuple[tuple[tuple[int, ...], Options], ...] = (
    ((2, 8, 6, 16), {"kernel_size": (2, 2)}),
    ((1, 8, 13), {"kernel_size": (2,)}),
    ((1, 8, 3, 5, 8), {"kernel_size": (1, 2, 2)}),
)
_POWERS = (1.0, 2.0, 2.5, 3.0, 100.0, 2000.0, np.inf)
# Windows cut off before by padding and after by ceil mode; values whose squares are beyond float32, infinities, NaN.
_LP_CUT_OFF: tuple[tuple[int, ...], Options] = (
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


def _lp_pool(dtype: np.dtype, p: float, shape: tuple[int, ...], window: Options, sizes: str = "") -> Case:
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
        # each (forward's root leaves a p-th part of them), and a root within 4 units. In float64 pow is within 1 unit
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


def _lp_pool_special(dtype: np.dtype) -> Case:
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


# ---- what is timed, and whose bytes are counted ----------------------------------------------------------------------


def _floor(s: Sizes, direction: str, argmax: int = 0) -> int:
    """Kept of each output: of the largest value its place, of ``argmax`` bytes. The backward reads x too."""
    return s.elements(1 if direction == FORWARD else 2, 1) + argmax * s.outputs


def _traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    # Where windows overlap, the backward of a finite power leaves the norms to a second launch.
    for p, window in ((2.0, ((2, 2),)), (np.inf, ((3, 3), 2, 1))):
        yield from passes(
            operation,
            f"lp_pool p={p:g}",
            dtype,
            (2, 4, 64, 64),
            "NCHW",
            forward=lambda x, p=p, window=window: ops.lp_pool_forward(x, p, *window),
            floor=lambda s, direction, saved: _floor(s, direction, argmax_bytes(saved)),
            limit=1.10,
        )


LP_POOL = Operation(
    name="lp_pool",
    shapes=IMAGES[:3],
    forward=lambda a, last: ops.lp_pool_forward(a["x"], 2.0, (2, 2), channels_last=last),
    backward=ops.lp_pool_backward,
    floor=_floor,
    # A chain of kernels: power and mean of x; sign, size, ReLU, two products and root of y. Back, each with its
    # gradient, the powers in three steps.
    torch_bytes=per_pass(lambda s: s.elements(3, 14), lambda s: s.elements(8, 28)),
    cases=(lp_pool_cases,),
    traffic=_traffic,
    layers=of_ranks(layers.LPPool1d, layers.LPPool2d, layers.LPPool3d, arguments=(3.0, 2, 1)),
    torch=lambda F, t: F.lp_pool2d(t["x"], 2.0, 2),  # noqa: N803
    output_shape=pooled(HALVING),
    layouts=(False, True),
)
