"""What the launchers of the poolings share: the window as kernels take it, and which thread does what."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from gpu_layers.kernels.arrays import ACCUMULATE_TYPES, ELEMENT_TYPES, empty, ready, vector_width
from gpu_layers.kernels.elementwise import blocks_for
from gpu_layers.reference.pool_taps import tap_dtype
from gpu_layers.runtime.cuda import array_module
from gpu_layers.runtime.kernel import C_TYPES, Kernel, KernelTemplate, accumulate_name, combinations
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.limits import limits
from gpu_layers.window import Window

THREADS = 256

#: Layout of ``Divisor32``.
DIVISION = np.dtype([("divisor", np.uint32), ("multiplier", np.uint32), ("shift", np.uint32)])
_WINDOW = np.dtype(
    [
        ("kernel", np.int32, 3),
        ("stride", np.int32, 3),
        ("dilation", np.int32, 3),
        ("pad", np.int32, 3),
        ("adaptive", np.int32),
        ("tap_bytes", np.int32),
        ("input", np.int64, 3),
        ("output", np.int64, 3),
        ("images", np.int64),
        ("channels", np.int64),
        ("groups", np.int64),
        ("units", np.int64, 3),
        ("by_units", DIVISION, 3),
        ("by_image", DIVISION),
        ("by_groups", DIVISION),
        ("by_stride", DIVISION, 3),
        ("by_output", DIVISION, 3),
        ("by_input", DIVISION, 3),
    ],
    align=True,
)


def _pool_divisor(accumulate: str) -> np.dtype:
    number = np.float64 if accumulate == "double" else np.float32
    fields = [("reciprocal", number), ("count", np.int32), ("padding_counts", np.int32), ("pad_after", np.int32, 3)]
    return np.dtype(fields, align=True)


#: Layout of the structs that pooling kernels take.
STRUCTS = {"PoolWindow": _WINDOW, **{f"PoolDivisor<{name}>": _pool_divisor(name) for name in ACCUMULATE_TYPES}}


def general_template(source: str, function: str, signature: str) -> KernelTemplate:
    """A kernel for any window.

    Vectors of channels have images of fewer than 2**31 units and at most 256 taps; what is rarer than that goes by
    single channels, which keeps the number of kernels down.
    """
    instantiations = []
    for element in ELEMENT_TYPES:
        for width, index in ((vector_width(C_TYPES[element]), "int"), (1, "int"), (1, "long long")):
            instantiations += combinations(T=(element,), Width=(str(width),), Index=(index,))
    return KernelTemplate(source, function, signature, instantiations, STRUCTS)


def division(value: int) -> tuple[int, int, int]:
    """``Divisor32`` of ``fast_division.cuh``; a value beyond it is never used to divide by."""
    if not 0 < value < 2**31:
        return 0, 0, 0
    shift = (value - 1).bit_length()
    return value, 2**32 * (2**shift - value) // value + 1, shift


class Plan:
    """Everything about a launch that depends on the shapes alone.

    Attributes
    ----------
    width : int
        Neighbouring channels that a thread has.
    template_arguments : dict of str to str
        Of a general template.
    units : int
        Of all images.
    struct : ndarray
        ``PoolWindow``.
    """

    def __init__(
        self, window: Window, units: str, shape: tuple[int, ...], itemsize: int, channels_last: bool, single: bool
    ) -> None:
        samples, channels = shape[0], shape[-1] if channels_last else shape[1]
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
        index64 = _reach(window, per_position) >= limits().index32_below
        vectors = (
            not single and channels_last and channels % (16 // itemsize) == 0 and not index64 and window.taps <= 256
        )
        self.width = 16 // itemsize if vectors else 1
        self.template_arguments = {"Width": str(self.width), "Index": "long long" if index64 else "int"}
        groups = per_position // self.width
        image = math.prod(sizes[units]) * groups
        images = samples if channels_last else samples * channels
        self.units = images * image
        self.struct = np.zeros((), _WINDOW)
        for name, values in sizes.items():
            self.struct[name] = values
        self.struct["adaptive"], self.struct["tap_bytes"] = window.adaptive, tap_dtype(window).itemsize
        self.struct["images"], self.struct["channels"] = images, 1 if channels_last else channels
        self.struct["groups"], self.struct["units"] = groups, sizes[units]
        self.struct["by_image"], self.struct["by_groups"] = division(image), division(groups)
        self.struct["by_units"] = [division(value) for value in sizes[units]]
        for name in ("stride", "output", "input"):
            self.struct[f"by_{name}"] = [division(value) for value in sizes[name]]

    def run(self, kernel: Kernel, arguments: tuple[Any, ...]) -> None:
        """Launch a kernel over all units, if there are any."""
        if self.units:
            launch(kernel, blocks_for(self.units, THREADS), THREADS, arguments)


def _reach(window: Window, per_position: int) -> int:
    """A bound of every index that kernels compute within an image."""
    images = (math.prod(shape) * per_position for shape in (window.input_shape, window.output_shape))
    axes = (
        (size + 1) * (outputs + 1) if window.adaptive else size + before + after + (kernel + 1) * dilation + stride
        for size, outputs, before, after, kernel, dilation, stride in zip(
            window.input_shape,
            window.output_shape,
            window.pad_before,
            window.pad_after,
            window.kernel,
            window.dilation,
            window.stride,
            strict=True,
        )
    )
    return max(*images, *axes)


@lru_cache(maxsize=1024)
def _cached_plan(
    window: Window, units: str, shape: tuple[int, ...], itemsize: int, channels_last: bool, single: bool, _: Any
) -> Plan:
    return Plan(window, units, shape, itemsize, channels_last, single)


def plan_for(array: Any, window: Window, units: str, channels_last: bool, single: bool = False) -> Plan:
    """The plan for an array of inputs or outputs.

    Parameters
    ----------
    array : array
    window : Window
    units : {"output", "input"}
        What a thread has one of at a time.
    channels_last : bool
    single : bool
        One channel a thread, also where several would make a vector.
    """
    # The spatial sizes are the window's: leave them out, so that forward and backward share a plan.
    shape = (array.shape[0], array.shape[-1 if channels_last else 1])
    return _cached_plan(window, units, shape, array.dtype.itemsize, channels_last, single, limits())


def spatial_empty(array: Any, spatial: tuple[int, ...], channels_last: bool, dtype: Any = None) -> Any:
    """An uninitialised array beside another one, with other spatial sizes."""
    lead, channels = array.shape[0], array.shape[-1] if channels_last else array.shape[1]
    shape = (lead, *spatial, channels) if channels_last else (lead, channels, *spatial)
    return empty(shape, array.dtype if dtype is None else dtype, array)


def ready_lengths(lengths: Any | None, rank: int) -> Any | None:
    """Lengths as kernels take them: of three axes, missing ones of size 1."""
    if lengths is None:
        return None
    ones = array_module(lengths).ones((lengths.shape[0], 3 - rank), np.int64)
    return ready(array_module(lengths).concatenate([ones, lengths], axis=1))


def as_bytes(taps: Any) -> Any:
    """The bytes of saved taps, whatever their size."""
    return taps.reshape(-1).view(np.uint8)


def divisor_struct(
    window: Window,
    element: str,
    count_include_pad: bool,
    divisor_override: int | None,
    lengths: Any | None,
) -> np.ndarray:
    """``PoolDivisor`` of ``pool_divisor.cuh``."""
    struct = np.zeros((), _pool_divisor(accumulate_name(element)))
    padded = any(window.pad_before) or any(window.pad_after)
    cut_off = (
        padded
        or window.adaptive
        or lengths is not None
        or any(
            (output - 1) * stride + dilation * (kernel - 1) >= size
            for output, stride, dilation, kernel, size in zip(
                window.output_shape, window.stride, window.dilation, window.kernel, window.input_shape, strict=True
            )
        )
    )
    struct["reciprocal"] = 1 / (window.taps if divisor_override is None else divisor_override)
    struct["count"] = window.taps if divisor_override is None and cut_off else 0
    struct["padding_counts"] = count_include_pad
    struct["pad_after"] = (0,) * (3 - window.rank) + window.pad_after
    return struct
