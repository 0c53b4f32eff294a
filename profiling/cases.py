"""Which operation, pass, shape, dtype and layout: the rows of the benchmark, and their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from gpu_layers.catalogue.case import Arrays
from gpu_layers.catalogue.operation import BACKWARD, FORWARD, Operation, Shape, Sizes
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.verification.selection import named_like
from profiling.devices import Device

#: In the order of what matters to training.
DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}
_TOY_SIZES = {2: (6, 40), 4: (2, 8, 9, 10)}


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes
    ----------
    operation : Operation
    direction : {"forward", "backward"}
    shape : tuple of int
        (N, C, *spatial), whatever the layout.
    dtype : str
    channels_last : bool
    asked : tuple of int, optional
        The shape of the reference list, where memory was too small for it.
    """

    operation: Operation
    direction: str
    shape: Shape
    dtype: str
    channels_last: bool = False
    asked: Shape | None = None

    def __str__(self) -> str:
        shape = "x".join(map(str, self.asked or self.shape))
        layout = " channels_last" if self.channels_last else ""
        return f"{self.operation.name} {self.direction} {shape} {self.dtype}{layout}"

    @property
    def sizes(self) -> Sizes:
        """What byte counts are made of."""
        return self.operation.sizes(self.shape, DTYPES[self.dtype].itemsize)

    @property
    def floor_bytes(self) -> int:
        """Each input once and each output once."""
        return self.operation.floor(self.sizes, self.direction)

    @property
    def torch_bytes(self) -> int:
        """What PyTorch's own kernels move."""
        return self.operation.torch_bytes(self.sizes, self.direction)

    def in_memory(self, shape: Shape) -> Shape:
        """A shape (N, C, *spatial) in the order of memory."""
        return (shape[0], *shape[2:], shape[1]) if self.channels_last else shape

    @property
    def input_shape(self) -> Shape:
        """Of x, in the order of memory."""
        return self.in_memory(self.shape)

    @property
    def output_shape(self) -> Shape:
        """Of y, in the order of memory."""
        return self.in_memory(self.operation.output_shape(self.shape))

    def fitting(self, memory: int, buffers: int) -> Case:
        """This case, or one of a smaller batch that a device of this much free memory can take.

        Parameters
        ----------
        memory : int
            Bytes.
        buffers : int
            Sets of inputs.

        Raises
        ------
        ValueError
            If a batch of one is too large.
        """
        case = self
        while case.bytes_needed(buffers) > memory:
            if case.shape[0] == 1:
                raise ValueError(f"{self}: a batch of one needs {case.bytes_needed(buffers) / 2**30:.1f} GiB")
            shape = (case.shape[0] // 2, *case.shape[1:])
            case = replace(case, shape=shape, asked=self.asked or self.shape)
        return case

    def bytes_needed(self, buffers: int) -> int:
        """Device memory, roughly: inputs, and for each of four implementations results and what it keeps."""
        inputs, outputs = (math.prod(shape) * self.sizes.itemsize for shape in (self.input_shape, self.output_shape))
        made = inputs if self.direction == BACKWARD else outputs
        kept = inputs + outputs
        return buffers * (inputs + outputs + 4 * (made + kept)) + 6 * inputs

    def toy(self) -> Case:
        """The same with an array small enough for an emulated device."""
        return replace(self, shape=_TOY_SIZES[len(self.shape)])


def call_of(case: Case, arrays: Arrays) -> Callable[[], Any]:
    """The pass itself, with the public operation; what comes before it has been done."""
    operation, last = case.operation, case.channels_last
    if case.direction == FORWARD:
        return lambda: operation.forward(arrays, last)
    backward, (_, saved) = operation.backward, operation.forward(arrays, last)
    assert backward is not None
    return lambda: backward(arrays["dy"], saved)


def all_cases(operations: Sequence[Operation], dtypes: Iterable[str], quick: bool = False) -> Iterator[Case]:
    """The rows, the most telling first, so that a run that ends early has those.

    Parameters
    ----------
    operations : sequence of Operation
    dtypes : iterable of str
    quick : bool
        Of each operation only the first shape, and the first one that fits into the L2 cache.
    """
    dtypes = tuple(dtypes)
    longest = max(len(operation.shapes) for operation in operations)
    for position in range(longest):
        for operation in operations:
            shapes = _telling(operation.shapes) if quick else operation.shapes
            if position >= len(shapes):
                continue
            for channels_last in operation.layouts:
                if channels_last and len(shapes[position]) == 2:
                    continue
                for dtype in dtypes:
                    for direction in operation.passes:
                        yield Case(operation, direction, shapes[position], dtype, channels_last)


def in_rounds(cases: Iterable[Case], first: Sequence[Operation] = ()) -> list[Case]:
    """The same cases in rounds over all operations, so that a run that ends early has something of each.

    The rounds: dtypes as they come, of each the shapes in the operation's order, of each shape channels first and last,
    of each layout forward and backward.

    Parameters
    ----------
    cases : iterable of Case
    first : sequence of Operation
        Those that begin each round, in this order; the others follow as they come.
    """
    cases = list(cases)
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    operations = list(dict.fromkeys((*first, *(case.operation for case in cases))))

    def turn(case: Case) -> tuple[int, int, bool, bool, int]:
        shape = case.operation.shapes.index(case.shape) if case.shape in case.operation.shapes else 0
        backward = case.direction == BACKWARD
        return dtypes.index(case.dtype), shape, case.channels_last, backward, operations.index(case.operation)

    return sorted(cases, key=turn)


def _telling(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    small = [shape for shape in shapes if math.prod(shape) < 4e6]
    return (shapes[0], *small[:1])


def selected(cases: Iterable[Case], only: str | None) -> list[Case]:
    """The cases whose name a regular expression finds.

    Raises
    ------
    ValueError
        If it is none, or finds none; says which operations there are.
    """
    cases = list(cases)
    names = ", ".join(dict.fromkeys(case.operation.name for case in cases))
    return named_like(cases, only, hint=f": the operations are {names}")


# ---- Inputs ----------------------------------------------------------------------------------------------------------


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
