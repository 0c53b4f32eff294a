"""Copies of arrays that may be strided or misaligned, by the array library."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import array_module, is_cupy_array, place_of


def ready_copy(xp: ModuleType, array: Array) -> Array:
    """A contiguous and aligned copy, which kernels need."""
    copy = xp.ndarray(array.shape, array.dtype)
    if xp is not np and array.flags.c_contiguous:
        # As bytes: sooner for the host than CuPy's kernels.
        copy.data.copy_from_device_async(array.data, array.nbytes)
    else:
        copy_into(xp, copy, array)
    return copy


def own_copy(array: Array) -> Array:
    """The same on the array's device."""
    with place_of(array):
        return ready_copy(array_module(array), array)


def natural(array: Array) -> Array:
    """The array, or a copy if its elements are not at their natural addresses, where CuPy's kernels fail."""
    return array if not is_cupy_array(array) or _is_natural(array) else ready_copy(array_module(array), array)


def copy_into(xp: ModuleType, target: Array, source: Array) -> None:
    """``target[...] = source``, of the same shape and dtype; ``xp`` is NumPy or CuPy."""
    if xp is not np and not (_is_natural(target) and _is_natural(source)):
        # CuPy's kernels read and write whole elements, which are misaligned here.
        target, source = _bytes_of_elements(xp, target), _bytes_of_elements(xp, source)
    target[...] = source


def overwrite(target: Array, source: Array) -> None:
    """The same, on the target's device."""
    with place_of(target):
        copy_into(array_module(target), target, source)


def _is_natural(array: Array) -> bool:
    itemsize = array.dtype.itemsize
    return array.data.ptr % itemsize == 0 and not any(stride % itemsize for stride in array.strides)


def _bytes_of_elements(xp: ModuleType, array: Array) -> Array:
    """The same memory, with the bytes of an element as the last axis."""
    itemsize = array.dtype.itemsize
    return xp.ndarray((*array.shape, itemsize), np.uint8, array.data, strides=(*array.strides, 1))
