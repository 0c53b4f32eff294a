"""The comparison of what the kernels give with what the reference gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_layers.core.cuda import is_cupy_array


@dataclass(frozen=True)
class Difference:
    """How far a result is from the reference.

    Attributes
    ----------
    name : str
        Of the result.
    ratio : float
        Largest error, as a part of what is allowed: above 1 is wrong. 0 for equal bits, infinity where equality is
        demanded, or shape, dtype, NaN or infinities differ.
    message : str
        What differs, and where it is worst.
    """

    name: str
    ratio: float
    message: str


def compare(name: str, actual: Any, expected: np.ndarray, bound: Any | None) -> Difference:
    """Compare one result with the reference.

    Parameters
    ----------
    name : str
    actual : array
        NumPy or CuPy.
    expected : ndarray
    bound : array_like or None
        Absolute error allowed; None for equality of the bits (but for the payload of NaN).
    """
    actual = actual.get() if is_cupy_array(actual) else np.asarray(actual)
    expected = np.asarray(expected)
    for what, given, needed in (("shape", actual.shape, expected.shape), ("dtype", actual.dtype, expected.dtype)):
        if given != needed:
            return Difference(name, np.inf, f"{name}: {what} is {given}, must be {needed}")
    if actual.size == 0:
        return Difference(name, 0.0, "")
    ours, theirs = actual.reshape(-1), expected.reshape(-1)
    # Bits, not values: +0 and -0 differ. Only the payload of NaN is free.
    same = ours.view(f"u{ours.itemsize}") == theirs.view(f"u{theirs.itemsize}")
    same |= (ours != ours) & (theirs != theirs)
    if same.all():
        return Difference(name, 0.0, "")
    if bound is None:
        ratios = np.where(same, 0.0, np.inf)
    else:
        allowed = np.broadcast_to(np.asarray(bound, np.float64), expected.shape).reshape(-1)
        with np.errstate(all="ignore"):
            ratios = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)) / allowed
        # Not finite where one of the two is not, or where no error is allowed.
        ratios = np.where(same, 0.0, np.where(np.isfinite(ratios), ratios, np.inf))
    worst = int(np.argmax(ratios))
    where = tuple(int(i) for i in np.unravel_index(worst, expected.shape))
    wrong = int((ratios > 1).sum())
    message = f"{name}: {wrong} of {ours.size} values differ; at {where} {ours[worst]!r}, must be {theirs[worst]!r}"
    return Difference(name, float(ratios[worst]), message)
