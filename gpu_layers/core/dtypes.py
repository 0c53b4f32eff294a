"""Which dtype a dtype is computed in."""

from __future__ import annotations

from typing import Any

import numpy as np


def accumulation_dtype(dtype: Any) -> np.dtype:
    """Of sums, statistics and parameters: float64 for float64, float32 for all others."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)
