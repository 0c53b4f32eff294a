"""The one seam through which every kernel starts, on a GPU or emulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_layers.runtime.backend import emulation
from gpu_layers.runtime.cuda import is_cupy_array
from gpu_layers.runtime.gpu import launch_on_gpu
from gpu_layers.runtime.kernel import Kernel, Parameter

_MAX_BLOCK_THREADS = 1024
_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_BLOCK = (1024, 1024, 64)
MAX_SHARED_BYTES = 227 * 1024


def _three(sizes: int | Sequence[int]) -> tuple[int, int, int]:
    extent = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    x, y, z = extent + (1,) * (3 - len(extent))
    return int(x), int(y), int(z)


def _check_geometry(kernel: Kernel, grid: tuple, block: tuple, shared_bytes: int) -> None:
    if any(not 1 <= size <= limit for size, limit in zip(grid, _MAX_GRID, strict=True)):
        raise ValueError(f"{kernel}: grid {grid} is outside 1 .. {_MAX_GRID}")
    if any(not 1 <= size <= limit for size, limit in zip(block, _MAX_BLOCK, strict=True)):
        raise ValueError(f"{kernel}: block {block} is outside 1 .. {_MAX_BLOCK}")
    if block[0] * block[1] * block[2] > _MAX_BLOCK_THREADS:
        raise ValueError(f"{kernel}: block {block} has more than {_MAX_BLOCK_THREADS} threads")
    if not 0 <= shared_bytes <= MAX_SHARED_BYTES:
        raise ValueError(f"{kernel}: {shared_bytes} bytes of shared memory are outside 0 .. {MAX_SHARED_BYTES}")


def _bind(kernel: Kernel, parameter: Parameter, value: Any) -> Any:
    """Check one argument; a scalar or struct becomes an array of one element of exactly the declared type."""
    where = f"{kernel}: argument {parameter.name} ({parameter.c_type})"
    if parameter.is_pointer:
        if value is None:
            return None
        if not (isinstance(value, np.ndarray) or is_cupy_array(value)):
            raise TypeError(f"{where} needs an array, got {type(value).__name__}")
        if value.dtype != parameter.dtype:
            raise TypeError(f"{where} needs an array of {parameter.dtype}, got {value.dtype}")
        if not value.flags.c_contiguous:
            raise ValueError(f"{where} needs a C-contiguous array")
        if isinstance(value, np.ndarray) and not (parameter.is_const or value.flags.writeable):
            raise ValueError(f"{where} is written to, but the array is read-only")
        return value
    if is_cupy_array(value) or (isinstance(value, np.ndarray) and value.size != 1):
        raise TypeError(f"{where} needs a scalar, got an array")
    if parameter.dtype.kind in "iu" and not isinstance(value, (int, np.integer)):
        raise TypeError(f"{where} needs an integer, got {type(value).__name__}")
    try:
        return np.asarray(value, dtype=parameter.dtype)
    except OverflowError as error:
        raise ValueError(f"{where} does not hold {value}") from error


def launch(
    kernel: Kernel,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    args: Sequence[Any],
    *,
    shared_bytes: int = 0,
    cooperative: bool = False,
) -> None:
    """Start a kernel, asynchronously on a GPU, where its arrays are.

    Parameters
    ----------
    kernel : Kernel
    grid, block : int or sequence of up to three int
        Blocks, and threads a block.
    args : sequence
        One a parameter: an array (or None, a null pointer) for a pointer, a number or a structured scalar else.
        Every number is converted to the declared type, which the GPU itself would not check.
    shared_bytes : int
        Dynamic shared memory a block.
    cooperative : bool
        All blocks resident at once, so that they may wait for each other.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what the kernel declares, or the geometry is beyond what any GPU takes.
    """
    grid, block = _three(grid), _three(block)
    _check_geometry(kernel, grid, block, shared_bytes)
    if len(args) != len(kernel.parameters):
        raise TypeError(f"{kernel} takes {len(kernel.parameters)} arguments, got {len(args)}")
    values = [_bind(kernel, parameter, value) for parameter, value in zip(kernel.parameters, args, strict=True)]
    arrays = [
        value
        for parameter, value in zip(kernel.parameters, values, strict=True)
        if parameter.is_pointer and value is not None
    ]
    devices = {array.device.id if is_cupy_array(array) else None for array in arrays}
    if len(devices) != 1:
        raise ValueError(f"{kernel}: the arrays must all be on one device")
    device = devices.pop()
    if device is None:
        emulation().launch(kernel, grid, block, values, shared_bytes, cooperative)
    else:
        launch_on_gpu(kernel, grid, block, values, device, shared_bytes, cooperative)
