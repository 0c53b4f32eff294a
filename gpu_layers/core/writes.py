"""Writes into memory that operations may have saved, so that a backward notices if its arrays were overwritten.

Operations save their large inputs by reference. This library writes into arrays of callers if it is told to (layers in
place, ``out=``, optimizers, loading a state). Each such write is recorded here, and a backward compares. Writes of the
caller, such as ``x += 1``, cannot be seen.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import is_cupy_array


class _Writes:
    """The last write into each range of memory, oldest first; dropped when the memory is freed."""

    def __init__(self) -> None:
        self.count = 0
        self.ranges: dict[tuple[int, int], tuple[int, Any]] = {}
        # Reentrant: freeing an array while the lock is held calls back.
        self.lock = threading.RLock()


_writes = _Writes()


def write_count() -> int:
    """Number of writes recorded so far; a forward keeps it as the time at which it saved its arrays."""
    return _writes.count


def record_write(array: Array) -> None:
    """Record that an array of a caller has been written to."""
    if not array.size:
        return
    place = _addresses(array)

    def forget(reference: object) -> None:
        with _writes.lock:
            if _writes.ranges.get(place, (0, None))[1] is reference:
                del _writes.ranges[place]

    reference = weakref.ref(_owner(array), forget)
    with _writes.lock:
        _writes.count += 1
        # Removed first, so that it becomes the last.
        _writes.ranges.pop(place, None)
        _writes.ranges[place] = (_writes.count, reference)


def check_unwritten(since: int, **arrays: Array) -> None:
    """Raise if one of these arrays has been written to since a forward saved it.

    Parameters
    ----------
    since : int
        :func:`write_count` when they were saved.
    **arrays
        The arrays by name; None is skipped.

    Raises
    ------
    RuntimeError
        With PyTorch's words, the name and the shape.
    """
    if since == _writes.count:
        return
    with _writes.lock:
        later = []
        for place, (number, _) in reversed(_writes.ranges.items()):
            if number <= since:
                break
            later.append(place)
    for name, array in arrays.items():
        if array is None or not array.size:
            continue
        begin, end = _addresses(array)
        if any(first < end and begin < last for first, last in later):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{name}, of shape {list(array.shape)}, was written to after the forward that saved it. Run that "
                "forward again, or write elsewhere (inplace=False, another out)"
            )


def _addresses(array: Array) -> tuple[int, int]:
    """Addresses of the first byte of its elements and after the last. The CPU and all GPUs share one address space."""
    first = array.data.ptr if is_cupy_array(array) else array.__array_interface__["data"][0]
    last = first + array.dtype.itemsize
    for size, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            first += stride * (size - 1)
        else:
            last += stride * (size - 1)
    return first, last


def _owner(array: Array) -> Any:
    """The array that owns the memory."""
    while isinstance(array.base, np.ndarray) or is_cupy_array(array.base):
        array = array.base
    return array
