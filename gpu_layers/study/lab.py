"""Where a study runs, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import is_cupy_array, require_gpu


def _ignore(done: float) -> None:
    """Progress that nobody watches. Not a lambda: those cannot go to another process."""


@dataclass(frozen=True)
class Lab:
    """What the parts of a study are given.

    Attributes
    ----------
    quick : bool
        Fewer steps, seeds and samples: the same claims and criteria in seconds.
    device : {"cpu", "cuda"}
    progress : callable
        Takes the done part of the work, from 0 to 1.
    """

    quick: bool = False
    device: str = "cpu"
    progress: Callable[[float], None] = _ignore

    def choose(self, full: int, quick: int) -> int:
        """A size: the first, or the second in a quick run."""
        return quick if self.quick else full

    def place(self, array: Array) -> Array:
        """The array on the study's device."""
        return array if self.device == "cpu" else require_gpu().asarray(array)


def on_cpu(array: Array) -> np.ndarray:
    """The array in NumPy."""
    return array.get() if is_cupy_array(array) else np.asarray(array)


def different_bits(one: Array, other: Array) -> int:
    """How many elements of two arrays differ in any bit."""
    a, b = np.ascontiguousarray(on_cpu(one)), np.ascontiguousarray(on_cpu(other))
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.size, b.size, 1)
    as_bytes = [array.reshape(-1).view(np.uint8).reshape(array.size, array.itemsize) for array in (a, b)]
    return int((as_bytes[0] != as_bytes[1]).any(axis=1).sum())
