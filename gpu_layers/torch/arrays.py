"""Decides which backend computes on a tensor, and how the tensor is passed to it.

The reference takes a tensor of the CPU as a NumPy array on its own memory. Kernels take tensors themselves
(``tensors.py``), on a GPU or emulated. Results lie in memory that is a tensor's own, never a view's. What an
operation's ``run`` needs of the device is here (and, for random numbers, in ``random.py``), and nowhere else here.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from functools import cached_property
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch

from gpu_layers.runtime.backend import back_on, forced_backend
from gpu_layers.torch.tensors import BFLOAT16, TO_LAST, as_numpy, borrowed

#: What layers take; all others are a TypeError.
FLOAT_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
#: Formats in which channels lie side by side, by the number of axes.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
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


class Reference:
    """The NumPy reference, on the memory of CPU tensors.

    Attributes
    ----------
    floor : module
        ``gpu_layers.reference``.
    """

    @cached_property
    def floor(self) -> ModuleType:
        """See the class."""
        return importlib.import_module("gpu_layers.reference")

    #: What the floor takes. Nothing but the caller keeps the tensor alive meanwhile.
    array = staticmethod(as_numpy)

    def raw(self, found: Any, channels_last: bool = False) -> Any:
        """What the floor takes, of a tensor or of what was kept."""
        return found if isinstance(found, np.ndarray) else self.array(found, channels_last)

    def parameters(self, weight: torch.Tensor | None, bias: torch.Tensor | None, dtype: torch.dtype) -> Any:
        """Weight and bias of channels, in the dtype of the arithmetic."""
        if (
            weight is not None
            and bias is not None
            and weight.dtype is dtype
            and bias.dtype is dtype
            and weight.is_contiguous()
            and bias.is_contiguous()
            and not (weight.is_neg() or bias.is_neg())
        ):
            return borrowed((weight.data_ptr(), bias.data_ptr()), weight.shape, dtype)
        return _parameter(weight, dtype), _parameter(bias, dtype)

    def buffers(self, mean: torch.Tensor, var: torch.Tensor, batches: torch.Tensor) -> Any:
        """What the floor changes in place: of channels, and a number."""
        if mean.is_contiguous() and var.is_contiguous():
            found = borrowed((mean.data_ptr(), var.data_ptr()), mean.shape, mean.dtype)
        else:
            found = self.array(mean), self.array(var)
        return *found, *borrowed((batches.data_ptr(),), (), torch.int64)

    def tensor(self, found: Any, channels_last: bool = False) -> torch.Tensor:
        """The tensor on the memory of a contiguous result of the floor, of either order of axes; not a view."""
        if found.dtype is BFLOAT16:
            return _on_memory(torch.from_numpy(found.view(np.int16)), torch.bfloat16, channels_last)
        made = torch.from_numpy(found)
        return _on_memory(made, made.dtype, True) if channels_last else made

    def kept(self, found: Any, channels_last: bool = False) -> Any:
        """A result that only a backward needs, which is spared the tensor."""
        return found


def _parameter(tensor: torch.Tensor | None, dtype: torch.dtype) -> Any:
    if tensor is None:
        return None
    if tensor.dtype is dtype and tensor.is_contiguous() and not tensor.is_neg():
        return borrowed((tensor.data_ptr(),), tensor.shape, dtype)[0]
    return tensor.to(dtype, copy=True).contiguous().numpy(force=True)


class Kernels:
    """The kernels, on tensors themselves.

    Attributes
    ----------
    floor : module
        ``gpu_layers.kernels``.
    """

    @cached_property
    def floor(self) -> ModuleType:
        """See the class."""
        return importlib.import_module("gpu_layers.kernels")

    def array(self, tensor: torch.Tensor, channels_last: bool = False) -> Any:
        """What the floor takes: with the tensor's axes, or as ``(N, *spatial, C)`` if channels_last."""
        if tensor.is_neg():  # lazily: there is no memory that holds the values
            tensor = tensor.resolve_neg()
        return tensor.permute(TO_LAST[tensor.dim()]) if channels_last else tensor

    raw = array

    def parameters(self, weight: torch.Tensor | None, bias: torch.Tensor | None, dtype: torch.dtype) -> tuple[Any, Any]:
        """Weight and bias of channels, in the dtype of the arithmetic."""
        given = None if weight is None else self.array(weight.to(dtype))
        return given, None if bias is None else self.array(bias.to(dtype))

    def buffers(self, *tensors: torch.Tensor) -> Any:
        """What the floor changes in place."""
        return tensors

    def tensor(self, found: Any, channels_last: bool = False) -> torch.Tensor:
        """The result of the floor, contiguous in either order of axes, with a tensor's axes; not a view."""
        if channels_last or found._is_view():
            return _on_memory(found, found.dtype, channels_last)
        return found

    kept = tensor


def _on_memory(memory: torch.Tensor, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    shape, strides = memory.shape, memory.stride()
    if channels_last:
        shape = (shape[0], shape[-1], *shape[1:-1])
        strides = (strides[0], strides[-1], *strides[1:-1])
    made = torch.empty(0, dtype=dtype, device=memory.device)
    return made.set_(memory.untyped_storage(), memory.storage_offset(), shape, strides)


#: What computes.
Place: TypeAlias = Reference | Kernels
_REFERENCE, _KERNELS = Reference(), Kernels()


def here(tensor: torch.Tensor) -> Place:
    """What computes with this tensor: :class:`Reference` or :class:`Kernels`, on its GPU or emulated.

    Raises
    ------
    TypeError
        If the backend that is forced does not take tensors of this device.
    """
    choice = forced_backend()
    if choice is None:
        return _REFERENCE if tensor.is_cpu else _KERNELS
    if (choice.name == "cuda") == tensor.is_cpu:
        needed = "CUDA" if choice.name == "cuda" else "CPU"
        raise TypeError(f"the {choice.name} backend takes {needed} tensors, got one on {tensor.device}")
    return _REFERENCE if choice.name == "reference" else _KERNELS


def tensor_of(found: Any, channels_last: bool = False) -> torch.Tensor:
    """The tensor of what was kept."""
    return _REFERENCE.tensor(found, channels_last) if isinstance(found, np.ndarray) else found


#: Where a forward runs, so that its backward can be sent there: see :func:`at`.
place = forced_backend


def at(chosen: Any) -> AbstractContextManager[None]:
    """A block that runs where a forward ran."""
    return back_on(chosen)


def empty(shape: Any, dtype: torch.dtype, like: torch.Tensor, channels_last: bool = False) -> torch.Tensor:
    """A new tensor beside another, by torch's allocator: contiguous, or in the format where channels are last."""
    if channels_last:
        return torch.empty(shape, dtype=dtype, device=like.device, memory_format=_CHANNELS_LAST[len(shape)])
    return like.new_empty(shape) if like.dtype is dtype else like.new_empty(shape, dtype=dtype)


def in_format(tensor: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """The tensor itself, or one of its values where channels are to be last and are not."""
    if not channels_last:
        return tensor
    # Not by torch's memory format, which batched gradients do not know.
    return tensor.permute(TO_LAST[tensor.dim()]).contiguous().movedim(-1, 1)


def is_capturing(x: torch.Tensor) -> bool:
    """Whether x is on a GPU whose current stream is recording a graph: nothing may wait for the device then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def is_channels_last(shape: Any, strides: Any) -> bool:
    """Whether torch's layers would answer in channels_last or channels_last_3d: ``suggest_memory_format``."""
    if len(shape) not in (4, 5) or (strides[1] != 1 and shape[1] != 1):
        return False
    order = (1, *range(len(shape) - 1, 1, -1), 0)
    if 0 in shape or not _are_dense(shape, strides, order):
        return False
    # Both formats at once, where only sizes of 1 differ: torch goes by the strides.
    if not _are_dense(shape, strides, range(len(shape) - 1, -1, -1)):
        return True
    return strides[1] == 1 and _strides_are_channels_last(shape, strides, order)


def is_dense(x: torch.Tensor, channels_last: bool) -> bool:
    """Whether the values of x lie in memory without gaps, in this format."""
    if x.is_neg():  # lazily: other values lie there
        return False
    return x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()]) if channels_last else x.is_contiguous()


def _are_dense(shape: Any, strides: Any, order: Any) -> bool:
    """Whether these axes, from the innermost on, lie in memory without gaps; sizes of 1 lie anywhere."""
    expected = 1
    for axis in order:
        if shape[axis] != 1:
            if strides[axis] != expected:
                return False
            expected *= shape[axis]
    return True


def _strides_are_channels_last(shape: Any, strides: Any, order: Any) -> bool:
    least = 0
    for axis in order:
        size, stride = shape[axis], strides[axis]
        if stride < least or (axis == 0 and least == strides[1]):
            return False
        least = stride * size if size > 1 else stride
    return True
