"""The windows of a fractional max pooling: what every floor makes the same windows from."""

from __future__ import annotations

import math
from typing import NamedTuple


class FractionalWindow(NamedTuple):
    """Windows of one size over three spatial axes of one input shape; where they start is drawn for each plane.

    Two axes have a depth of 1 before them.

    Attributes
    ----------
    kernel, input_shape, output_shape : tuple of three int
    samples : int
        Numbers that a plane's windows are drawn by: 2 or 3.
    """

    kernel: tuple[int, int, int]
    input_shape: tuple[int, int, int]
    output_shape: tuple[int, int, int]
    samples: int

    @property
    def spatial_input(self) -> tuple[int, ...]:
        """Without the depth of two axes."""
        return self.input_shape[-self.samples :]

    @property
    def spatial_output(self) -> tuple[int, ...]:
        """Without the depth of two axes."""
        return self.output_shape[-self.samples :]

    @property
    def taps(self) -> int:
        """Number of positions in the window."""
        return math.prod(self.kernel)

    @property
    def sample_of(self) -> tuple[int, int, int]:
        """Which of a plane's samples is of each axis: of two the first is that of the width, as in PyTorch."""
        return (0, 1, 0) if self.samples == 2 else (0, 1, 2)
