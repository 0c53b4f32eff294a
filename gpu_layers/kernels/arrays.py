"""Arrays as kernels need them: contiguous, on a multiple of 16 bytes, where the input is."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_layers.runtime.cuda import array_module, is_cupy_array
from gpu_layers.runtime.kernel import FLOAT_DTYPES, c_name

#: Bytes of the widest access, and so the alignment of every array.
ALIGNMENT = 16

#: C++ names of the element types, for the choices of kernel templates.
ELEMENT_TYPES = tuple(c_name(dtype) for dtype in FLOAT_DTYPES)
#: C++ names of the types that they are computed in.
ACCUMULATE_TYPES = ("float", "double")


def empty(shape: Any, dtype: Any, like: Any) -> Any:
    """An uninitialised C-contiguous array beside ``like``: in NumPy, or on its GPU."""
    dtype = np.dtype(dtype)
    if is_cupy_array(like):
        with like.device:
            return array_module(like).empty(shape, dtype)
    # NumPy takes its memory from malloc, which aligns to 16 bytes wherever the emulator runs.
    return np.empty(shape, dtype)


def _address(array: Any) -> int:
    return array.data.ptr if is_cupy_array(array) else array.__array_interface__["data"][0]


def is_ready(array: Any) -> bool:
    """Whether kernels can use the array as it is."""
    return array.flags.c_contiguous and _address(array) % ALIGNMENT == 0


def ready(array: Any) -> Any:
    """The array, or a copy where it is not contiguous and aligned."""
    if is_ready(array):
        return array
    copy = empty(array.shape, array.dtype, array)
    copy[...] = array
    return copy


def destination(out: Any | None, like: Any) -> Any:
    """Where kernels write a result of the shape and dtype of ``like``: ``out``, if they can."""
    return out if out is not None and is_ready(out) else empty(like.shape, like.dtype, like)


def delivered(result: Any, out: Any | None) -> Any:
    """The result, in ``out`` if there is one: copied there, where kernels could not write to it."""
    if out is None or result is out:
        return result
    out[...] = result
    return out


def element_type(array: Any) -> str:
    """C++ name of the array's dtype."""
    return c_name(array.dtype)


def vector_width(dtype: Any) -> int:
    """Elements of one 16-byte access: ``kVectorWidth`` of ``vector_io.cuh``."""
    return ALIGNMENT // np.dtype(dtype).itemsize
