"""What the launchers of the poolings share: the window as kernels take it, and which thread does what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpu_layers.core.argmax import argmax_dtype
from gpu_layers.core.array import Array, DTypeLike
from gpu_layers.core.window import Window
from gpu_layers.kernels.arrays import ACCUMULATE_TYPES, ELEMENT_TYPES, element_type, empty, result_like, vector_width
from gpu_layers.kernels.dropout import DIVISOR
from gpu_layers.kernels.elementwise import blocks_for
from gpu_layers.runtime.kernel import C_TYPES, Arguments, Kernel, KernelTemplate, accumulate_name, combinations
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.limits import OF_A_GPU, limits

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
        ("argmax_bytes", np.int32),
        ("axes", np.int32),
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
        ("by_dilation", DIVISION, 3),
        ("by_output", DIVISION, 3),
        ("by_input", DIVISION, 3),
        ("by_kernel", DIVISION, 3),
    ],
    align=True,
)


# ``kReciprocals`` of ``pool_divisor.cuh``.
_RECIPROCALS = 128


def _pool_divisor(accumulate: str) -> np.dtype:
    number = C_TYPES[accumulate]
    fields: list[Any] = [
        ("reciprocal", number),
        ("count", np.int32),
        ("padding_counts", np.int32),
        ("pad_after", np.int32, 3),
    ]
    fields.append(("reciprocals", number, _RECIPROCALS))
    return np.dtype(fields, align=True)


#: Layout of the structs that pooling kernels take.
STRUCTS = {"PoolWindow": _WINDOW, **{f"PoolDivisor<{name}>": _pool_divisor(name) for name in ACCUMULATE_TYPES}}


def general_template(source: str, function: str, elements: Sequence[str] = ELEMENT_TYPES) -> KernelTemplate:
    """A kernel for any window, for some element types.

    Vectors of channels have images of fewer than 2**31 units and at most 256 taps; what is rarer than that goes by
    single channels, which keeps the number of kernels down.
    """
    instantiations = []
    for element in elements:
        for width, index in ((vector_width(C_TYPES[element]), "int"), (1, "int"), (1, "long long")):
            instantiations += combinations(T=(element,), Width=(str(width),), Index=(index,))
    return KernelTemplate(source, function, instantiations, STRUCTS)


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
    template_arguments : dict of str to str
        Which instantiation, but for the element type.
    units : int
        Of all images.
    struct : ndarray
        ``PoolWindow``.
    """

    def __init__(
        self,
        window: Window,
        units: tuple[int, ...],
        shape: tuple[int, int],
        width: int,
        channels_last: bool,
        template_arguments: dict[str, str],
    ) -> None:
        samples, channels = shape
        self.template_arguments = template_arguments
        groups = channels // width if channels_last else 1
        images = samples if channels_last else samples * channels
        image = math.prod(units) * groups
        self.units = images * image
        self.struct = np.zeros((), _WINDOW)
        lead = 3 - window.rank
        self.struct["pad"] = (0,) * lead + window.pad_before
        for name, values in (
            ("kernel", window.kernel),
            ("stride", window.stride),
            ("dilation", window.dilation),
            ("input", window.input_shape),
            ("output", window.output_shape),
            ("units", units),
        ):
            self.struct[name] = (1,) * (3 - len(values)) + values
        for name in ("stride", "dilation", "input", "output", "kernel", "units"):
            self.struct[f"by_{name}"] = [division(int(value)) for value in self.struct[name]]
        self.struct["adaptive"], self.struct["argmax_bytes"] = window.adaptive, argmax_dtype(window).itemsize
        self.struct["axes"] = window.rank
        self.struct["images"], self.struct["channels"] = images, 1 if channels_last else channels
        self.struct["groups"], self.struct["by_groups"] = groups, division(groups)
        self.struct["by_image"] = division(image)

    def run(self, kernel: Kernel, arguments: Arguments, at_a_time: int = 1) -> None:
        """Launch a kernel over all units, if there are any: so many at a time for each thread."""
        if self.units:
            launch(kernel, blocks_for(self.units, THREADS * at_a_time), THREADS, arguments)


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
def _general_plan(
    window: Window, side: str, shape: tuple[int, int], itemsize: int, channels_last: bool, most: int, below: int
) -> Plan:
    index64 = _reach(window, shape[1] if channels_last else 1) >= below
    vectors = channels_last and shape[1] % (16 // itemsize) == 0
    width = 16 // itemsize if vectors and not index64 and window.taps <= most else 1
    units = window.output_shape if side == "output" else window.input_shape
    arguments = {"Width": str(width), "Index": "long long" if index64 else "int"}
    return Plan(window, units, shape, width, channels_last, arguments)


def plan_for(array: Array, window: Window, side: str, channels_last: bool, most_in_vectors: int = 256) -> Plan:
    """The plan of a general template, for an array of inputs or outputs.

    Parameters
    ----------
    array : array
    window : Window
    side : {"output", "input"}
        What a thread has one of at a time.
    channels_last : bool
    most_in_vectors : int
        Taps up to which a thread has a vector of channels: those that one byte numbers, where they are saved.
    """
    shape = _samples_and_channels(array, channels_last)
    return _general_plan(
        window, side, shape, array.dtype.itemsize, channels_last, most_in_vectors, limits().index32_below
    )


def _samples_and_channels(array: Array, channels_last: bool) -> tuple[int, int]:
    # The spatial sizes are the window's.
    return array.shape[0], array.shape[-1 if channels_last else 1]


# Kernel, stride and padding of height and width that tiled kernels know when compiled.
TileWindow = tuple[int, int, int]
# Of tiled kernels: a window, and whether it is deep (as ``_tile_arguments`` has it).
Tiles = tuple[tuple[TileWindow, bool], ...]
#: Windows side by side; those two apart, and deep only where they are side by side; all.
SIDE_BY_SIDE: Tiles = (((2, 2, 0), True),)
TWO_APART: Tiles = (*SIDE_BY_SIDE, ((3, 2, 1), False))
SMALL_TILES: Tiles = (*TWO_APART, ((3, 2, 1), True), ((3, 1, 1), False), ((3, 1, 1), True))
#: Those of spatial pyramids besides, over planes.
ALL_TILES: Tiles = (*SMALL_TILES, ((5, 1, 2), False))
_TILES = {window for window, _ in ALL_TILES}
# Outputs of a row that a thread has at most: ``kColumns`` of ``pool_tile.cuh``.
_MOST_COLUMNS = 4
_TILED_ELEMENTS = ("__half", "__nv_bfloat16", "float")
# Rows that a thread walks along, the more the better as long as there are threads enough. Of wide windows, which
# share four rows with the strip beside, more are worth while.
_STRIPS = (8, 4, 2)
_LONG_STRIPS = (20, 16, 12, *_STRIPS)


def _tile_arguments(window: TileWindow, channels_last: bool, deep: bool) -> dict[str, str]:
    kernel, stride, pad = map(str, window)
    # Windows side by side share no rows: one kernel is for all depths.
    flags = {"ChannelsLast": channels_last, "Deep": deep or window[0] == window[1]}
    return {"Kernel": kernel, "Stride": stride, "Pad": pad, **{name: str(flag).lower() for name, flag in flags.items()}}


def _deep(window: Window, side: str) -> bool:
    """Whether a window has several taps along depth, or an input several windows."""
    if window.rank < 3 or window.kernel[0] == 1:
        return False
    return side == "output" or window.stride[0] < window.dilation[0] * (window.kernel[0] - 1) + 1


def _begins_inside(window: Window) -> bool:
    """Whether no window is beyond the last element of an axis."""
    return all(
        (outputs - 1) * stride - before < size
        for size, outputs, stride, before in zip(
            window.input_shape, window.output_shape, window.stride, window.pad_before, strict=True
        )
    )


def _strip(rows: int, columns: int, strips: Sequence[int], threads: int) -> int:
    """Rows of a strip: as many as leave strips for so many threads. All strips of a column are about equal."""
    most = next((n for n in strips if columns * -(-rows // n) >= threads), 1)
    return -(-rows // -(-rows // most))


@lru_cache(maxsize=1024)
def _tiled_plan(
    window: Window, side: str, shape: tuple[int, int], itemsize: int, channels_last: bool, below: int, full_grid: int
) -> tuple[Plan, int] | None:
    """The plan, and rows of tiles that a thread walks along."""
    # Height and width; one axis has no height.
    plane = slice(-2, None) if window.rank > 1 else slice(-1, None)
    known = {
        (kernel, stride, pad, dilation)
        for kernel, stride, pad, dilation in zip(
            window.kernel[plane], window.stride[plane], window.pad_before[plane], window.dilation[plane], strict=True
        )
    }
    kernel, stride, pad, dilation = known.pop()
    if known or dilation > 1 or (kernel, stride, pad) not in _TILES or window.adaptive or window.taps >= _RECIPROCALS:
        return None
    deep = _deep(window, side)
    if (side == "input" and kernel == stride and deep) or not _begins_inside(window):
        return None
    vector, per_position = 16 // itemsize, shape[1] if channels_last else 1
    if _reach(window, per_position) >= below or (channels_last and per_position % vector):
        return None
    sizes = window.output_shape if side == "output" else window.input_shape
    depth, height, width = (1,) * (3 - window.rank) + sizes
    columns = 1 if channels_last else min(vector // stride, _MOST_COLUMNS)
    # A block of inputs is as many rows and columns as its windows are apart.
    apart = 1 if side == "output" else stride
    rows, tiles = -(-height // apart), -(-width // (apart * columns))
    images = shape[0] * (per_position // vector if channels_last else shape[1])
    strips = _LONG_STRIPS if kernel > 3 else _STRIPS
    strip = _strip(rows, images * depth * tiles, strips, full_grid * THREADS)
    units = (depth, -(-rows // strip), tiles)
    arguments = _tile_arguments((kernel, stride, pad), channels_last, deep)
    return Plan(window, units, shape, vector if channels_last else 1, channels_last, arguments), strip


# Wide windows, 1 apart, whose gradients are scattered: ``WideTile`` of ``max_pool_wide.cu``.
_WIDE = (5,)
_WIDE_THREADS, _WIDE_COLUMNS = 128, 8


@lru_cache(maxsize=1024)
def _wide_plan(
    window: Window, shape: tuple[int, int], channels_last: bool, below: int, full_grid: int
) -> tuple[Plan, int] | None:
    """The plan, and rows of inputs that a thread walks along."""
    if window.rank != 2 or window.adaptive or {*window.stride, *window.dilation} != {1}:
        return None
    kernel = window.kernel[0]
    if set(window.kernel) != {kernel} or kernel not in _WIDE or window.input_shape != window.output_shape:
        return None
    if set(window.pad_before) != {kernel // 2} or _reach(window, shape[1] if channels_last else 1) >= below:
        return None
    height, width = window.input_shape
    tiles = -(-width // _WIDE_COLUMNS)
    images = shape[0] * shape[1]
    strip = _strip(height, images * tiles, _LONG_STRIPS, full_grid * _WIDE_THREADS)
    return Plan(window, (1, -(-height // strip), tiles), shape, 1, channels_last, {}), strip


class WideKernels:
    """A kernel for the gradients of wide windows over planes, by type, window and layout."""

    def __init__(self, source: str, function: str) -> None:
        instantiations = combinations(T=_TILED_ELEMENTS, Kernel=tuple(map(str, _WIDE)), ChannelsLast=("false", "true"))
        self._template = KernelTemplate(source, function, instantiations, STRUCTS)

    def run(self, array: Array, window: Window, channels_last: bool, arguments: Arguments) -> bool:
        """Launch it for an array of gradients, if it is for them."""
        shape, in_force = _samples_and_channels(array, channels_last), limits()
        planned = _wide_plan(window, shape, channels_last, in_force.index32_below, in_force.full_grid)
        if planned is None:
            return False
        plan, strip = planned
        layout = str(channels_last).lower()
        kernel = self._template.get(T=element_type(array), Kernel=str(window.kernel[0]), ChannelsLast=layout)
        if kernel is None:
            return False
        if plan.units:
            blocks = blocks_for(plan.units, _WIDE_THREADS)
            launch(kernel, blocks, _WIDE_THREADS, (*arguments, strip, plan.struct))
        return True


def apart(window: Window, lengths: Array | None) -> bool:
    """Whether no input is in two windows, as kernels know that scatter gradients."""
    if window.adaptive or lengths is not None or not _begins_inside(window):
        return False
    taps = zip(window.kernel, window.stride, window.dilation, strict=True)
    return all(kernel == 1 or (dilation == 1 and kernel <= stride) for kernel, stride, dilation in taps)


@dataclass(frozen=True)
class TiledLaunch:
    """A tiled kernel, and how it is launched.

    Attributes
    ----------
    kernel : Kernel
    plan : Plan
    strip : int
        Rows of tiles that a thread walks along.
    """

    kernel: Kernel
    plan: Plan
    strip: int

    def run(self, arguments: Arguments, more: Arguments = ()) -> None:
        """Launch it, with these arguments before the strip and the window, and more after them."""
        self.plan.run(self.kernel, (*arguments, self.strip, self.plan.struct, *more))


class TiledKernels:
    """A kernel for common windows and types, by tiles.

    Parameters
    ----------
    source, function : str
        As of :class:`KernelTemplate`.
    windows : tuple
        Windows that it is for.
    elements : sequence of str
        C++ types.
    sums_alike : bool
        Whether its results have the bits of the general kernels'. Otherwise it is chosen by the sizes alone.
    """

    def __init__(
        self,
        source: str,
        function: str,
        windows: Tiles = SMALL_TILES,
        elements: Sequence[str] = _TILED_ELEMENTS,
        *,
        sums_alike: bool = True,
    ) -> None:
        self._sums_alike = sums_alike
        instantiations = [
            {"T": element, **_tile_arguments(window, last, deep)}
            for element in elements
            for window, deep in windows
            for last in (False, True)
        ]
        self._template = KernelTemplate(source, function, instantiations, STRUCTS)

    def launch_for(
        self, array: Array, window: Window, side: str, channels_last: bool, lengths: Array | None = None
    ) -> TiledLaunch | None:
        """How it is launched for an array; None if the general kernels are to be taken.

        Parameters
        ----------
        array : array
        window : Window
        side : {"output", "input"}
            What a thread has tiles of.
        channels_last : bool
        lengths : array or None
        """
        if lengths is not None:
            return None
        shape, in_force = _samples_and_channels(array, channels_last), limits()
        below = (in_force if self._sums_alike else OF_A_GPU).index32_below
        planned = _tiled_plan(window, side, shape, array.dtype.itemsize, channels_last, below, in_force.full_grid)
        if planned is None:
            return None
        plan, strip = planned
        kernel = self._template.get(T=element_type(array), **plan.template_arguments)
        return None if kernel is None else TiledLaunch(kernel, plan, strip)


# Windows over an element, along all axes, up to which a kernel adds their shares without compensation: ``kFew`` of
# ``avg_pool.cu``.
_FEW = 128


def nchw_template(source: str, function: str) -> KernelTemplate:
    """A kernel for arrays in NCHW, by element type."""
    return KernelTemplate(source, function, combinations(T=ELEMENT_TYPES), {**STRUCTS, "Divisor64": DIVISOR})


def adaptive_template(function: str) -> KernelTemplate:
    """A kernel for adaptive windows, by element type and layout."""
    instantiations = combinations(T=ELEMENT_TYPES, ChannelsLast=("false", "true"))
    return KernelTemplate("adaptive_pool.cu", function, instantiations, STRUCTS)


# Taps from which on sums are compensated, so that their order is free.
_LARGE = 129


@dataclass(frozen=True)
class AdaptivePlan:
    """How a kernel for adaptive windows is launched.

    Attributes
    ----------
    plan : Plan
    blocks : int
    lanes : int
        Vectors of channels that a block has side by side; 0 for planes.
    channels_last : str
        As template arguments have it.
    """

    plan: Plan
    blocks: int
    lanes: int
    channels_last: str

    def run(self, template: KernelTemplate, array: Array, before: Arguments, after: Arguments = ()) -> None:
        """Launch the instantiation for an array's type, with these arguments before and after the window."""
        if self.plan.units:
            kernel = template(T=element_type(array), ChannelsLast=self.channels_last)
            launch(kernel, self.blocks, THREADS, (*before, self.plan.struct, *after))


def adaptive_forward_plan(
    array: Array, window: Window, channels_last: bool, lengths: Array | None
) -> AdaptivePlan | None:
    """The plan of a forward by large adaptive windows; None if the general kernels are to be taken."""
    if not window.adaptive or lengths is not None or window.taps < _LARGE:
        return None
    shape = _samples_and_channels(array, channels_last)
    return _adaptive_forward_plan(window, shape, array.dtype.itemsize, channels_last, limits().max_blocks)


@lru_cache(maxsize=1024)
def _adaptive_forward_plan(
    window: Window, shape: tuple[int, int], itemsize: int, channels_last: bool, max_blocks: int
) -> AdaptivePlan | None:
    width, columns = 16 // itemsize, window.input_shape[-1]
    # Chosen by the sizes alone: the general kernels add in another order.
    if _reach(window, shape[1] if channels_last else 1) >= OF_A_GPU.index32_below or window.taps >= 2**31:
        return None
    if channels_last:
        if shape[1] % width:
            return None
        groups = shape[1] // width
        lanes = min(1 << (groups - 1).bit_length(), 32)
        plan = Plan(window, window.output_shape, shape, width, True, {})
        blocks = shape[0] * math.prod(window.output_shape) * -(-groups // lanes)
        # A block for each, which is no walk over a grid.
        return AdaptivePlan(plan, blocks, lanes, "true") if blocks <= OF_A_GPU.max_blocks else None
    vectors = columns if columns % width else columns // width
    if vectors > THREADS:
        return None
    plan = Plan(window, (*window.output_shape[:-1], vectors), shape, 1, False, {})
    return AdaptivePlan(plan, blocks_for(plan.units // vectors, THREADS // vectors), 0, "false")


def adaptive_backward_plan(
    array: Array, window: Window, channels_last: bool, lengths: Array | None
) -> AdaptivePlan | None:
    """The plan of a backward by adaptive windows; None if the general kernels are to be taken.

    Those are for channels that are no whole vectors, and for many windows over an element.
    """
    width = 16 // array.dtype.itemsize
    few = math.prod(map(min, window.kernel, window.output_shape)) <= _FEW
    shape = _samples_and_channels(array, channels_last)
    if not window.adaptive or lengths is not None or (channels_last and shape[1] % width) or not few:
        return None
    if _reach(window, shape[1] if channels_last else 1) >= limits().index32_below:
        return None
    columns = window.input_shape[-1] if channels_last else -(-window.input_shape[-1] // width)
    # Rows of inputs are those of windows; one axis has one row.
    lead = (1,) * (3 - window.rank)
    depth, rows = (*lead, *window.input_shape)[0], (*lead, *window.output_shape)[1]
    plan = Plan(window, (depth, rows, columns), shape, width if channels_last else 1, channels_last, {})
    return AdaptivePlan(plan, blocks_for(plan.units, THREADS), 0, str(channels_last).lower())


def spatial_shape(array: Array, spatial: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """The shape of an array with other spatial sizes."""
    lead, channels = array.shape[0], array.shape[-1] if channels_last else array.shape[1]
    return (lead, *spatial, channels) if channels_last else (lead, channels, *spatial)


def spatial_empty(array: Array, spatial: tuple[int, ...], channels_last: bool, dtype: DTypeLike | None = None) -> Array:
    """An uninitialised array on the device of another one, with other spatial sizes."""
    shape = spatial_shape(array, spatial, channels_last)
    return empty(shape, array.dtype if dtype is None else dtype, array)


def spatial_result(out: Array | None, array: Array, spatial: tuple[int, ...], channels_last: bool) -> Array:
    """Where kernels write a result with other spatial sizes: ``out``, if they can."""
    return result_like(out, spatial_shape(array, spatial, channels_last), array)


def divisor_struct(
    window: Window, element: str, count_include_pad: bool, divisor_override: int | None, lengths: Array | None
) -> np.ndarray:
    """``PoolDivisor`` of ``pool_divisor.cuh``."""
    return _divisor_struct(window, element, count_include_pad, divisor_override, lengths is not None)


@lru_cache(maxsize=1024)
def _divisor_struct(
    window: Window, element: str, count_include_pad: bool, divisor_override: int | None, has_lengths: bool
) -> np.ndarray:
    struct = np.zeros((), _pool_divisor(accumulate_name(element)))
    # Whether some window has another divisor than most.
    counts_padding = count_include_pad and not has_lengths
    varies = window.adaptive or has_lengths or (any(window.pad_before) and not counts_padding)
    for axis, size in enumerate(window.input_shape):
        extent = window.pad_before[axis] + size + (window.pad_after[axis] if counts_padding else 0)
        reach = (window.output_shape[axis] - 1) * window.stride[axis]
        reach += window.dilation[axis] * (window.kernel[axis] - 1) + 1
        varies = varies or reach > extent
    struct["reciprocal"] = 1 / (window.taps if divisor_override is None else divisor_override)
    struct["reciprocals"] = 1 / np.maximum(np.arange(_RECIPROCALS), 1)
    # More taps than the field holds are never the window's own number: such divisors are counted, and divided by.
    whole = window.taps if window.taps < 2**31 else -1
    struct["count"] = whole if divisor_override is None and varies else 0
    struct["padding_counts"] = count_include_pad
    struct["pad_after"] = (0,) * (3 - window.rank) + window.pad_after
    return struct
