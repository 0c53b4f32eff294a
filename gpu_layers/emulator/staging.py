"""Copies of a launch's arrays, laid out so that every access outside of them is noticed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import abi
from .parameters import ParameterType

#: What a GPU's allocator aligns to. A view keeps its distance from the array it is a view of.
_ALIGNMENT = 512


@dataclass
class _Span:
    """The bytes an array may reach, in the caller's memory."""

    parameter: int
    array: np.ndarray
    begin: int
    end: int


def _span(parameter: int, array: np.ndarray) -> _Span:
    begin = array.ctypes.data
    end = begin + array.itemsize
    for size, stride in zip(array.shape, array.strides, strict=True):
        if size == 0:
            return _Span(parameter, array, begin, begin)
        if stride < 0:
            begin += (size - 1) * stride
        else:
            end += (size - 1) * stride
    return _Span(parameter, array, begin, end)


def _owner_address(array: np.ndarray) -> int:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.ctypes.data


def _groups(spans: Sequence[_Span]) -> list[list[_Span]]:
    """Spans that overlap, together: an array passed twice must stay one array."""
    groups: list[list[_Span]] = []
    end = -1
    for span in sorted(spans, key=lambda s: (s.begin, s.end)):
        if groups and span.begin < end:
            groups[-1].append(span)
        else:
            groups.append([span])
        end = max(end, span.end)
    return groups


class StagedArguments:
    """The arrays of one launch, copied.

    Parameters
    ----------
    parameters : sequence of ParameterType
    values : sequence
        One per parameter; the arrays among them are copied.
    initialised : set of int
        Positions of the arrays that hold values the kernel may read.
    allocate, free : callable
        The module's: ``allocate(bytes, offset)`` returns an address.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterType],
        values: Sequence[object],
        initialised: set[int],
        allocate: Callable[[int, int], int],
        free: Callable[[int], None],
    ):
        self._parameters = parameters
        self._free = free
        self._allocated: list[int] = []
        self._copies: list[tuple[_Span, int]] = []
        self.addresses: dict[int, int] = {}
        records = []
        arrays = [_span(i, v) for i, v in enumerate(values) if parameters[i].is_pointer and isinstance(v, np.ndarray)]
        for buffer, group in enumerate(_groups(arrays)):
            begin, end = group[0].begin, max(span.end for span in group)
            copy = allocate(end - begin, (begin - _owner_address(group[0].array)) % _ALIGNMENT)
            if not copy:
                raise MemoryError(f"no memory to copy an array of {end - begin} bytes")
            self._allocated.append(copy)
            ctypes.memmove(copy, begin, end - begin)
            for span in group:
                moved = copy + span.begin - begin
                self._copies.append((span, moved))
                self.addresses[span.parameter] = copy + span.array.ctypes.data - begin
                parameter = parameters[span.parameter]
                records.append(
                    abi.ArgumentRecord(
                        address=moved,
                        bytes=span.end - span.begin,
                        parameter=span.parameter,
                        buffer=buffer,
                        is_const=parameter.is_const,
                        is_initialised=span.parameter in initialised,
                        element_size=span.array.itemsize,
                    )
                )
        self.records = (abi.ArgumentRecord * max(1, len(records)))(*records)
        self.count = len(records)

    def copy_back(self) -> None:
        """Give the caller what the kernel wrote."""
        for span, moved in self._copies:
            if not self._parameters[span.parameter].is_const:
                ctypes.memmove(span.begin, moved, span.end - span.begin)

    def release(self) -> None:
        """Free the copies."""
        for copy in self._allocated:
            self._free(copy)
        self._allocated = []
