"""What max pooling saves of each window: which of its elements was the largest."""

from __future__ import annotations

import numpy as np

from gpu_layers.core.window import Window


def argmax_dtype(window: Window) -> np.dtype:
    """Smallest unsigned dtype that numbers the taps of a window."""
    return np.min_scalar_type(window.taps - 1)
