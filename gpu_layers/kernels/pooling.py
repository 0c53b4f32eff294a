"""Launching ``max_pool.cu`` and ``avg_pool.cu``."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from gpu_layers.kernels.arrays import ACCUMULATE_TYPES, ELEMENT_TYPES, element_type, empty, ready, vector_width
from gpu_layers.kernels.elementwise import blocks_for
from gpu_layers.reference.pooling import tap_dtype
from gpu_layers.runtime.kernel import C_TYPES, KernelTemplate, accumulate_name, c_name, combinations
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.limits import limits
from gpu_layers.window import Window

_THREADS = 256
_DYNAMIC = "DynamicWindow"
# Windows that are specialised when compiled: (kernel, stride) of two axes, dilation 1.
_STATIC = {(2, 2): "StaticWindow<1, 2, 2, 1, 2, 2>", (3, 2): "StaticWindow<1, 3, 3, 1, 2, 2>"}
_STATIC[3, 1] = "StaticWindow<1, 3, 3, 1, 1, 1>"

_DIVISOR = np.dtype([("divisor", np.uint32), ("multiplier", np.uint32), ("shift", np.uint32)])
_WINDOW = np.dtype(
    [
        ("kernel", np.int32, 3),
        ("stride", np.int32, 3),
        ("dilation", np.int32, 3),
        ("pad", np.int32, 3),
        ("input", np.int64, 3),
        ("output", np.int64, 3),
        ("images", np.int64),
        ("groups", np.int64),
        ("by_output", _DIVISOR, 3),
        ("by_input", _DIVISOR, 3),
        ("by_output_image", _DIVISOR),
        ("by_input_image", _DIVISOR),
        ("by_groups", _DIVISOR),
        ("by_stride", _DIVISOR, 3),
    ],
    align=True,
)


def _pool_divisor(accumulate: str) -> np.dtype:
    number = np.float64 if accumulate == "double" else np.float32
    fields = [("reciprocal", number), ("count", np.int32), ("padding_counts", np.int32), ("pad_after", np.int32, 3)]
    return np.dtype(fields, align=True)


_STRUCTS = {"PoolWindow": _WINDOW, **{f"PoolDivisor<{name}>": _pool_divisor(name) for name in ACCUMULATE_TYPES}}


def _instantiations(element: str, has_taps: bool) -> list[dict[str, str]]:
    """What pooling of one element type is compiled for.

    Specialised windows have at most 256 taps, and images of fewer than 2**31 vectors; the general window takes the
    rest. Rare kinds (more taps, larger images) go by single channels, which keeps their number down.
    """
    both = (str(vector_width(C_TYPES[element])), "1")
    kinds = [
        ("unsigned char", both, tuple(_STATIC.values()), "int"),
        ("unsigned char", both, (_DYNAMIC,), "int"),
        ("unsigned char", ("1",), (_DYNAMIC,), "long long"),
    ]
    if has_taps:
        kinds += [(tap, ("1",), (_DYNAMIC,), "int") for tap in ("unsigned short", "unsigned int")]
        kinds += [(tap, ("1",), (_DYNAMIC,), "long long") for tap in ("unsigned short", "unsigned int")]
    arguments = []
    for tap, widths, windows, index in kinds:
        taps = {"Tap": (tap,)} if has_taps else {}
        arguments += combinations(T=(element,), **taps, Width=widths, Window=windows, Index=(index,))
    return arguments


def _template(source: str, function: str, signature: str, has_taps: bool) -> KernelTemplate:
    instantiations = [kind for element in ELEMENT_TYPES for kind in _instantiations(element, has_taps)]
    return KernelTemplate(source, function, signature, instantiations, _STRUCTS)


_MAX_FORWARD_SIGNATURE = "const T* x, T* y, Tap* taps, PoolWindow window"
_MAX_BACKWARD_SIGNATURE = "const T* dy, const Tap* taps, T* dx, PoolWindow window"
_MAX_FORWARD = _template("max_pool.cu", "max_pool_forward", _MAX_FORWARD_SIGNATURE, True)
_MAX_BACKWARD = _template("max_pool.cu", "max_pool_backward", _MAX_BACKWARD_SIGNATURE, True)
_AVG_SIGNATURE = "PoolWindow window, PoolDivisor<A> divisor"
_AVG_FORWARD = _template("avg_pool.cu", "avg_pool_forward", f"const T* x, T* y, {_AVG_SIGNATURE}", False)
_AVG_BACKWARD = _template("avg_pool.cu", "avg_pool_backward", f"const T* dy, T* dx, {_AVG_SIGNATURE}", False)


def _divisor(value: int) -> tuple[int, int, int]:
    """``Divisor32`` of ``fast_division.cuh``; a value beyond it is never used to divide by."""
    if not 0 < value < 2**31:
        return 0, 0, 0
    shift = (value - 1).bit_length()
    return value, 2**32 * (2**shift - value) // value + 1, shift


class _Plan:
    """Everything about a launch that depends on the shapes alone."""

    def __init__(self, window: Window, images: int, channels: int, itemsize: int, channels_last: bool) -> None:
        lead = (1,) * (3 - window.rank)
        sizes = {
            "kernel": lead + window.kernel,
            "stride": lead + window.stride,
            "dilation": lead + window.dilation,
            "pad": (0,) * (3 - window.rank) + window.pad_before,
            "input": lead + window.input_shape,
            "output": lead + window.output_shape,
        }
        per_position = channels if channels_last else 1
        output_image, input_image = (math.prod(sizes[side]) * per_position for side in ("output", "input"))
        index64 = max(output_image, input_image) >= limits().index32_below
        static_window = None if index64 else _static_window(window)
        vectors = channels_last and channels % (16 // itemsize) == 0 and not index64 and window.taps <= 256
        self.width = 16 // itemsize if vectors else 1
        self.template_arguments = {
            "Width": str(self.width),
            "Window": static_window or _DYNAMIC,
            "Index": "long long" if index64 else "int",
        }
        images = images if channels_last else images * channels
        output_image, input_image = output_image // self.width, input_image // self.width
        self.outputs, self.inputs = images * output_image, images * input_image
        self.struct = np.zeros((), _WINDOW)
        for name, values in sizes.items():
            self.struct[name] = values
        self.struct["images"], self.struct["groups"] = images, per_position // self.width
        for name, values in (("output", sizes["output"]), ("input", sizes["input"]), ("stride", sizes["stride"])):
            self.struct[f"by_{name}"] = [_divisor(value) for value in values]
        self.struct["by_groups"] = _divisor(per_position // self.width)
        self.struct["by_output_image"], self.struct["by_input_image"] = _divisor(output_image), _divisor(input_image)


def _static_window(window: Window) -> str | None:
    square = len(set(window.kernel)) == len(set(window.stride)) == 1
    if window.rank != 2 or not square or set(window.dilation) != {1}:
        return None
    return _STATIC.get((window.kernel[0], window.stride[0]))


@lru_cache(maxsize=1024)
def _cached_plan(window: Window, images: int, channels: int, itemsize: int, channels_last: bool, _: Any) -> _Plan:
    return _Plan(window, images, channels, itemsize, channels_last)


def _plan(array: Any, window: Window, channels_last: bool) -> _Plan:
    channels = array.shape[-1] if channels_last else array.shape[1]
    return _cached_plan(window, array.shape[0], channels, array.dtype.itemsize, channels_last, limits())


def _run(template: KernelTemplate, plan: _Plan, element: str, units: int, arguments: tuple, **tap: str) -> None:
    if units:
        kernel = template(T=element, **tap, **plan.template_arguments)
        launch(kernel, blocks_for(units, _THREADS), _THREADS, arguments)


def _shape(array: Any, spatial: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """The array's shape, with other spatial sizes."""
    lead, channels = array.shape[0], array.shape[-1] if channels_last else array.shape[1]
    return (lead, *spatial, channels) if channels_last else (lead, channels, *spatial)


def max_pool_forward(x: Any, window: Window, channels_last: bool = False) -> tuple[Any, Any]:
    """``gpu_layers.reference.max_pool_forward``, as a kernel."""
    x = ready(x)
    plan = _plan(x, window, channels_last)
    shape = _shape(x, window.output_shape, channels_last)
    y, taps = empty(shape, x.dtype, x), empty(shape, tap_dtype(window), x)
    _run(_MAX_FORWARD, plan, element_type(x), plan.outputs, (x, y, taps, plan.struct), Tap=c_name(taps.dtype))
    return y, taps


def max_pool_backward(dy: Any, taps: Any, window: Window, channels_last: bool = False) -> Any:
    """``gpu_layers.reference.max_pool_backward``, as a kernel."""
    dy, taps = ready(dy), ready(taps)
    plan = _plan(dy, window, channels_last)
    dx = empty(_shape(dy, window.input_shape, channels_last), dy.dtype, dy)
    _run(_MAX_BACKWARD, plan, element_type(dy), plan.inputs, (dy, taps, dx, plan.struct), Tap=c_name(taps.dtype))
    return dx


def _divisor_struct(window: Window, element: str, count_include_pad: bool, divisor_override: int | None) -> np.ndarray:
    struct = np.zeros((), _pool_divisor(accumulate_name(element)))
    padded = any(window.pad_before) or any(window.pad_after)
    cut_off = padded or any(
        (output - 1) * stride + dilation * (kernel - 1) >= size
        for output, stride, dilation, kernel, size in zip(
            window.output_shape, window.stride, window.dilation, window.kernel, window.input_shape, strict=True
        )
    )
    struct["reciprocal"] = 1 / (window.taps if divisor_override is None else divisor_override)
    struct["count"] = window.taps if divisor_override is None and cut_off else 0
    struct["padding_counts"] = count_include_pad
    struct["pad_after"] = (0,) * (3 - window.rank) + window.pad_after
    return struct


def avg_pool_forward(
    x: Any,
    window: Window,
    channels_last: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """``gpu_layers.reference.avg_pool_forward``, as a kernel."""
    x = ready(x)
    plan, element = _plan(x, window, channels_last), element_type(x)
    y = empty(_shape(x, window.output_shape, channels_last), x.dtype, x)
    divisor = _divisor_struct(window, element, count_include_pad, divisor_override)
    _run(_AVG_FORWARD, plan, element, plan.outputs, (x, y, plan.struct, divisor))
    return y


def avg_pool_backward(
    dy: Any,
    window: Window,
    channels_last: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """``gpu_layers.reference.avg_pool_backward``, as a kernel."""
    dy = ready(dy)
    plan, element = _plan(dy, window, channels_last), element_type(dy)
    dx = empty(_shape(dy, window.input_shape, channels_last), dy.dtype, dy)
    divisor = _divisor_struct(window, element, count_include_pad, divisor_override)
    _run(_AVG_BACKWARD, plan, element, plan.inputs, (dy, dx, plan.struct, divisor))
    return dx
