"""The sliding window of a pooling layer: one description, computed once, used by every floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """A window sliding over the spatial axes of one input shape.

    Attributes
    ----------
    kernel, stride, dilation : tuple of int
        One a spatial axis.
    pad_before, pad_after : tuple of int
        Padding at the start and at the end of each axis.
    input_shape, output_shape : tuple of int
        Spatial shapes.
    """

    kernel: Sizes
    stride: Sizes
    dilation: Sizes
    pad_before: Sizes
    pad_after: Sizes
    input_shape: Sizes
    output_shape: Sizes

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @cached_property
    def taps(self) -> int:
        """Number of positions in the window."""
        return math.prod(self.kernel)

    @cached_property
    def overlaps(self) -> bool:
        """Whether an input element may belong to several windows."""
        return any(
            stride < dilation * (kernel - 1) + 1
            for kernel, stride, dilation in zip(self.kernel, self.stride, self.dilation, strict=True)
        )

    def divisor_counts(self, axis: int, count_include_pad: bool) -> np.ndarray:
        """Taps of each window along one axis that count in the divisor of an average.

        Parameters
        ----------
        axis : int
            Spatial axis.
        count_include_pad : bool
            Count the taps within the padded extent, not only those within the input.

        Returns
        -------
        ndarray of int64, one an output position
        """
        low = -self.pad_before[axis] if count_include_pad else 0
        high = self.input_shape[axis] + (self.pad_after[axis] if count_include_pad else 0)
        first = np.arange(self.output_shape[axis], dtype=np.int64) * self.stride[axis] - self.pad_before[axis]

        def taps_before(limit: int) -> np.ndarray:
            return np.clip(-((first - limit) // self.dilation[axis]), 0, self.kernel[axis])

        return taps_before(high) - taps_before(low)


def _output_size(size: int, kernel: int, stride: int, dilation: int, before: int, after: int, ceil: bool) -> int:
    span = size + before + after - dilation * (kernel - 1) - 1
    steps = -(-span // stride) if ceil else span // stride
    # In ceil mode the last window must start inside the input or the padding in front of it.
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


def _extent(shape: Sequence[int]) -> str:
    return "(" + "x".join(str(size) for size in shape) + ")"
