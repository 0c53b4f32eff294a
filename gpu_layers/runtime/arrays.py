"""Kinds of arrays that programs run on: reading their properties, allocating new ones, running steps.

NumPy and CuPy arrays are here. :func:`register_kind` adds the arrays (tensors) of another library.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gpu_layers.core.array import Array, DTypeLike
from gpu_layers.core.cuda import import_cupy, is_cupy_array
from gpu_layers.runtime.backend import emulation
from gpu_layers.runtime.copying import copy_into
from gpu_layers.runtime.gpu import runner_on_gpu
from gpu_layers.runtime.steps import Allocate, Compute, Deliver, Launch, Slot, Views

if TYPE_CHECKING:
    from gpu_layers.runtime.program import Program

#: Bytes of the widest access, hence the alignment of every array.
ALIGNMENT = 16


#: ``run(arrays, addresses, numbers)`` returns the results.
Runner = Callable[[Sequence[Array], list[int], tuple[int, ...]], Any]
#: All that a program depends on, and the addresses of its arrays.
Reading = tuple[tuple[Hashable, ...], list[int]]


class ArrayKind(Protocol):
    """What programs need from an array library."""

    def read(self, arrays: Sequence[Array]) -> Reading:
        """All that a program depends on: shape, strides, dtype, alignment and device of each array, or None in place
        of all of them, one after the other; and the addresses, 0 where there is no array."""

    def device(self, array: Array) -> int | None:
        """Number of the GPU, or None for the host."""

    def dtype(self, array: Array) -> np.dtype:
        """The dtype as NumPy's."""

    def is_contiguous(self, array: Array) -> bool:
        """Whether the array is in C order, without gaps, and each element at its natural address."""

    def is_ready(self, array: Array) -> bool:
        """Whether kernels can use the array as it is: C-contiguous, at a multiple of 16 bytes."""

    def is_writeable(self, array: Array) -> bool:
        """Whether the array may be written to."""

    def on(self, device: int | None) -> contextlib.AbstractContextManager[Any]:
        """A context in which this GPU is the current one."""

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike, like: Array) -> Array:
        """An uninitialised array on the device of another one."""

    def runner(self, program: Program) -> Runner:
        """A function that runs the steps of a program."""


class NumpyArrays:
    """Arrays in the host's memory; kernels are emulated."""

    def read(self, arrays: Sequence[Array]) -> Reading:
        """Shape, strides, dtype, alignment, and whether it may be written to."""
        signature: list[Hashable] = []
        addresses = [0 if array is None else _address(array) for array in arrays]
        for array, address in zip(arrays, addresses, strict=True):
            if array is None:
                signature.append(None)
            else:
                signature += array.shape, array.strides, array.dtype, address % ALIGNMENT, array.flags.writeable
        return tuple(signature), addresses

    def device(self, array: Array) -> int | None:
        """None."""
        return None

    def dtype(self, array: Array) -> np.dtype:
        """Its dtype."""
        return array.dtype

    def is_contiguous(self, array: Array) -> bool:
        """See :class:`ArrayKind`."""
        return array.flags.c_contiguous and array.flags.aligned

    def is_ready(self, array: Array) -> bool:
        """See :class:`ArrayKind`."""
        return array.flags.c_contiguous and _address(array) % ALIGNMENT == 0

    def is_writeable(self, array: Array) -> bool:
        """See :class:`ArrayKind`."""
        return array.flags.writeable

    def on(self, device: int | None) -> contextlib.AbstractContextManager[Any]:
        """A context that does nothing."""
        return contextlib.nullcontext()

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike, like: Array) -> Array:
        """See :class:`ArrayKind`; malloc aligns to 16 bytes wherever the emulator runs."""
        return np.empty(shape, dtype)

    def runner(self, program: Program) -> Runner:
        """See :class:`ArrayKind`; :func:`gpu_layers.use_backend` decides how kernels run."""
        return lambda arrays, addresses, numbers: self._run(program, arrays, numbers)

    def _run(self, program: Program, arrays: Sequence[Array], numbers: tuple[int, ...]) -> Any:
        objects: list[Any] = [*arrays, *numbers]
        for step in program.steps:
            if isinstance(step, Launch):
                values = [
                    _value(argument, parameter.dtype, objects)
                    for argument, parameter in zip(step.arguments, step.kernel.parameters, strict=True)
                ]
                emulation().launch(step.kernel, step.grid, step.block, values, step.shared_bytes, step.cooperative)
            elif isinstance(step, Allocate):
                objects.append((np.zeros if step.zeroed else np.empty)(step.shape, step.dtype))
            elif isinstance(step, Views):
                flat = objects[step.of].reshape(-1).view(step.dtype)
                for part, shape in step.parts:
                    objects.append(flat[part].reshape(shape))
            elif isinstance(step, Compute):
                objects.append(step.function(np, *[objects[slot] for slot in step.of]))
            elif isinstance(step, Deliver):
                copy_into(np, objects[step.target], objects[step.source])
        # The slot that stays empty.
        return program.results([*objects, None])


def _value(argument: Any, dtype: np.dtype, objects: list[Any]) -> Any:
    """An argument of a launch as the emulator takes it: an array, None, or an array of one element."""
    if not isinstance(argument, Slot):
        return argument
    value = objects[argument.index]
    if argument.as_bytes:
        return value.reshape(-1).view(np.uint8)
    if isinstance(value, np.ndarray):
        return value
    # A number, or those of a struct.
    numbers = objects[argument.index : argument.index + dtype.itemsize // 8]
    return np.array(numbers, np.uint64).view(dtype).reshape(())


class CupyArrays:
    """On a GPU, in memory from CuPy's current allocator, on CuPy's current stream of the device."""

    def read(self, arrays: Sequence[Array]) -> Reading:
        """Shape, strides, dtype, alignment, and the number of its GPU."""
        signature: list[Hashable] = []
        addresses = []
        for array in arrays:
            if array is None:
                signature.append(None)
                addresses.append(0)
            else:
                data = array.data
                address = data.ptr
                signature += array.shape, array.strides, array.dtype, address % ALIGNMENT, data.device_id
                addresses.append(address)
        return tuple(signature), addresses

    def device(self, array: Array) -> int | None:
        """Number of its GPU."""
        return array.data.device_id

    def dtype(self, array: Array) -> np.dtype:
        """Its dtype."""
        return array.dtype

    def is_contiguous(self, array: Array) -> bool:
        """See :class:`ArrayKind`."""
        return array.flags.c_contiguous and array.data.ptr % array.dtype.itemsize == 0

    def is_ready(self, array: Array) -> bool:
        """See :class:`ArrayKind`."""
        return array.flags.c_contiguous and array.data.ptr % ALIGNMENT == 0

    def is_writeable(self, array: Array) -> bool:
        """True: CuPy has no read-only arrays."""
        return True

    def on(self, device: int | None) -> contextlib.AbstractContextManager[Any]:
        """See :class:`ArrayKind`."""
        return import_cupy().cuda.Device(device)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike, like: Array) -> Array:
        """See :class:`ArrayKind`."""
        with self.on(like.data.device_id):
            return import_cupy().ndarray(shape, dtype)

    def runner(self, program: Program) -> Runner:
        """See :class:`ArrayKind`."""
        return runner_on_gpu(program)


def _address(array: Array) -> int:
    return array.__array_interface__["data"][0]


#: By their types, those that have been met.
KINDS: dict[type, ArrayKind] = {np.ndarray: NumpyArrays()}


def register_kind(array_type: type, kind: ArrayKind) -> None:
    """Let programs run on arrays of another library."""
    KINDS[array_type] = kind


def kind_of(array: Array) -> ArrayKind:
    """The kind of an array.

    Raises
    ------
    TypeError
        If programs do not run on its type.
    """
    kind = KINDS.get(type(array))
    if kind is None:
        if not is_cupy_array(array):
            raise TypeError(f"expected an array of NumPy or CuPy, got {type(array).__name__}")
        register_kind(type(array), kind := CupyArrays())
    return kind
