"""A case of an operation: its inputs, how it is run, and how far its results may be from the reference's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from gpu_layers.core.array import Array, DTypeLike

Arrays = dict[str, Array]


def _exactly(inputs: Arrays, expected: Arrays) -> Arrays:
    return {}


@dataclass(frozen=True)
class Case:
    """One operation on one input.

    Attributes
    ----------
    op : str
        Operation, e.g. ``dropout``.
    dtype : numpy.dtype
        Of the elements.
    label : str
        What is special about it.
    inputs : callable
        Makes the NumPy arrays that it takes, by name; always the same ones.
    run : callable
        Takes these arrays, NumPy or CuPy, and gives the results by name, by the public operations.
    bounds : callable
        Takes inputs and expected results (NumPy), and gives the absolute error allowed for each result, an array
        that broadcasts against it. A result that it leaves out must be equal to the last bit.
    """

    op: str
    dtype: np.dtype
    label: str
    inputs: Callable[[], Arrays]
    run: Callable[[Arrays], Arrays]
    bounds: Callable[[Arrays, Arrays], Arrays] = _exactly

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} {self.label}"


def epsilon(dtype: DTypeLike) -> float:
    """Distance from 1 to the next number of a dtype: twice the relative error of one rounding."""
    return float(ml_dtypes.finfo(dtype).eps)


def smallest(dtype: DTypeLike) -> float:
    """Smallest positive number of a dtype: the largest rounding error near 0."""
    return float(ml_dtypes.finfo(dtype).smallest_subnormal)
