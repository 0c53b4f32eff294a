"""The sliding window of a pooling layer: one description, computed once, used by all backends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

Sizes = tuple[int, ...]
#: Padding before and after, one pair for each spatial axis.
Sides = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Window:
    """The windows of a pooling over the spatial axes of one input shape.

    Attributes
    ----------
    kernel, stride, dilation : tuple of int
        One for each spatial axis. For adaptive windows, ``kernel`` is the size of the largest.
    pad_before, pad_after : tuple of int
        Padding at the start and at the end of each axis.
    input_shape, output_shape : tuple of int
        Spatial shapes.
    adaptive : bool
        Whether window i of an axis is ``floor(i L / o) .. ceil((i + 1) L / o) - 1`` instead.
    """

    kernel: Sizes
    stride: Sizes
    dilation: Sizes
    pad_before: Sizes
    pad_after: Sizes
    input_shape: Sizes
    output_shape: Sizes
    adaptive: bool = False

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        shapes = (self.kernel, self.stride, self.dilation, self.pad_before, self.pad_after)
        return hash((shapes, self.input_shape, self.output_shape, self.adaptive))

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @cached_property
    def taps(self) -> int:
        """Number of positions in the window."""
        return math.prod(self.kernel)

    @property
    def is_global(self) -> bool:
        """Whether there is a single window, which is the whole plane."""
        dense = all(k == 1 or d == 1 for k, d in zip(self.kernel, self.dilation, strict=True))
        one = set(self.output_shape) == {1} and not any(self.pad_before)
        return dense and one and self.kernel == self.input_shape

    @property
    def is_cut_off(self) -> bool:
        """Whether a sliding window reaches beyond the padded extent, which ceil mode allows."""
        return not self.adaptive and any(
            (outputs - 1) * stride + dilation * (kernel - 1) + 1 > before + size + after
            for outputs, stride, dilation, kernel, before, size, after in zip(
                self.output_shape,
                self.stride,
                self.dilation,
                self.kernel,
                self.pad_before,
                self.input_shape,
                self.pad_after,
                strict=True,
            )
        )

    def origins(self, axis: int) -> np.ndarray:
        """Position along one axis of each window's first tap; negative in the padding.

        Returns
        -------
        ndarray of int64, one for each output position
        """
        outputs = np.arange(self.output_shape[axis], dtype=np.int64)
        if self.adaptive:
            return outputs * self.input_shape[axis] // max(self.output_shape[axis], 1)
        return outputs * self.stride[axis] - self.pad_before[axis]

    def tap_counts(self, axis: int) -> np.ndarray:
        """Number of taps of each window along one axis, inside the input or not.

        Returns
        -------
        ndarray of int64, one for each output position
        """
        outputs = self.output_shape[axis]
        if not self.adaptive:
            return np.full(outputs, self.kernel[axis], np.int64)
        ends = -(-np.arange(1, outputs + 1, dtype=np.int64) * self.input_shape[axis] // max(outputs, 1))
        return ends - self.origins(axis)

    def divisor_counts(self, axis: int, count_include_pad: bool, lengths: np.ndarray | None = None) -> np.ndarray:
        """Taps of each window along one axis that count in the divisor of an average.

        Parameters
        ----------
        axis : int
            Spatial axis.
        count_include_pad : bool
            Count the taps within the padded extent, not only those within the input.
        lengths : ndarray of int64, optional
            Size of each sample along the axis; the input's by default.

        Returns
        -------
        ndarray of int64, shape (output positions,), or (samples, output positions) with lengths
        """
        size = self.input_shape[axis] if lengths is None else lengths[:, None]
        low = -self.pad_before[axis] if count_include_pad else 0
        high = size + (self.pad_after[axis] if count_include_pad else 0)
        first, taps = self.origins(axis), self.tap_counts(axis)

        def taps_before(limit: int | np.ndarray) -> np.ndarray:
            return np.clip(-((first - limit) // self.dilation[axis]), 0, taps)

        return taps_before(high) - taps_before(low)


def _output_size(size: int, kernel: int, stride: int, dilation: int, before: int, after: int, ceil: bool) -> int:
    span = size + before + after - dilation * (kernel - 1) - 1
    steps = -(-span // stride) if ceil else span // stride
    # In ceil mode the last window must start inside the input or the padding before it.
    if ceil and steps * stride >= size + before:
        steps -= 1
    return steps + 1


@lru_cache(maxsize=1024)
def sliding_window(
    kernel: Sizes,
    stride: Sizes,
    dilation: Sizes,
    pad_before: Sizes,
    pad_after: Sizes,
    ceil_mode: bool,
    input_shape: Sizes,
) -> Window:
    """Place a window over an input shape.

    Raises
    ------
    ValueError
        If no window fits.
    """
    output_shape = tuple(
        _output_size(size, k, s, d, before, after, ceil_mode)
        for size, k, s, d, before, after in zip(
            input_shape, kernel, stride, dilation, pad_before, pad_after, strict=True
        )
    )
    if min(output_shape) < 1:
        raise ValueError(
            f"Given input size: {_extent(input_shape)}. Calculated output size: {_extent(output_shape)}. "
            "Output size is too small"
        )
    return Window(kernel, stride, dilation, pad_before, pad_after, input_shape, output_shape)


@lru_cache(maxsize=1024)
def adaptive_window(output_shape: Sizes, input_shape: Sizes) -> Window:
    """The windows that reduce an input shape to an output shape of any size.

    If every output size divides the input size, they are ordinary windows, side by side.
    """
    ones, zeros = (1,) * len(input_shape), (0,) * len(input_shape)
    pairs = list(zip(input_shape, output_shape, strict=True))
    if all(outputs and size % outputs == 0 for size, outputs in pairs):
        kernel = tuple(size // outputs for size, outputs in pairs)
        return Window(kernel, kernel, ones, zeros, zeros, input_shape, output_shape)
    window = Window(ones, ones, ones, zeros, zeros, input_shape, output_shape, adaptive=True)
    kernel = tuple(int(window.tap_counts(axis).max(initial=1)) for axis in range(window.rank))
    return replace(window, kernel=kernel)


def same_padding(kernel: Sizes, stride: Sizes, dilation: Sizes, input_shape: Sizes, upper: bool) -> Sides:
    """Padding for which the output has ``ceil(input / stride)`` positions along each axis.

    Parameters
    ----------
    kernel, stride, dilation, input_shape : tuple of int
    upper : bool
        Put an odd element at the end of an axis, not at its start.

    Returns
    -------
    tuple of (before, after), one for each spatial axis
    """
    sides = []
    for k, s, d, size in zip(kernel, stride, dilation, input_shape, strict=True):
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        before = total // 2 if upper else total - total // 2
        sides.append((before, total - before))
    return tuple(sides)


def _extent(shape: Sequence[int]) -> str:
    return "(" + "x".join(str(size) for size in shape) + ")"
