"""Inputs: normally distributed numbers, made on the device from one block of them; never zeros unless rounded."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from gpu_layers.catalogue.case import Arrays
from gpu_layers.catalogue.operation import BACKWARD
from gpu_layers.core.dtypes import accumulation_dtype
from profiling.cases import DTYPES, Case
from profiling.devices import Device

# 64 MB of float32: more than an L2 cache, so that repeating it makes no input warm.
_BLOCK = 2**24
# Distances between the places of the block where arrays begin: no two of a run begin at the same one.
_STRIDE = 1_000_003
# Farther from 0 than a normalised value is likely to be.
_AWAY = 8.0
# Of rounded numbers: exact in every dtype, and of four halves apart after a normalisation in the coarsest, bfloat16.
_STEP = 0.125


@cache
def _block(dtype: np.dtype, size: int, away: float, step: float) -> np.ndarray:
    numbers = np.random.default_rng(2026).standard_normal(size, dtype=np.float32)
    if step:
        numbers = np.round(numbers / np.float32(step)) * np.float32(step)
    return (numbers + np.copysign(np.float32(away), numbers)).astype(dtype)


class InputMaker:
    """Makes inputs of cases on a device.

    Parameters
    ----------
    device : Device
    block : int
        Numbers to draw; longer arrays repeat them.
    """

    def __init__(self, device: Device, block: int = _BLOCK) -> None:
        self._device = device
        self._size = block
        self._blocks: dict[tuple[np.dtype, float, float], Any] = {}
        self._arrays = 0

    def inputs(self, case: Case) -> Arrays:
        """Another set of inputs for a case, by name."""
        dtype = DTYPES[case.dtype]
        step = _STEP if case.operation.takes_maximum else 0.0
        arrays: Arrays = {"x": self.numbers(case.input_shape, dtype, step=step), "start": 0}
        if case.direction == BACKWARD:
            arrays["dy"] = self.numbers(case.output_shape, dtype)
        for name in case.operation.like_x:
            arrays[name] = self.numbers(case.input_shape, dtype, away=_AWAY)
        parameters = accumulation_dtype(case.dtype)
        for name in case.operation.per_channel:
            values = self.numbers((case.shape[1],), parameters)
            positive = name == "var" or (name == "gamma" and case.operation.takes_maximum)
            arrays[name] = abs(values) + 0.5 if positive else values
        return arrays

    def numbers(self, shape: tuple[int, ...], dtype: Any, away: float = 0.0, step: float = 0.0) -> Any:
        """Normally distributed numbers, other ones each time: moved away from 0, or rounded to multiples of a step."""
        dtype = np.dtype(dtype)
        if (dtype, away, step) not in self._blocks:
            # By way of bits: not every array library takes every dtype from NumPy.
            block = _block(dtype, self._size, away, step).view(f"u{dtype.itemsize}")
            self._blocks[dtype, away, step] = self._device.xp.asarray(block)
        size = math.prod(shape)
        result = self._device.xp.empty(size, dtype)
        bits = f"u{dtype.itemsize}"
        source, target = self._blocks[dtype, away, step], result.view(bits)
        at = self._arrays * _STRIDE % self._size
        self._arrays += 1
        done = 0
        while done < size:
            count = min(size - done, self._size - at)
            target[done : done + count] = source[at : at + count]
            done, at = done + count, 0
        return result.reshape(shape)
