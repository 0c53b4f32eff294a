"""Which launches a case of the benchmark makes, and the bytes that each moves over the memory bus, by emulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gpu_layers.catalogue.case import Arrays
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.emulator import Trace
from gpu_layers.kernels.arrays import empty
from gpu_layers.runtime.backend import use_backend, use_executor
from gpu_layers.runtime.emulation import Emulation
from gpu_layers.runtime.kernel import Kernel
from gpu_layers.runtime.limits import force_limits
from profiling.cases import DTYPES, Case, InputMaker, call_of
from profiling.devices import EmulatedDevice
from profiling.machine import FOLD

_SECTOR = 32
# Elements of what is counted; the emulator takes some million a second.
_COUNTED, _MOST_COUNTED = 2**17, 2**22
_CHANNELS, _VECTOR = 64, 8
# Numbers that inputs repeat.
_NUMBERS = 2**20
# Kernels that decide how much work later ones have: they run where launches are listed.
_DECIDING = (
    "valid_positions_of_lengths",
    "valid_positions_of_few_lengths",
    "valid_positions_of_mask",
    "fractional_max_pool_forward",
)


def launches_of(case: Case, *, filled: bool = False) -> list[Launch]:
    """The launches of one call, at the case's own shape; none of them runs, but for those of :data:`_DECIDING`.

    Parameters
    ----------
    case : Case
    filled : bool
        Give the inputs values, as far as executing a sample of blocks reads them, and zeros to what kernels hand each
        other. Otherwise they are not touched. What is not touched takes no memory.
    """
    arrays = _untouched(case)
    if filled:
        _fill(case, arrays)
    # What the host computes between two kernels it computes with whatever is in memory.
    with np.errstate(all="ignore"):
        with listed_launches() as before:
            call = call_of(case, arrays)
        with listed_launches() as launches:
            call()
    if filled:
        _fill_between(launches, before, [value for value in arrays.values() if isinstance(value, np.ndarray)])
    return launches


def _untouched(case: Case) -> Arrays:
    host = np.empty(0)
    arrays: Arrays = {"x": empty(case.input_shape, DTYPES[case.dtype], host), "start": 0}
    arrays["dy"] = empty(case.output_shape, DTYPES[case.dtype], host)
    for name in case.operation.like_x:
        arrays[name] = empty(case.input_shape, DTYPES[case.dtype], host)
    for name in case.operation.per_channel:
        arrays[name] = np.ones(case.shape[1], accumulation_dtype(case.dtype))
    return arrays


def _fill(case: Case, arrays: Arrays) -> None:
    operation, maker = case.operation, InputMaker(EmulatedDevice(), block=_NUMBERS)
    few = replace(case, shape=(1, max(1, case.shape[1]), *(1 for _ in case.shape[2:])))
    for name, values in maker.inputs(few).items():
        if name in operation.per_channel:
            arrays[name] = values
    for name in ("x", "dy", *operation.like_x):
        flat = arrays[name].reshape(-1)
        begun = flat[: FOLD // flat.itemsize]
        begun[...] = maker.numbers(begun.shape, begun.dtype)


def _fill_between(launches: list[Launch], before: list[Launch], inputs: list[np.ndarray]) -> None:
    """Give a part of an input numbers of the input, and zeros to what launches hand each other.

    What memory holds by chance may be out of every range, for which kernels take rare ways. What launches before, or
    those that decide, have made stays as it is.
    """

    def arrays_of(launch: Launch) -> list[np.ndarray]:
        # Numbers have no axes.
        return [value for value in launch.values if isinstance(value, np.ndarray) and value.ndim]

    deciding = [launch for launch in launches if launch.decides]
    made = [value for launch in (*before, *deciding) for value in arrays_of(launch)]
    for value in itertools.chain.from_iterable(map(arrays_of, launches)):
        begun = value.reshape(-1)[: FOLD // value.itemsize]
        whole = next((given for given in inputs if np.may_share_memory(given, value)), None)
        if whole is not None:
            if value.ctypes.data != whole.ctypes.data:
                begun[...] = whole.reshape(-1)[: begun.size]
        elif not any(np.may_share_memory(kept, value) for kept in made):
            begun[...] = np.zeros((), value.dtype)


def modelled_bytes(case: Case, launches: list[Launch]) -> tuple[list[float], str]:
    """Bytes of each launch that must cross the memory bus, and a note where they were not counted.

    What is counted is a smaller shape that takes the same kernels: of each array of each launch, which part of it
    crosses the bus, and how often. That is applied to the array's size in the whole shape.

    Parameters
    ----------
    case : Case
    launches : list of Launch
        Those of the case.

    Returns
    -------
    list of float
        Bytes of the distinct 32-byte sectors that each launch touches.
    str
        Empty, or why each launch is taken to touch all of its arrays once.
    """
    for smaller, two_reads in itertools.product(_smaller(case), (False, True)):
        read = _part_that_is_read(case, smaller)
        if not read:
            continue
        # Batch norm of fewer values may keep what it reads where that of more cannot.
        with force_limits(two_reads=two_reads):
            counted = launches_of(smaller)
            if [launch.kernel for launch in counted] != [launch.kernel for launch in launches]:
                continue
            traces = _traces(smaller)
        moved = []
        for trace, small, whole in zip(traces, counted, launches, strict=True):
            total = 0.0
            for name, footprint in trace.footprints.items():
                touched = _SECTOR * (read * footprint.sectors_loaded + footprint.sectors_stored)
                # The whole shape may need less: no counter of blocks that wait for each other, say.
                total += touched / small.array_bytes[name] * whole.array_bytes.get(name, 0)
            moved.append(total)
        return moved, ""
    sizes = [float(sum(launch.array_bytes.values())) for launch in launches]
    return sizes, "bytes not counted: smaller shapes take other kernels"


def _part_that_is_read(case: Case, smaller: Case) -> float:
    """What is read of the whole shape, over what is read of a smaller one; 0 where the latter reads nothing."""
    kept = case.operation.kept
    if kept is None:
        return 1.0
    return kept(case.shape) / kept(smaller.shape) if kept(smaller.shape) else 0.0


def _smaller(case: Case) -> Iterator[Case]:
    """Shapes that the emulator runs in about a second: few samples, or all of them with few channels."""
    batch, channels, *spatial = case.shape
    if math.prod(case.shape) <= _COUNTED:
        yield case
        return
    plane = math.prod(spatial)
    few = min(channels, _CHANNELS) if spatial else channels
    yield replace(case, shape=(max(1, min(batch, _COUNTED // (few * plane))), few, *spatial))
    if batch * plane * _VECTOR <= _MOST_COUNTED:
        yield replace(case, shape=(batch, min(channels, _VECTOR), *spatial))


def _traces(case: Case) -> list[Trace]:
    traces: list[Trace] = []
    inputs = InputMaker(EmulatedDevice(), block=2**16).inputs(case)
    with use_backend("emulated", check=True, record=lambda kernel, trace: traces.append(trace)):
        call = call_of(case, inputs)
        traces.clear()
        call()
    return traces


# ---- Which launches an operation makes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes
    ----------
    kernel : Kernel
    grid, block : tuple of three int
    shared_bytes : int
        Dynamic shared memory a block.
    cooperative : bool
    array_bytes : dict of str to int
        Size of each array that it is given, by parameter.
    values : list
        What it is given: arrays, None for a null pointer, numbers.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    cooperative: bool
    array_bytes: dict[str, int]
    values: list[Any] = field(default_factory=list, repr=False)

    @property
    def decides(self) -> bool:
        """Whether later kernels have work by what this one writes."""
        return self.kernel.name.split("<")[0] in _DECIDING


class _Listed:
    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        values: list[Any],
        shared_bytes: int,
        cooperative: bool,
    ) -> None:
        sizes = {
            parameter.name: value.nbytes
            for parameter, value in zip(kernel.parameters, values, strict=True)
            if parameter.is_pointer and value is not None
        }
        # An array without axes is a pointer too, which profiling.machine tells from a number by its axes.
        told = [
            np.atleast_1d(value) if parameter.is_pointer and value is not None else value
            for parameter, value in zip(kernel.parameters, values, strict=True)
        ]
        self.launches.append(Launch(kernel, grid, block, shared_bytes, cooperative, sizes, told))
        if self.launches[-1].decides:
            Emulation().launch(kernel, grid, block, values, shared_bytes, cooperative)


@contextmanager
def listed_launches() -> Iterator[list[Launch]]:
    """A list that grows with each launch of NumPy arrays in a ``with`` block.

    Results hold whatever was in memory, but for those of :data:`_DECIDING`.
    """
    executor = _Listed()
    with use_executor(executor):
        yield executor.launches
