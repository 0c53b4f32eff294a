"""The one place that knows where a tensor is computed with, and as what: tensors as the arrays that the floors take.

The reference takes a tensor of the CPU as a NumPy array on its own memory. Kernels take tensors themselves
(``tensors.py``), on a GPU or emulated. Results lie in memory that is a tensor's own, never a view's. What an
operation's ``run`` needs of the device is here (and, for random numbers, in ``random.py``), and nowhere else here.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

from gpu_layers.runtime.backend import back_on, forced_backend
from gpu_layers.torch.tensors import BFLOAT16, as_numpy

#: What layers take; all others are a TypeError.
FLOAT_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
#: Formats in which channels lie side by side, by the number of axes.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Axes of (N, C, *spatial) in the order of (N, *spatial, C), by their number.
_TO_LAST = {4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of statistics and of the arithmetic: float64 for float64, float32 for all others."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def check_place(tensor: torch.Tensor) -> None:
    """RuntimeError unless kernels or the reference take tensors of this device and layout."""
    kind = tensor.device.type
    if kind not in ("cpu", "cuda", "meta"):
        raise RuntimeError(
            f"gpu_layers.torch runs on cpu and cuda tensors, got one on {kind}: gpu_layers.torch.revert(model) gives "
            "the model torch's own layers back"
        )
    if tensor.layout is not torch.strided:
        raise RuntimeError(f"gpu_layers.torch takes dense tensors, got {tensor.layout}")


def floor(tensor: torch.Tensor) -> ModuleType:
    """The floor that computes with this tensor: ``gpu_layers.reference`` or ``gpu_layers.kernels``.

    Raises
    ------
    TypeError
        If the backend that is forced does not take tensors of this device.
    """
    return _floor("kernels" if _on_kernels(tensor) else "reference")


@cache
def _floor(name: str) -> ModuleType:
    return importlib.import_module(f"gpu_layers.{name}")


def _on_kernels(tensor: torch.Tensor) -> bool:
    """Whether kernels compute with this tensor, on its GPU or emulated."""
    choice = forced_backend()
    if choice is None:
        return not tensor.is_cpu
    if (choice.name == "cuda") == tensor.is_cpu:
        needed = "CUDA" if choice.name == "cuda" else "CPU"
        raise TypeError(f"the {choice.name} backend takes {needed} tensors, got one on {tensor.device}")
    return choice.name != "reference"


#: Where a forward runs, so that its backward can be sent there: see :func:`at`.
place = forced_backend


def at(chosen: Any) -> AbstractContextManager[None]:
    """A block that runs where a forward ran."""
    return back_on(chosen)


def array(tensor: torch.Tensor, channels_last: bool = False) -> Any:
    """What the floor takes: with the tensor's axes, or as ``(N, *spatial, C)`` if channels_last."""
    if not _on_kernels(tensor):
        found = as_numpy(tensor)
        return found.transpose(_TO_LAST[found.ndim]) if channels_last else found
    if tensor.is_neg():  # lazily: there is no memory that holds the values
        tensor = tensor.resolve_neg()
    return tensor.permute(_TO_LAST[tensor.dim()]) if channels_last else tensor


def optional_array(tensor: torch.Tensor | None, channels_last: bool = False) -> Any:
    """:func:`array` of a tensor, None of None."""
    return None if tensor is None else array(tensor, channels_last)


def tensor(found: Any, channels_last: bool = False) -> torch.Tensor:
    """The tensor on the memory of a contiguous result of a floor, of either order of axes; not a view."""
    if isinstance(found, torch.Tensor):
        made, dtype = found, found.dtype
    elif found.dtype == BFLOAT16:
        made, dtype = torch.from_numpy(found.view(np.int16)), torch.bfloat16
    else:
        made = torch.from_numpy(found)
        dtype = made.dtype
    if not channels_last and dtype is made.dtype and not made._is_view():
        return made
    shape, strides = made.shape, made.stride()
    if channels_last:
        shape = (shape[0], shape[-1], *shape[1:-1])
        strides = (strides[0], strides[-1], *strides[1:-1])
    memory = made.untyped_storage(), made.storage_offset()
    return torch.empty(0, dtype=dtype, device=made.device).set_(*memory, shape, strides)


def store(target: torch.Tensor, found: Any, channels_last: bool = False) -> torch.Tensor:
    """Write what a floor found, of either order of axes, to a tensor."""
    place = array(target, channels_last)
    if isinstance(found, torch.Tensor):
        place.copy_(found)
    else:
        place[...] = found
    return target


def empty(shape: Any, dtype: torch.dtype, like: torch.Tensor, channels_last: bool = False) -> torch.Tensor:
    """A new tensor beside another, by torch's allocator: contiguous, or in the format where channels are last."""
    if channels_last:
        return torch.empty(shape, dtype=dtype, device=like.device, memory_format=_CHANNELS_LAST[len(shape)])
    return like.new_empty(shape) if like.dtype is dtype else like.new_empty(shape, dtype=dtype)


def is_capturing(x: torch.Tensor) -> bool:
    """Whether x is on a GPU whose current stream is recording a graph: nothing may wait for the device then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether torch's layers would answer in channels_last or channels_last_3d: ``suggest_memory_format``."""
    rank = x.dim()
    if rank not in (4, 5):
        return False
    if x.is_contiguous():
        # Both formats at once, where only sizes of 1 differ: torch goes by the strides.
        return x.stride(1) == 1 and _strides_are_channels_last(x)
    return x.is_contiguous(memory_format=_CHANNELS_LAST[rank])


def is_dense(x: torch.Tensor, channels_last: bool) -> bool:
    """Whether x lies in memory without gaps, in this format."""
    return x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()]) if channels_last else x.is_contiguous()


def _strides_are_channels_last(x: torch.Tensor) -> bool:
    least = 0
    for axis in (1, *range(x.dim() - 1, 1, -1), 0):
        size, stride = x.shape[axis], x.stride(axis)
        if size == 0 or stride < least or (axis == 0 and least == x.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True
