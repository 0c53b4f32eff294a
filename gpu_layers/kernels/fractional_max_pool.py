"""Launching ``fractional_max_pool.cu``."""

from __future__ import annotations

import math

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.fractional_window import FractionalWindow
from gpu_layers.kernels.arrays import ELEMENT_TYPES, delivered, element_type, empty, ready
from gpu_layers.kernels.dropout import DIVISOR, STRUCTS, divisor
from gpu_layers.kernels.elementwise import blocks_for
from gpu_layers.kernels.pool_boxes import BOXES, boxed
from gpu_layers.kernels.pool_plan import DIVISION, division, spatial_empty, spatial_result
from gpu_layers.runtime.kernel import C_TYPES, KernelTemplate, accumulate_name, combinations
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.limits import limits
from gpu_layers.runtime.program import Launcher, Numbers, Operands

__all__ = ["fractional_max_pool_backward", "fractional_max_pool_forward"]

_SOURCE, _THREADS = "fractional_max_pool.cu", 256
# ``kFractionalStarts``; outputs of a box at most; bytes of a box of inputs, and of what is kept of a window.
_STARTS_KEPT, _BOX_OUTPUTS, _BOX_BYTES, _WINDOW_BYTES = 4096, 8192, 32 * 1024, 8
_VECTOR_BYTES = 16
_POOL = np.dtype(
    [
        ("boxes", BOXES),
        ("starts", DIVISOR),
        ("by_starts", DIVISION),
        ("by_kernel", DIVISION, (3,)),
        *((name, np.int32, (3,)) for name in ("input", "output", "kernel", "sample_of")),
        ("samples", np.int32),
        ("box_words", np.int32),
    ],
    align=True,
)
_STRUCTS = {**STRUCTS, "FractionalPool": _POOL}
# Sizes of square windows in planes, which kernels know; 0: any.
_KNOWN = ("2", "3")
_TYPES = [
    *combinations(T=ELEMENT_TYPES, Kernel=("0",), Index=("int", "long long")),
    *combinations(T=[name for name in ELEMENT_TYPES if name != "double"], Kernel=_KNOWN, Index=("int",)),
]
_FORWARD = KernelTemplate(_SOURCE, "fractional_max_pool_forward", _TYPES, _STRUCTS)
_BACKWARD = KernelTemplate(_SOURCE, "fractional_max_pool_backward", _TYPES, _STRUCTS)


def _struct(window: FractionalWindow, boxes: np.ndarray) -> np.ndarray:
    pool = np.zeros((), _POOL)
    pool["boxes"] = boxes
    pool["input"], pool["output"], pool["kernel"] = window.input_shape, window.output_shape, window.kernel
    pool["sample_of"], pool["samples"] = window.sample_of, window.samples
    starts = sum(window.output_shape)
    pool["starts"], pool["by_starts"] = divisor(starts), division(starts)
    pool["by_kernel"] = [division(size) for size in window.kernel]
    return pool


def _boxed(
    window: FractionalWindow, sizes: tuple[int, int, int], shape: tuple[int, ...], channels_last: bool, most: int
) -> tuple[int, np.ndarray]:
    """Boxes of planes of these sizes: their number, and ``FractionalPool``."""
    kept = sum(window.output_shape) / _STARTS_KEPT
    number, boxes = boxed(sizes, shape, channels_last, most, window.output_shape, _THREADS, kept)
    return number, _struct(window, boxes)


def _types(x: Array, window: FractionalWindow, channels_last: bool) -> dict[str, str]:
    """Template arguments of a kernel."""
    largest = max(map(math.prod, (window.input_shape, window.output_shape)))
    is_wide = largest * (x.shape[-1] if channels_last else 1) >= limits().index32_below
    of_any = {"T": element_type(x), "Kernel": "0", "Index": "long long" if is_wide else "int"}
    known = of_any | {"Kernel": str(window.kernel[2])}
    is_square = window.input_shape[0] == window.kernel[0] == 1 and window.kernel[1] == window.kernel[2]
    return known if is_square and known in _TYPES else of_any


def fractional_max_pool_forward(
    x: Array,
    window: FractionalWindow,
    samples: Array | None,
    seed: int,
    offset: int,
    rng_state: Array | None,
    channels_last: bool = False,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """``gpu_layers.reference.fractional_max_pool_forward``, as a kernel."""
    return _forward((x, samples, rng_state, out), (window, channels_last), (seed, offset))


def fractional_max_pool_backward(
    dy: Array,
    argmax: Array,
    starts: Array,
    window: FractionalWindow,
    channels_last: bool = False,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """``gpu_layers.reference.fractional_max_pool_backward``, as a kernel."""
    return _backward((dy, argmax, starts, out), (window, channels_last))


@Launcher
def _forward(
    operands: Operands, numbers: Numbers, window: FractionalWindow, channels_last: bool
) -> tuple[Array, Array, Array]:
    x, samples, rng_state, out = operands
    x, samples = ready(x), None if samples is None else ready(samples)
    planes = x.shape[0] * x.shape[-1 if channels_last else 1]
    starts = empty((planes, sum(window.output_shape)), np.int32, x)
    y = spatial_result(out, x, window.spatial_output, channels_last)
    argmax = spatial_empty(x, window.spatial_output, channels_last, np.uint8)
    if y.size:
        boxes, pool = _boxed(window, window.output_shape, x.shape, channels_last, _BOX_OUTPUTS)
        number = C_TYPES[accumulate_name(element_type(x))].type
        sizes = zip(window.input_shape, window.kernel, window.output_shape, strict=True)
        alphas = [float(number(size - kernel) / number(max(count - 1, 1))) for size, kernel, count in sizes]
        kernel = _FORWARD(**_types(x, window, channels_last))
        arguments = (x, samples, starts, y, argmax, *alphas, *numbers, rng_state, pool)
        launch(kernel, blocks_for(boxes, 1), _THREADS, arguments)
    return delivered(y, out), argmax, starts


@Launcher
def _backward(operands: Operands, numbers: Numbers, window: FractionalWindow, channels_last: bool) -> Array:
    dy, argmax, starts, out = operands
    dy, argmax, starts = ready(dy), ready(argmax), ready(starts)
    dx = spatial_result(out, dy, window.spatial_input, channels_last)
    if dx.size:
        number, pool = _boxed(window, window.input_shape, dy.shape, channels_last, _BOX_BYTES // dx.dtype.itemsize)
        box = pool["boxes"]
        words = -(-(math.prod(box["box"].tolist()) << int(box["log2_group"])) * dx.dtype.itemsize // _VECTOR_BYTES)
        apart = (1 << int(box["log2_group"])) + channels_last
        kept = sum(window.output_shape) * apart
        pool["box_words"] = words
        launch(
            _BACKWARD(**_types(dy, window, channels_last)),
            blocks_for(number, 1),
            _THREADS,
            (dy, argmax, starts, dx, pool),
            shared_bytes=_VECTOR_BYTES * words + (_WINDOW_BYTES * kept if 2 * kept <= _STARTS_KEPT else 0),
        )
    return delivered(dx, out)
