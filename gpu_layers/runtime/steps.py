"""The steps of a program: what is done to its arrays, which have numbers (slots) in the order in which they appear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_layers.runtime.kernel import Kernel


@dataclass(frozen=True)
class Slot:
    """An argument of a launch that is another one in each call: an array, or its bytes, or a number."""

    index: int
    as_bytes: bool = False


@dataclass(frozen=True)
class Launch:
    """A kernel's launch, but for the arrays and numbers of a call.

    Attributes
    ----------
    kernel : Kernel
    grid, block : tuple of int
    arguments : tuple
        One a parameter: a :class:`Slot`, None for a null pointer, or an array of one element of the declared type.
    shared_bytes : int
    cooperative : bool
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: tuple[Any, ...]
    shared_bytes: int
    cooperative: bool


@dataclass(frozen=True)
class Allocate:
    """A new array, for a result or for what kernels hand on; of zeros where it says so."""

    slot: int
    shape: tuple[int, ...]
    dtype: np.dtype
    zeroed: bool = False


@dataclass(frozen=True)
class Rows:
    """The rows of an array, of so many bytes each: slots of their own, in order."""

    of: int
    count: int
    size: int


@dataclass(frozen=True)
class Compute:
    """A new array, by the array library: ``function(xp, *arrays)``."""

    slot: int
    function: Callable[..., Any]
    of: tuple[int, ...]


@dataclass(frozen=True)
class Deliver:
    """A copy of a result into an array of the caller that kernels could not write to."""

    source: int
    target: int


class CooperativeLaunchRefusedError(RuntimeError):
    """The driver does not launch a kernel whose blocks wait for each other: it has fewer places than it said."""
