"""Operands as kernels need them: contiguous, on a multiple of 16 bytes, where the input is."""

from __future__ import annotations

import numpy as np

from gpu_layers.core.array import Array, DTypeLike
from gpu_layers.runtime.arrays import ALIGNMENT, kind_of
from gpu_layers.runtime.kernel import FLOAT_DTYPES, c_name
from gpu_layers.runtime.program import Operand

#: C++ names of the element types, for the choices of kernel templates.
ELEMENT_TYPES = tuple(c_name(dtype) for dtype in FLOAT_DTYPES)
#: C++ names of the types that they are computed in.
ACCUMULATE_TYPES = ("float", "double")


def empty(shape: tuple[int, ...], dtype: DTypeLike, like: Array) -> Array:
    """An uninitialised C-contiguous array: in the program of an operand ``like``, or on the device of an array."""
    if isinstance(like, Operand):
        return like.program.allocate(shape, dtype)
    return kind_of(like).empty(shape, np.dtype(dtype), like)


def ready(operand: Operand) -> Operand:
    """The operand, or a copy where it is not contiguous and aligned."""
    return operand.program.ready(operand)


def ready_if_given(operand: Operand | None) -> Operand | None:
    """The same of one that may be None."""
    return None if operand is None else ready(operand)


def destination(out: Operand | None, like: Operand) -> Operand:
    """Where kernels write a result of the shape and dtype of ``like``: ``out``, if they can."""
    return result_like(out, like.shape, like)


def result_like(out: Operand | None, shape: tuple[int, ...], like: Operand) -> Operand:
    """The same, of another shape."""
    return out if out is not None and out.is_ready else empty(shape, like.dtype, like)


def delivered(result: Operand, out: Operand | None) -> Operand:
    """The result, in ``out`` if there is one: copied there, where kernels could not write to it."""
    if out is None or result.slot == out.slot:
        return result
    return result.program.deliver(result, out)


def element_type(array: Array) -> str:
    """C++ name of the array's dtype."""
    return c_name(array.dtype)


def vector_width(dtype: DTypeLike) -> int:
    """Elements of one 16-byte access: ``kVectorWidth`` of ``vector_io.cuh``."""
    return ALIGNMENT // np.dtype(dtype).itemsize
