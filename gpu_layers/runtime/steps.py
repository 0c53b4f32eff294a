"""The steps of a program. Its arrays have numbers (slots), in the order in which they appear."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gpu_layers.runtime.kernel import Kernel

#: A step as it runs, ``step(objects, slots, stream)``: arrays and numbers by slot, among which it puts what it makes;
#: their addresses and the numbers; the stream, or None for the current one.
BoundStep = Callable[[list[Any], list[int], Any], None]


@dataclass(frozen=True)
class Slot:
    """An argument of a launch that changes from call to call: an array, its bytes, or the numbers from there on."""

    index: int
    as_bytes: bool = False


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel, without the arrays and numbers of a call.

    Attributes
    ----------
    kernel : Kernel
    grid, block : tuple of int
    arguments : tuple
        One for each parameter: a :class:`Slot`, None for a null pointer, or an array of one element of the declared
        type.
    shared_bytes : int
    cooperative : bool
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: tuple[Slot | np.ndarray | None, ...]
    shared_bytes: int
    cooperative: bool


@dataclass(frozen=True)
class Allocate:
    """A new array, for a result or for values that kernels pass on; zeroed if asked for."""

    slot: int
    shape: tuple[int, ...]
    dtype: np.dtype
    zeroed: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Views:
    """Parts of a contiguous array in its own memory, as new slots in order.

    Attributes
    ----------
    slots : tuple of int
    of : int
    offsets : tuple of int
        Elements before each, of their dtype.
    shapes : tuple of tuple of int
    dtype : numpy.dtype
        Theirs; it may be another than the array's.
    """

    slots: tuple[int, ...]
    of: int
    offsets: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: np.dtype

    @cached_property
    def parts(self) -> tuple[tuple[slice, tuple[int, ...]], ...]:
        """Where each is in the array's elements, and its shape."""
        return tuple(
            (slice(offset, offset + math.prod(shape)), shape)
            for offset, shape in zip(self.offsets, self.shapes, strict=True)
        )


@dataclass(frozen=True)
class Compute:
    """A new array, by the array library: ``function(xp, *arrays)``."""

    slot: int
    function: Callable[..., Any]
    of: tuple[int, ...]


@dataclass(frozen=True)
class Deliver:
    """A copy of a result into an array of the caller to which kernels cannot write."""

    source: int
    target: int


class CooperativeLaunchRefusedError(RuntimeError):
    """The driver refused to launch a kernel whose blocks wait for each other."""
