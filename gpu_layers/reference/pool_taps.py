"""Which outputs of a pooling use which inputs: what the NumPy poolings share.

They loop over the taps of the window, never over outputs. For each tap of a sliding window, all outputs at once are
one strided view of the input, which is never padded. Adaptive windows, where some have a tap more than others, are
index arrays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gpu_layers.core.array import Array, DTypeLike
from gpu_layers.core.window import Window


def spatial_axes(rank: int, channels_last: bool) -> slice:
    """The positions of the spatial axes of a batched array."""
    return slice(1, 1 + rank) if channels_last else slice(2, 2 + rank)


def with_spatial(shape: tuple[int, ...], spatial: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """A shape with other spatial sizes."""
    axes = spatial_axes(len(spatial), channels_last)
    return shape[: axes.start] + tuple(spatial) + shape[axes.stop :]


class Step(NamedTuple):
    """One tap of every window that has it, or one window over every input that has one.

    Attributes
    ----------
    row : tuple of int
        The same for steps that follow one another along the last axis.
    tap : int or ndarray
        Number of the tap.
    outputs, inputs : tuple
        Which outputs and inputs it is of: indices of the same extent.
    """

    row: tuple[int, ...]
    tap: Array
    outputs: tuple
    inputs: tuple


def window_taps(window: Window, channels_last: bool) -> Iterator[Step]:
    """For each tap that touches the input: which outputs use it, and which inputs they read.

    The two are index tuples into the output and the input, of the same extent. Inputs may repeat only where adaptive
    windows are more than the inputs: use them to read, and :func:`covering_windows` to write.
    """
    lead = (slice(None),) * (1 if channels_last else 2)
    for position in itertools.product(*(_touching_taps(window, axis) for axis in range(window.rank))):
        outputs, inputs = zip(*(_along(window, axis, k) for axis, k in enumerate(position)), strict=True)
        if not any(index is None for index in outputs):
            tap = 0
            for size, k in zip(window.kernel, position, strict=True):
                tap = tap * size + k
            yield Step(position[:-1], tap, (*lead, *_mesh(outputs)), (*lead, *_mesh(inputs)))


# So many taps of an axis are tried, which costs less than to find those that touch the input.
_FEW_TAPS = 1024


def _touching_taps(window: Window, axis: int) -> list[int]:
    """Numbers of the taps along an axis that may be inside the input: a few, however large the window is."""
    if window.adaptive or window.kernel[axis] <= _FEW_TAPS:
        return list(range(window.kernel[axis]))
    size, dilation = window.input_shape[axis], window.dilation[axis]
    # From each window's first tap that is not before the input to its last that is not after it.
    origins = window.origins(axis)
    first = np.maximum(-(origins // dilation), 0)
    last = np.minimum((size - 1 - origins) // dilation, window.kernel[axis] - 1)
    taps: list[int] = []
    # The last window's come first.
    for low, high in zip(first[::-1].tolist(), last[::-1].tolist(), strict=True):
        begin = max(low, taps[-1] + 1) if taps else low
        taps.extend(range(begin, high + 1))
    return taps


def window_inputs(window: Window, output: tuple[int, ...]) -> tuple[slice, ...]:
    """Inputs that the window at an output position has, along each axis."""
    inside = []
    for axis, at in enumerate(output):
        origin, taps = int(window.origins(axis)[at]), int(window.tap_counts(axis)[at])
        dilation = window.dilation[axis]
        begin = max(-(origin // dilation), 0)
        end = min(taps, (window.input_shape[axis] - 1 - origin) // dilation + 1)
        inside.append(slice(origin + begin * dilation, max(origin + (end - 1) * dilation + 1, 0), dilation))
    return tuple(inside)


def _along(window: Window, axis: int, k: int) -> tuple[Array, Array]:
    """Outputs along an axis whose tap k is inside the input, and where; None if there is none."""
    if window.adaptive:
        outputs = np.flatnonzero(window.tap_counts(axis) > k)
        return (outputs, window.origins(axis)[outputs] + k) if outputs.size else (None, None)
    stride, size = window.stride[axis], window.input_shape[axis]
    first = k * window.dilation[axis] - window.pad_before[axis]
    begin = max(0, -(first // stride))  # the first window whose tap is not in the leading padding
    end = min(window.output_shape[axis], (size - 1 - first) // stride + 1)
    if end <= begin:
        return None, None
    low = first + begin * stride
    return slice(begin, end), slice(low, low + (end - begin - 1) * stride + 1, stride)


def _mesh(indices: tuple) -> tuple:
    return np.ix_(*indices) if isinstance(indices[0], np.ndarray) else indices


def covering_windows(window: Window, channels_last: bool) -> Iterator[Step]:
    """As :func:`window_taps`, with no input twice in a step: to add up gradients.

    For adaptive windows a step is the i-th last window over every input, and the tap is an array; an input meets its
    taps in ascending order either way.
    """
    if not window.adaptive:
        yield from window_taps(window, channels_last)
        return
    first, last = zip(*(_covering(window, axis) for axis in range(window.rank)), strict=True)
    most = [int((b - a).max(initial=-1)) + 1 for a, b in zip(first, last, strict=True)]
    lead = (slice(None),) * (1 if channels_last else 2)
    for back in itertools.product(*(range(count) for count in most)):
        inputs = [np.flatnonzero(b - i >= a) for i, a, b in zip(back, first, last, strict=True)]
        outputs = [b[at] - i for i, at, b in zip(back, inputs, last, strict=True)]
        tap = np.zeros((1,) * window.rank, np.int64)
        for axis, (at, output) in enumerate(zip(inputs, outputs, strict=True)):
            step = along(at - window.origins(axis)[output], axis, window.rank)
            tap = tap * window.kernel[axis] + step
        tap = tap[..., None] if channels_last else tap
        yield Step(back[:-1], tap, (*lead, *np.ix_(*outputs)), (*lead, *np.ix_(*inputs)))


def _covering(window: Window, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last adaptive window over each input along an axis."""
    size, outputs = window.input_shape[axis], window.output_shape[axis]
    at = np.arange(size, dtype=np.int64)
    return at * outputs // size, -(-(at + 1) * outputs // size) - 1


class CompensatedSum:
    """Sums, with separate sums of their rounding errors (Knuth, TAOCP 2, 4.2.2, theorem B).

    Parameters
    ----------
    shape : tuple of int
    dtype : dtype
        What is summed in.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._sum, self._lost = np.zeros(shape, dtype), np.zeros(shape, dtype)

    def add(self, outputs: tuple, values: np.ndarray) -> None:
        """Add values to some of the sums."""
        before, values = self._sum[outputs], values.astype(self._sum.dtype)
        total = before + values
        added = total - before
        self._lost[outputs] += (before - (total - added)) + (values - added)
        self._sum[outputs] = total

    def value(self) -> np.ndarray:
        """The sums. If a sum is not finite, its errors are not numbers."""
        return np.where(np.isfinite(self._sum), self._sum + self._lost, self._sum)


def along(values: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """Values along one spatial axis, shaped to broadcast against the others; leading axes stay in front."""
    lead = values.shape[:-1]
    return values.reshape(*lead, *(values.shape[-1] if other == axis else 1 for other in range(rank)))


def inside_lengths(lengths: np.ndarray | None, window: Window, channels_last: bool) -> np.ndarray | None:
    """Which inputs are within their sample's lengths, as a mask that broadcasts against the input; None for all."""
    if lengths is None:
        return None
    mask = np.ones((len(lengths),) + (1,) * window.rank, bool)
    for axis, size in enumerate(window.input_shape):
        mask = mask & along(np.arange(size) < lengths[:, axis, None], axis, window.rank)
    return mask[..., None] if channels_last else mask[:, None]


def masked(values: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The values where a mask holds, else +0."""
    return values if mask is None else np.where(mask, values, values.dtype.type(0))


# A part of a batch has so many elements at most, if it is more than one sample, and more where there would be too many.
_PART, _MOST_PARTS = 2**19, 16


def by_samples(compute: Callable[..., object], arrays: tuple[Array, ...], lengths: Array | None, elements: int) -> Any:
    """``compute(*arrays, lengths)`` for some samples at a time, so that its temporary memory is small.

    Parameters
    ----------
    compute : callable
        Takes parts of the arrays and of the lengths; gives an array, or a tuple of them, with as many samples.
    arrays : tuple of ndarray or None
    lengths : ndarray or None
    elements : int
        What it works on, a sample.
    """
    samples = arrays[0].shape[0]
    step = max(_PART // max(elements, 1), samples // _MOST_PARTS, 1)
    if samples <= step:
        return compute(*arrays, lengths)
    results: list[np.ndarray] = []
    for first in range(0, samples, step):
        part = slice(first, first + step)
        found = compute(*(None if array is None else array[part] for array in (*arrays, lengths)))
        pieces = found if isinstance(found, tuple) else (found,)
        results = results or [np.empty((samples, *piece.shape[1:]), piece.dtype) for piece in pieces]
        for result, piece in zip(results, pieces, strict=True):
            result[part] = piece
    return tuple(results) if len(results) > 1 else results[0]


def planes_of(values: np.ndarray, channels_last: bool) -> np.ndarray:
    """As (N, C, all places): a view, if there is one."""
    if channels_last:
        return values.reshape(len(values), math.prod(values.shape[1:-1]), values.shape[-1]).swapaxes(1, 2)
    return values.reshape(*values.shape[:2], math.prod(values.shape[2:]))


def select(array: np.ndarray | None, index: tuple, shape: tuple[int, ...]) -> Any:
    """A part of a mask that broadcasts against ``shape``; True without a mask."""
    return True if array is None else np.broadcast_to(array, shape)[index]


def divisors(
    window: Window,
    count_include_pad: bool,
    divisor_override: int | None,
    channels_last: bool,
    dtype: np.dtype,
    lengths: np.ndarray | None = None,
) -> np.ndarray:
    """Divisor of each window's sum, broadcastable against the output."""
    if divisor_override is not None:
        return np.asarray(divisor_override, dtype)
    counts = [
        along(
            window.divisor_counts(axis, count_include_pad, None if lengths is None else lengths[:, axis]),
            axis,
            window.rank,
        )
        for axis in range(window.rank)
    ]
    # A window of nothing but padding sums to 0: any divisor but 0 leaves it 0.
    product = np.maximum(math.prod(counts), 1).astype(dtype)
    if channels_last:
        return product[..., None]
    return product if lengths is None else product[:, None]
