"""Tensors as a kind of array that programs of kernels run on: memory from torch's allocator, on torch's streams.

Kernels get the addresses of tensors; no array of another library lies between. On CPU tensors the same programs run
emulated, within ``gpu_layers.use_backend("emulated")``: all but the launch itself is the same code.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import torch

from gpu_layers.runtime.arrays import ALIGNMENT, Reading, Runner, register_kind
from gpu_layers.runtime.backend import emulation
from gpu_layers.runtime.copying import ready_copy
from gpu_layers.runtime.gpu import bound_launches, bound_steps, bound_views
from gpu_layers.runtime.steps import Allocate, BoundStep, Compute, Deliver, Launch, Slot, Views

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_NUMPY = {
    getattr(torch, name): np.dtype(name)
    for name in ["float16", "float32", "float64", "uint8", "uint16", "uint32", "uint64", "int32", "int64", "bool"]
}
_NUMPY[torch.bfloat16] = BFLOAT16
_TORCH = {numpy: own for own, numpy in _NUMPY.items()}
# What is filled with zeros, on every version of torch, in place of integers that it can do little with.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
#: Axes of (N, C, *spatial) in the order of (N, *spatial, C), by their number.
TO_LAST = {4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}
# All addresses but 0, which NumPy takes for no memory. Nothing is read or written but through arrays on a part of it.
_MEMORY: Any = (ctypes.c_char * 2**62).from_address(1)


class Stream:
    """A stream by its handle, with CuPy's name for it."""

    __slots__ = ("ptr",)

    def __init__(self, handle: int) -> None:
        self.ptr = handle


class TensorArrays:
    """On the tensors' device and torch's current stream of it; see :class:`gpu_layers.runtime.arrays.ArrayKind`."""

    def read(self, arrays: Sequence[Any]) -> Reading:
        """Shape, strides, dtype, alignment, and the number of the GPU (-1 for the host)."""
        signature: list[Hashable] = []
        addresses = [0 if array is None else array.data_ptr() for array in arrays]
        for array, address in zip(arrays, addresses, strict=True):
            if array is None:
                signature.append(None)
            else:
                signature += array.shape, array.stride(), array.dtype, address % ALIGNMENT, array.get_device()
        return tuple(signature), addresses

    def device(self, array: Any) -> int | None:
        """Number of the GPU, or None for the host."""
        return array.get_device() if array.is_cuda else None

    def dtype(self, array: Any) -> np.dtype:
        """As a NumPy dtype."""
        return _NUMPY[array.dtype]

    def is_contiguous(self, array: Any) -> bool:
        """See :class:`~gpu_layers.runtime.arrays.ArrayKind`."""
        return array.is_contiguous() and array.data_ptr() % array.element_size() == 0

    def is_ready(self, array: Any) -> bool:
        """See :class:`~gpu_layers.runtime.arrays.ArrayKind`."""
        return array.is_contiguous() and array.data_ptr() % ALIGNMENT == 0

    def is_writeable(self, array: Any) -> bool:
        """Tensors are never read-only."""
        return True

    def on(self, device: int | None) -> contextlib.AbstractContextManager[Any]:
        """See :class:`~gpu_layers.runtime.arrays.ArrayKind`."""
        return contextlib.nullcontext() if device is None else torch.cuda.device(device)

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        """See :class:`~gpu_layers.runtime.arrays.ArrayKind`."""
        return torch.empty(shape, dtype=_TORCH[np.dtype(dtype)], device=like.device)

    def runner(self, program: Any) -> Runner:
        """See :class:`~gpu_layers.runtime.arrays.ArrayKind`."""
        return _runner(program)


def current_device() -> int:
    """Number of the GPU that is current: of a torch with CUDA that has a tensor on one."""
    return torch._C._cuda_getDevice()


def current_stream(device: int) -> Stream:
    """Torch's current stream of a GPU."""
    handle = torch._C._cuda_getCurrentRawStream(device)
    stream = _streams.get(handle)
    if stream is None:
        stream = _streams[handle] = Stream(handle)
    return stream


_streams: dict[int, Stream] = {}


def _runner(program: Any) -> Runner:
    device = program.device
    bound: list[BoundStep] = []

    def run(arrays: Sequence[Any], addresses: list[int], numbers: tuple[int, ...]) -> Any:
        if not bound:
            # Kernels are compiled and loaded here, when they are first needed.
            bound[:] = bound_steps(program, lambda steps: _bound(steps, program))
        more = program.slots - len(arrays) - len(numbers)
        objects = [*arrays, *numbers, *[None] * more]
        slots = [*addresses, *numbers, *[0] * more]
        stream = None if device is None else current_stream(device)
        for step in bound:
            step(objects, slots, stream)
        return program.results(objects)

    if device is None:
        return run

    def run_there(arrays: Sequence[Any], addresses: list[int], numbers: tuple[int, ...]) -> Any:
        if current_device() == device:
            return run(arrays, addresses, numbers)
        with torch.cuda.device(device):
            return run(arrays, addresses, numbers)

    return run_there


def _bound(steps: list[Any], program: Any) -> list[BoundStep]:
    kind, device = type(steps[0]), program.device
    if kind is Launch:
        return [_emulated(step) for step in steps] if device is None else [bound_launches(steps, program.slots, device)]
    if kind is Views:
        # The emulator takes tensors.
        return bound_views(steps, program, range(program.slots) if device is None else program.needs_array, _part_of)
    return [_bound_delivery(step) if kind is Deliver else _bound_tensor(step, device) for step in steps]


def _part_of(tensor: torch.Tensor, first: int, shape: tuple[int, ...]) -> torch.Tensor:
    return tensor.reshape(-1)[first : first + math.prod(shape)].reshape(shape)


def _bound_delivery(step: Deliver) -> BoundStep:
    return lambda objects, slots, stream: objects[step.target].copy_(objects[step.source])


def _bound_tensor(step: Any, device: int | None) -> BoundStep:
    made = _made(step, memory_of(device))

    def make(objects: list[Any], slots: list[int], stream: Any) -> None:
        objects[step.slot] = tensor = made(objects)
        slots[step.slot] = tensor.data_ptr()

    return make


def memory_of(device: int | None) -> torch.device:
    """Where a program's memory comes from."""
    return torch.device("cpu") if device is None else torch.device("cuda", device)


def _made(step: Any, device: torch.device) -> Callable[[list[Any]], torch.Tensor]:
    """What makes the tensor of a step."""
    if isinstance(step, Allocate):
        shape, dtype = step.shape, _TORCH[step.dtype]
        if step.zeroed:
            filled = _SIGNED.get(dtype, dtype)
            return lambda objects: torch.zeros(shape, dtype=filled, device=device).view(dtype)
        # Quicker than torch.empty, which reads a dtype and a device in each call.
        new_empty = torch.empty(0, dtype=dtype, device=device).new_empty
        return lambda objects: new_empty(shape)
    if isinstance(step, Compute) and step.function is ready_copy:
        # New memory, which torch aligns.
        return lambda objects: objects[step.of[0]].clone(memory_format=torch.contiguous_format)
    raise TypeError(f"{step} is no step of a program of tensors")


def _emulated(step: Launch) -> BoundStep:
    def launch(objects: list[Any], slots: list[int], stream: Any) -> None:
        values = [
            _value(argument, parameter.dtype, objects)
            for argument, parameter in zip(step.arguments, step.kernel.parameters, strict=True)
        ]
        emulation().launch(step.kernel, step.grid, step.block, values, step.shared_bytes, step.cooperative)

    return launch


def _value(argument: Any, dtype: np.dtype, objects: list[Any]) -> Any:
    """An argument of a launch as the emulator takes it."""
    if not isinstance(argument, Slot):
        return argument
    value = objects[argument.index]
    if not isinstance(value, torch.Tensor):
        # A number, or those of a struct.
        numbers = objects[argument.index : argument.index + dtype.itemsize // 8]
        return np.array(numbers, np.uint64).view(dtype).reshape(())
    found = as_numpy(value)
    return found.reshape(-1).view(np.uint8) if argument.as_bytes else found


def as_numpy(tensor: torch.Tensor, channels_last: bool = False) -> np.ndarray:
    """The NumPy array on a CPU tensor's memory, to be used while the tensor lives and never to be handed on.

    With the tensor's axes, or as ``(N, *spatial, C)`` if channels_last. Torch does not know of it: it refuses to resize
    what ``Tensor.numpy`` has shown.
    """
    if tensor.is_neg():  # lazily: there is no memory that holds the values
        found = tensor.detach().resolve_neg().numpy()
    elif tensor.is_contiguous():
        (found,) = borrowed((tensor.data_ptr(),), tensor.shape, tensor.dtype)
    else:
        strides = [tensor.element_size() * stride for stride in tensor.stride()]
        found = np.ndarray(tensor.shape, _NUMPY[tensor.dtype], _MEMORY, tensor.data_ptr() - 1, strides)
    return found.transpose(TO_LAST[found.ndim]) if channels_last else found


@lru_cache(maxsize=4096)
def borrowed(addresses: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> tuple[np.ndarray, ...]:
    """NumPy arrays on the memory of contiguous tensors, as :func:`as_numpy` gives them."""
    kind = _NUMPY[dtype]
    return tuple([np.ndarray(shape, kind, _MEMORY, one - 1) if one else np.empty(shape, kind) for one in addresses])


for _type in (torch.Tensor, torch.nn.Parameter):
    register_kind(_type, TensorArrays())
