"""Checks of arguments, before anything is launched or written. Messages are PyTorch's where it has one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu_layers.core.activations import NAMES
from gpu_layers.core.array import Array, DTypeLike
from gpu_layers.core.checks import check_choice, check_number
from gpu_layers.runtime.kernel import FLOAT_DTYPES


def described(dtype: DTypeLike) -> str:
    """A dtype for a message; if its byte order is not the machine's, it says so and how to convert it."""
    dtype = np.dtype(dtype)
    if dtype.isnative:
        return str(dtype)
    native = dtype.newbyteorder("=")
    return f"{dtype}, {native} in the other byte order: pass x.astype({native.name!r})"


def check_dtype(x: Array, name: str = "input") -> None:
    """TypeError unless x holds float16, bfloat16, float32 or float64."""
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {described(x.dtype)}")


def check_gradient(dy: Array, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise unless dy has the shape and dtype of the output it belongs to."""
    if dy.dtype != dtype:
        raise TypeError(f"dy must have the output's dtype {np.dtype(dtype)}, got {described(dy.dtype)}")
    if dy.shape != tuple(shape):
        raise ValueError(f"dy must have the output's shape {list(shape)}, got {list(dy.shape)}")


def check_residual(residual: Array, x: Array) -> None:
    """Raise unless the residual has x's dtype and shape."""
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must have the input's dtype {x.dtype}, got {described(residual.dtype)}")
    if residual.shape != x.shape:
        raise ValueError(f"residual must have the input's shape {list(x.shape)}, got {list(residual.shape)}")


def check_probability(p: object) -> float:
    """A dropout probability as a float.

    Raises
    ------
    TypeError
        If it is not a real number.
    ValueError
        If it is outside [0, 1] or NaN.
    """
    probability = check_number(p, "dropout probability")
    if not 0 <= probability <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return probability


def check_eps(eps: object, dtype: DTypeLike) -> float:
    """Batch norm's eps, rounded to the dtype of the statistics.

    Raises
    ------
    TypeError
        If it is not a real number.
    ValueError
        Unless it is positive and finite, before and after rounding: ``2**-149`` is the smallest float32.
    """
    number = check_number(eps, "eps")
    if not 0 < number < float("inf"):
        raise ValueError(f"batch_norm eps must be positive, but got {eps}")
    statistics = np.dtype(dtype)
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(np.asarray(number).astype(statistics))
    if not 0 < rounded < float("inf"):
        raise ValueError(
            f"batch_norm eps must be a positive {statistics} number, but got {eps}, which becomes {rounded}"
        )
    return rounded


def check_overlap(out: Array) -> None:
    """ValueError for an output whose elements share memory."""
    if not out.flags.c_contiguous and overlaps_itself(out.shape, out.strides, out.dtype.itemsize):
        raise ValueError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory "
            "location. Please clone() the tensor before performing the operation (copy() in NumPy and CuPy)."
        )


def overlaps_itself(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether two elements of an array share a byte.

    Parameters
    ----------
    shape, strides : sequence of int
        Strides in bytes, of either sign.
    itemsize : int
    """
    if 0 in shape:
        return False
    axes = sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1)
    # An axis that steps beyond everything that smaller axes reach adds no overlap: true for slices of dense arrays.
    reach = [itemsize]
    for stride, size in axes:
        reach.append(reach[-1] + stride * (size - 1))
    while axes and axes[-1][0] >= reach[len(axes) - 1]:
        axes.pop()
    if not axes:
        return False
    if axes[0][0] == 0:
        return True
    # The remaining views have overlapping steps, and may still not overlap: compare the address of each element.
    places = np.zeros(1, np.int64)
    for stride, size in axes:
        places = np.add.outer(places, np.arange(size) * stride).reshape(-1)
    places.sort()
    return bool((np.diff(places) < itemsize).any())


def check_activation(activation: object) -> str:
    """The name of an activation; ValueError for an unknown one."""
    return check_choice(activation, "activation", NAMES)
