"""The one place that knows what a tensor is in memory: tensors as the arrays that the floors take.

A tensor of the CPU is a NumPy array on its own memory; results lie in tensors that torch allocated. What an operation's
``run`` needs of the device is here (and, for random numbers, in ``random.py``), and nowhere else in this package.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import torch

from gpu_layers.runtime.backend import back_on, backend_for, forced_backend

#: What layers take; all others are a TypeError.
FLOAT_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
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
    if kind == "cuda":
        raise RuntimeError(
            "gpu_layers.torch does not run on CUDA tensors here: move the model to the CPU, or give it torch's own "
            "layers back with gpu_layers.torch.revert(model)"
        )
    if kind not in ("cpu", "meta"):
        raise RuntimeError(
            f"gpu_layers.torch runs on cpu and cuda tensors, got one on {kind}: gpu_layers.torch.revert(model) gives "
            "the model torch's own layers back"
        )
    if tensor.layout is not torch.strided:
        raise RuntimeError(f"gpu_layers.torch takes dense tensors, got {tensor.layout}")


def floor(tensor: torch.Tensor) -> ModuleType:
    """The floor that computes with this tensor: ``gpu_layers.reference`` or ``gpu_layers.kernels``."""
    if forced_backend() is None:
        return _reference()
    return backend_for(array(tensor))


def _reference() -> ModuleType:
    global _reference_floor
    if _reference_floor is None:
        _reference_floor = importlib.import_module("gpu_layers.reference")
    return _reference_floor


_reference_floor: ModuleType | None = None


#: Where a forward runs, so that its backward can be sent there: see :func:`at`.
place = forced_backend


def at(chosen: Any) -> AbstractContextManager[None]:
    """A block that runs where a forward ran."""
    return back_on(chosen)


def array(tensor: torch.Tensor, channels_last: bool = False) -> Any:
    """The array on a tensor's memory, with the tensor's axes, or as ``(N, *spatial, C)`` if channels_last."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        found = tensor.view(torch.int16).numpy(force=True).view(_BFLOAT16)
    else:
        try:
            found = tensor.numpy()
        except RuntimeError:  # negated lazily: there is no memory that holds the values
            found = tensor.resolve_neg().numpy()
    return found.transpose(_TO_LAST[found.ndim]) if channels_last else found


def optional_array(tensor: torch.Tensor | None, channels_last: bool = False) -> Any:
    """:func:`array` of a tensor, None of None."""
    return None if tensor is None else array(tensor, channels_last)


def tensor(found: Any, channels_last: bool = False) -> torch.Tensor:
    """The tensor on the memory of a contiguous array that a floor made, of either order of axes; not a view."""
    if found.dtype == _BFLOAT16:
        return _on_memory(torch.from_numpy(found.view(np.int16)), torch.bfloat16, channels_last)
    made = torch.from_numpy(found)
    return _on_memory(made, made.dtype, channels_last) if channels_last else made


def _on_memory(memory: torch.Tensor, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    shape, strides = memory.shape, memory.stride()
    if channels_last:
        shape = (shape[0], shape[-1], *shape[1:-1])
        strides = (strides[0], strides[-1], *strides[1:-1])
    return torch.empty(0, dtype=dtype).set_(memory.untyped_storage(), 0, shape, strides)


def store(target: torch.Tensor, found: Any, channels_last: bool = False) -> torch.Tensor:
    """Write what a floor found, of either order of axes, to a tensor."""
    array(target, channels_last)[...] = found
    return target


def empty(shape: Any, dtype: torch.dtype, like: torch.Tensor, channels_last: bool = False) -> torch.Tensor:
    """A new tensor beside another, by torch's allocator: contiguous, or in the format where channels are last."""
    if channels_last:
        return torch.empty(shape, dtype=dtype, device=like.device, memory_format=_CHANNELS_LAST[len(shape)])
    return like.new_empty(shape) if like.dtype is dtype else like.new_empty(shape, dtype=dtype)


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether torch's layers would answer in channels_last or channels_last_3d: ``suggest_memory_format``."""
    rank = x.dim()
    if rank not in (4, 5):
        return False
    if x.is_contiguous():
        # Both formats at once, where only sizes of 1 differ: torch goes by the strides.
        return x.stride(1) == 1 and _strides_are_channels_last(x)
    return x.is_contiguous(memory_format=_CHANNELS_LAST[rank])


def _strides_are_channels_last(x: torch.Tensor) -> bool:
    least = 0
    for axis in (1, *range(x.dim() - 1, 1, -1), 0):
        size, stride = x.shape[axis], x.stride(axis)
        if size == 0 or stride < least or (axis == 0 and least == x.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True
