"""Fractional max pooling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, partial
from types import ModuleType

import numpy as np

from gpu_layers import layers, ops
from gpu_layers.catalogue.case import Arrays, Case
from gpu_layers.catalogue.inputs import generator, normal, with_special_values, with_ties
from gpu_layers.catalogue.operation import LARGE_IMAGES, Called, Operation, Shape, Sizes, of_ranks
from gpu_layers.catalogue.pooling import pool_bytes, pool_floor
from gpu_layers.catalogue.traffic import TrafficCase, passes
from gpu_layers.core.array import Array, Options
from gpu_layers.core.cuda import array_module
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.runtime.kernel import FLOAT_DTYPES

#: The page of the documents that has these operations.
PAGE = "pooling"

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


def _fractional_max_pool(
    dtype: np.dtype, shape: tuple[int, ...], kernel: tuple[int, ...], outputs: tuple[int, ...], channels_last: bool
) -> Case:
    in_memory = (shape[0], *shape[2:], shape[1]) if channels_last else shape
    out_shape = (shape[0], *outputs, shape[1]) if channels_last else (*shape[:2], *outputs)

    def inputs() -> Arrays:
        samples = generator("samples", shape).random((*shape[:2], len(kernel))).astype(accumulation_dtype(dtype))
        x = with_special_values(with_ties(in_memory, dtype))
        rng_state = np.array([1, 2**64 - 1, 0], np.uint64)
        return {"x": x, "dy": normal(out_shape, dtype, "dy"), "samples": samples, "rng_state": rng_state}

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        calls: dict[str, Options] = {
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


# ---- what is timed, and whose bytes are counted ----------------------------------------------------------------------


def _half(shape: Shape) -> Shape:
    return (*shape[:2], *(size // 2 for size in shape[2:]))


def _floor(s: Sizes, direction: str, starts: int | None = None) -> int:
    """``starts``: bytes of the windows' starts, which the forward writes besides; of 2 x 2 windows by default."""
    if starts is None:
        starts = 4 * math.prod(s.shape[:2]) * sum(_half(s.shape)[2:])
    return pool_floor(s, 1) + starts


def _traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    """Windows of 3 x 3 that leave no gaps."""
    for layout in ("NCHW", "NHWC"):
        yield from passes(
            operation,
            "fractional max_pool",
            dtype,
            (2, 16, 64, 64),
            layout,
            forward=partial(
                ops.fractional_max_pool_forward,
                kernel_size=(3, 3),
                output_size=(32, 32),
                seed=1,
                offset=2,
                channels_last=layout == "NHWC",
            ),
            floor=lambda s, direction, saved: _floor(s, direction, saved.starts.nbytes),
        )


@cache
def _drawn(module: ModuleType, shape: Shape, dtype: np.dtype, channels_last: bool) -> tuple[Shape, Array]:
    """Size of the output; numbers of the windows, the same of every image: drawn ones are those of the batch."""
    images, *sizes, channels = shape if channels_last else (shape[0], *shape[2:], shape[1])
    of_an_image = np.random.default_rng(1).random((1, channels, 2), np.float32).astype(accumulation_dtype(dtype))
    return tuple(size // 2 for size in sizes), module.asarray(np.repeat(of_an_image, images, axis=0))


def _by_samples(a: Arrays, channels_last: bool) -> Called:
    x = a["x"]
    outputs, samples = _drawn(array_module(x), x.shape, x.dtype, channels_last)
    return ops.fractional_max_pool_forward(x, (2, 2), outputs, samples=samples, channels_last=channels_last)


FRACTIONAL_MAX_POOL = Operation(
    name="fractional_max_pool",
    shapes=LARGE_IMAGES[:1],
    forward=_by_samples,
    backward=ops.fractional_max_pool_backward,
    floor=_floor,
    torch_bytes=pool_bytes(8),
    cases=(fractional_max_pool_cases,),
    traffic=_traffic,
    layers=of_ranks(layers.FractionalMaxPool2d, layers.FractionalMaxPool3d, arguments=(2, None, 0.6)),
    torch=lambda F, t: F.fractional_max_pool2d(t["x"], 2, _half(t["x"].shape)[2:]),  # noqa: N803
    output_shape=_half,
    layouts=(False, True),
    # PyTorch draws numbers of its own.
    is_random=True,
)
