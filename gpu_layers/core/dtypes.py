"""Which dtype a dtype is computed in."""

from __future__ import annotations

import numpy as np

from gpu_layers.core.array import DTypeLike


def accumulation_dtype(dtype: DTypeLike) -> np.dtype:
    """Of sums, statistics and parameters: float64 for float64, float32 for all others."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)
