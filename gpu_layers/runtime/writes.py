"""Writes into memory that others may have saved: so a backward notices that what it needs has been overwritten.

Operations save their large inputs by reference. This library writes into arrays of callers where it is told to (layers
in place, ``out=``, optimizers, loading a state); each such write is recorded here, and a backward compares. What a
caller writes by other means, as ``x += 1``, cannot be seen.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np

from gpu_layers.runtime.cuda import is_cupy_array


class _Writes:
    """The last write into each piece of memory, oldest first; forgotten when the memory is freed."""

    def __init__(self) -> None:
        self.count = 0
        self.ranges: dict[tuple[int, int], tuple[int, Any]] = {}
        # Reentrant: collecting an array while the lock is held calls back.
        self.lock = threading.RLock()


_writes = _Writes()


def write_count() -> int:
    """Writes recorded so far: what a forward keeps, to say when it saved its arrays."""
    return _writes.count


def record_write(array: Any) -> None:
    """Record that an array of a caller has been written to."""
    if not array.size:
        return
    place = _addresses(array)

    def forget(reference: Any) -> None:
        with _writes.lock:
            if _writes.ranges.get(place, (0, None))[1] is reference:
                del _writes.ranges[place]

    reference = weakref.ref(_owner(array), forget)
    with _writes.lock:
        _writes.count += 1
        # Taken out first, so that it becomes the last.
        _writes.ranges.pop(place, None)
        _writes.ranges[place] = (_writes.count, reference)


def check_unwritten(since: int, **arrays: Any) -> None:
    """Raise if one of these arrays has been written to since a forward saved it.

    Parameters
    ----------
    since : int
        :func:`write_count` of when they were saved.
    **arrays
        By name; None is skipped.

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


def _addresses(array: Any) -> tuple[int, int]:
    """From the first byte of its elements to behind the last. One address space has the CPU's and all GPUs'."""
    first = array.data.ptr if is_cupy_array(array) else array.__array_interface__["data"][0]
    last = first + array.dtype.itemsize
    for size, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            first += stride * (size - 1)
        else:
            last += stride * (size - 1)
    return first, last


def _owner(array: Any) -> Any:
    """The array that lives as long as its memory is used."""
    while isinstance(array.base, np.ndarray) or is_cupy_array(array.base):
        array = array.base
    return array
