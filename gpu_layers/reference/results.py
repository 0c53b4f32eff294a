"""Results that the caller names an array for."""

from __future__ import annotations

import numpy as np


def flat_result(out: np.ndarray | None, like: np.ndarray) -> np.ndarray:
    """Where to write a result in C order: ``out``, if its elements lie so, or a new array like another."""
    return out if out is not None and out.flags.c_contiguous else np.empty(like.shape, like.dtype)


def delivered(result: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """The result, copied into ``out`` if there is one and the result does not lie there."""
    if out is None or result is out:
        return result
    out[...] = result
    return out
