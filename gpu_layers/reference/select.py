"""Choosing between values by a mask, as bits: several times as fast as ``numpy.where`` on a mask without a pattern.

No value is computed with: NaN, infinities and the sign of zero stay as they are.
"""

from __future__ import annotations

import numpy as np


def kept_values(values: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The values where a mask of their shape holds, else +0; in C order."""
    bits = _bits(values.dtype)
    return np.multiply(values.view(bits), keep, out=np.empty(values.shape, bits)).view(values.dtype)


def chosen_values(take: np.ndarray, values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """``values`` where a mask holds, else ``others``; all of one shape, both of one dtype; in C order."""
    bits = _bits(values.dtype)
    others = others.view(bits)
    # Integers wrap around.
    found = np.subtract(values.view(bits), others, out=np.empty(values.shape, bits))
    found *= take
    found += others
    return found.view(values.dtype)


def _bits(dtype: np.dtype) -> str:
    """The unsigned integers of a dtype's size."""
    return f"u{dtype.itemsize}"
