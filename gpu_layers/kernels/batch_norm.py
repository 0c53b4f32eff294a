"""Launching ``batch_norm.cu``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from gpu_layers.kernels.activation_dropout import NUMBERS
from gpu_layers.kernels.arrays import ACCUMULATE_TYPES, ELEMENT_TYPES, element_type, empty, ready, vector_width
from gpu_layers.reference.batch_norm import statistics_dtype
from gpu_layers.runtime.kernel import FLOAT_DTYPES, Kernel, KernelTemplate, c_name, combinations
from gpu_layers.runtime.launch import launch

# ``kNoActivation`` of ``activation.cuh``.
_NO_ACTIVATION = -1
# Those of ``SlopedActivation`` there.
_SLOPED = ("identity", "relu", "leaky_relu")
_THREADS = 256
_WARP = 32
# Blocks that fill any GPU twice over (132 multiprocessors of 8 blocks of 256 threads), so that it is busy
# whatever the number of channels. A constant, not the GPU's own number: the partition fixes the order of the
# sums, which must not change from GPU to GPU.
_TARGET_BLOCKS = 2112

_PLANE_LAYOUT = np.dtype(
    [
        (name, np.int64)
        for name in ("channels", "plane", "segment", "segments_per_plane", "segments", "segments_per_part", "parts")
    ],
    align=True,
)
_ROW_LAYOUT = np.dtype(
    [(name, np.int64) for name in ("rows", "channels", "tiles", "rows_per_part", "parts")], align=True
)
_STRUCTS = {"PlaneLayout": _PLANE_LAYOUT, "RowLayout": _ROW_LAYOUT}


# ``Fusion`` of ``batch_norm_rules.cuh``.
_FUSIONS = ("kPlain", "kSloped", "kCurved")


class _Pass:
    """One kernel in both layouts."""

    def __init__(self, name: str, parameters: str, fusable: bool = True) -> None:
        planes, rows = f"{parameters}, PlaneLayout layout", f"{parameters}, RowLayout layout"
        fusion: list[dict[str, str]] = [{"Fused": name} for name in _FUSIONS] if fusable else [{}]
        every = [{"T": element, **fused} for element in ELEMENT_TYPES for fused in fusion]
        each_width = [
            {"T": c_name(dtype), "Width": str(width), **fused}
            for dtype in FLOAT_DTYPES
            for width in (vector_width(dtype), 1)
            for fused in fusion
        ]
        self._planes = KernelTemplate("batch_norm.cu", f"{name}_planes", planes, every, _STRUCTS)
        self._rows = KernelTemplate("batch_norm.cu", f"{name}_rows", rows, each_width, _STRUCTS)

    def kernel(self, element: str, width: int | None, **fused: str) -> Kernel:
        """The kernel for rows, of this many channels a thread, or for planes."""
        return self._planes(T=element, **fused) if width is None else self._rows(T=element, Width=str(width), **fused)


_OF_CHANNELS = "const A* mean, const A* inv_std, const A* gamma, const A* beta, const T* residual, int activation"
_STATISTICS = _Pass(
    "batch_norm_statistics", "const T* x, A* partial_moments, A* mean, A* var, A* inv_std, A eps", fusable=False
)
_NORMALIZE = _Pass("batch_norm_normalize", f"const T* x, {_OF_CHANNELS}, T* y")
_GRADIENT_SUMS = _Pass(
    "batch_norm_gradient_sums", f"const T* dy, const T* x, {_OF_CHANNELS}, A* partial_sums, A* dgamma, A* dbeta"
)
_INPUT_GRADIENT = _Pass(
    "batch_norm_input_gradient",
    f"const T* dy, const T* x, {_OF_CHANNELS}, const A* dgamma, const A* dbeta, T* dx, T* dresidual, A inv_count",
)
_MERGE_STATISTICS = KernelTemplate(
    "batch_norm.cu",
    "batch_norm_merge_statistics",
    "const A* partial_moments, A* mean, A* var, A* inv_std, A eps, long long channels, long long parts",
    combinations(A=ACCUMULATE_TYPES),
)
_MERGE_GRADIENTS = KernelTemplate(
    "batch_norm.cu",
    "batch_norm_merge_gradients",
    "const A* partial_sums, const A* inv_std, A* dgamma, A* dbeta, long long channels, long long parts",
    combinations(A=ACCUMULATE_TYPES),
)


@dataclass(frozen=True)
class _Plan:
    """How the blocks share the values of one shape."""

    width: int | None
    blocks: int
    block: tuple[int, int]
    layout: Any
    channels: int
    parts: int
    count: int

    def run(self, of: _Pass, element: str, arguments: tuple[Any, ...], **fused: str) -> None:
        launch(of.kernel(element, self.width, **fused), self.blocks, self.block, (*arguments, self.layout))

    def merge(self, template: KernelTemplate, dtype: np.dtype, arguments: tuple[Any, ...]) -> None:
        """Merge the parts of each channel, if there are several."""
        if self.parts > 1:
            blocks = -(-self.channels // (_THREADS // _WARP))
            launch(template(A=c_name(dtype)), blocks, _THREADS, (*arguments, self.channels, self.parts))


def _power_of_two_up_to(value: float) -> int:
    return 1 << max(0, int(math.log2(max(value, 1))))


@lru_cache(maxsize=1024)
def _plan(shape: tuple[int, ...], itemsize: int, channels_last: bool) -> _Plan:
    if channels_last or len(shape) == 2:
        return _row_plan(math.prod(shape[:-1]), shape[-1], itemsize)
    return _plane_plan(shape[0], shape[1], math.prod(shape[2:]), itemsize)


def _most_parts(count: int, itemsize: int) -> int:
    """Parts of a channel whose four numbers each, written and read again, stay below 3 % of the traffic.

    A forward moves ``3 * itemsize * count`` bytes of a channel, and two times four numbers for each part.
    """
    number = 8 if itemsize == 8 else 4
    return max(1, int(0.03 * 3 * itemsize * count / (2 * 4 * number)))


def _plane_plan(batch: int, channels: int, plane: int, itemsize: int) -> _Plan:
    width = 16 // itemsize
    # Threads along a segment: enough for some six vectors each, so that the loop with several loads in flight
    # is entered and what is left over stays small.
    along = min(max(_power_of_two_up_to(plane / width / 6), 4), _THREADS)
    slots = _THREADS // along
    most_parts = min(-(-_TARGET_BLOCKS // channels), _most_parts(batch * plane, itemsize))
    # Vectors of a thread in a segment: fewer where few channels would not make enough blocks; one more than the loop
    # with several loads in flight takes at a time.
    for vectors in (16, 5):
        segment = -(-min(plane, along * width * vectors) // width) * width
        segments_per_plane = -(-plane // segment)
        segments = batch * segments_per_plane
        parts = min(most_parts, -(-segments // slots))
        if 2 * channels * parts >= _TARGET_BLOCKS:
            break
    segments_per_part = -(-segments // parts)
    parts = -(-segments // segments_per_part)
    values = (channels, plane, segment, segments_per_plane, segments, segments_per_part, parts)
    layout = np.array(values, _PLANE_LAYOUT)
    return _Plan(None, channels * parts, (along, slots), layout, channels, parts, batch * plane)


def _row_plan(rows: int, channels: int, itemsize: int) -> _Plan:
    width = 16 // itemsize
    if channels % width:
        width = 1
    vectors = channels // width
    # Threads side by side: 128 bytes of a row, or the 64 that still are whole sectors where this takes more blocks
    # to fill a GPU than there are; single channels by the warp.
    for widest in (8, 4) if width > 1 else (32,):
        along = min(_power_of_two_up_to(2 * vectors - 1), widest)
        slots = _THREADS // along
        tiles = -(-vectors // along)
        parts = min(-(-_TARGET_BLOCKS // tiles), -(-rows // slots), _most_parts(rows, itemsize))
        if 2 * tiles * parts >= _TARGET_BLOCKS:
            break
    rows_per_part = -(-rows // parts)
    parts = -(-rows // rows_per_part)
    layout = np.array((rows, channels, tiles, rows_per_part, parts), _ROW_LAYOUT)
    return _Plan(width, tiles * parts, (along, slots), layout, channels, parts, rows)


def _workspace(plan: _Plan, numbers: int, dtype: np.dtype, like: Any) -> Any | None:
    """Where the parts of each channel leave this many numbers each, if there are several."""
    return None if plan.parts == 1 else empty((plan.channels, plan.parts, numbers), dtype, like)


@dataclass(frozen=True)
class _Rule:
    """What gives y from x: the channels' numbers, and what is fused."""

    mean: Any
    inv_std: Any
    gamma: Any | None
    beta: Any | None
    residual: Any | None
    activation: str

    @property
    def arguments(self) -> tuple[Any, ...]:
        number = NUMBERS.get(self.activation, _NO_ACTIVATION)
        return self.mean, self.inv_std, self.gamma, self.beta, self.residual, number

    @property
    def fused(self) -> dict[str, str]:
        """The template argument."""
        if self.activation not in _SLOPED:
            return {"Fused": "kCurved"}
        return {"Fused": "kPlain" if self.residual is None and self.activation == "identity" else "kSloped"}


def _rule(mean: Any, inv_std: Any, gamma: Any | None, beta: Any | None, residual: Any | None, activation: str) -> _Rule:
    gamma, beta, residual = (None if array is None else ready(array) for array in (gamma, beta, residual))
    return _Rule(ready(mean), ready(inv_std), gamma, beta, residual, activation)


def batch_norm_forward(
    x: Any,
    gamma: Any | None,
    beta: Any | None,
    eps: float,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
) -> tuple[Any, Any, Any, Any]:
    """``gpu_layers.reference.batch_norm_forward``, as kernels."""
    x = ready(x)
    plan, dtype = _plan(x.shape, x.dtype.itemsize, channels_last), statistics_dtype(x.dtype)
    mean, var, inv_std = (empty((plan.channels,), dtype, x) for _ in range(3))
    results = (_workspace(plan, 4, dtype, x), mean, var, inv_std, eps)
    plan.run(_STATISTICS, element_type(x), (x, *results))
    plan.merge(_MERGE_STATISTICS, dtype, results)
    y = batch_norm_inference(x, mean, inv_std, gamma, beta, channels_last, residual, activation)
    return y, mean, var, inv_std


def batch_norm_inference(
    x: Any,
    mean: Any,
    inv_std: Any,
    gamma: Any | None,
    beta: Any | None,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
) -> Any:
    """``gpu_layers.reference.batch_norm_inference``, as a kernel."""
    return _normalized(ready(x), _rule(mean, inv_std, gamma, beta, residual, activation), channels_last)


def _normalized(x: Any, rule: _Rule, channels_last: bool) -> Any:
    plan = _plan(x.shape, x.dtype.itemsize, channels_last)
    y = empty(x.shape, x.dtype, x)
    plan.run(_NORMALIZE, element_type(x), (x, *rule.arguments, y), **rule.fused)
    return y


def batch_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    inv_std: Any,
    gamma: Any | None,
    beta: Any | None = None,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
) -> tuple[Any, Any, Any, Any | None]:
    """``gpu_layers.reference.batch_norm_backward``, as kernels."""
    dy, x, rule = ready(dy), ready(x), _rule(mean, inv_std, gamma, beta, residual, activation)
    plan = _plan(x.shape, x.dtype.itemsize, channels_last)
    dgamma, dbeta = _parameter_gradients(plan, dy, x, rule)
    dx, dresidual = _input_gradients(plan, dy, x, rule, dgamma, dbeta)
    return dx, dgamma, dbeta, dresidual


def batch_norm_inference_backward(
    dy: Any,
    x: Any,
    mean: Any,
    inv_std: Any,
    gamma: Any | None,
    beta: Any | None = None,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
) -> tuple[Any, Any, Any, Any | None]:
    """``gpu_layers.reference.batch_norm_inference_backward``, as kernels."""
    dy, x, rule = ready(dy), ready(x), _rule(mean, inv_std, gamma, beta, residual, activation)
    plan = _plan(x.shape, x.dtype.itemsize, channels_last)
    dgamma, dbeta = _parameter_gradients(plan, dy, x, rule)
    if rule.fused["Fused"] != "kPlain":
        dx, dresidual = _input_gradients(plan, dy, x, rule, None, None)
        return dx, dgamma, dbeta, dresidual
    # dx = gamma * inv_std * dy is the normalisation of dy with mean 0 and beta 0: x need not be read.
    return _normalized(dy, replace(rule, mean=None, beta=None), channels_last), dgamma, dbeta, None


def _parameter_gradients(plan: _Plan, dy: Any, x: Any, rule: _Rule) -> tuple[Any, Any]:
    dtype = statistics_dtype(x.dtype)
    dgamma, dbeta = (empty((plan.channels,), dtype, x) for _ in range(2))
    partial_sums = _workspace(plan, 2, dtype, x)
    arguments = (dy, x, *rule.arguments, partial_sums, dgamma, dbeta)
    plan.run(_GRADIENT_SUMS, element_type(x), arguments, **rule.fused)
    plan.merge(_MERGE_GRADIENTS, dtype, (partial_sums, rule.inv_std, dgamma, dbeta))
    return dgamma, dbeta


def _input_gradients(
    plan: _Plan, dy: Any, x: Any, rule: _Rule, dgamma: Any | None, dbeta: Any | None
) -> tuple[Any, Any | None]:
    dx = empty(x.shape, x.dtype, x)
    dresidual = None if rule.residual is None else empty(x.shape, x.dtype, x)
    arguments = (dy, x, *rule.arguments, dgamma, dbeta, dx, dresidual, 1 / plan.count)
    plan.run(_INPUT_GRADIENT, element_type(x), arguments, **rule.fused)
    return dx, dresidual


def summation_depth(shape: tuple[int, ...], dtype: Any, channels_last: bool) -> int:
    """Additions on the way of one value into a sum over its channel, at most: what bounds the sum's rounding error.

    A thread adds its values one after another, a block those of its threads in a tree, and the lanes of a warp the
    blocks' results in turn and then in a tree.
    """
    plan = _plan(tuple(shape), np.dtype(dtype).itemsize, channels_last)
    along, slots = plan.block
    if plan.width is None:
        layout = plan.layout
        of_a_thread = -(-int(layout["segments_per_part"]) // slots) * (-(-int(layout["segment"]) // along) + 16)
    else:
        of_a_thread = -(-int(plan.layout["rows_per_part"]) // slots)
    return of_a_thread + _THREADS.bit_length() + -(-plan.parts // _WARP) + _WARP.bit_length()


def blocks_for_shape(shape: tuple[int, ...], dtype: Any, channels_last: bool) -> int:
    """Blocks of each pass over an input of this shape."""
    return _plan(tuple(shape), np.dtype(dtype).itemsize, channels_last).blocks
