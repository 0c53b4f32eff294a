"""The one seam through which every kernel starts, on a GPU or emulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_layers.runtime.backend import emulation
from gpu_layers.runtime.cuda import is_cupy_array
from gpu_layers.runtime.gpu import launch_on_gpu, resident_blocks_of_gpu
from gpu_layers.runtime.kernel import Kernel, Parameter
from gpu_layers.runtime.limits import limits

_MAX_BLOCK_THREADS = 1024
_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_BLOCK = (1024, 1024, 64)
MAX_SHARED_BYTES = 227 * 1024
#: Two on each of 132 multiprocessors.
EMULATED_RESIDENT_BLOCKS = 264


def _three(sizes: int | Sequence[int]) -> tuple[int, int, int]:
    if isinstance(sizes, int):
        return int(sizes), 1, 1
    x, y, z = (*sizes, 1, 1, 1)[: max(3, len(sizes))]
    return int(x), int(y), int(z)


def _fits(sizes: tuple[int, int, int], limits: tuple[int, int, int]) -> bool:
    (x, y, z), (most_x, most_y, most_z) = sizes, limits
    return 1 <= x <= most_x and 1 <= y <= most_y and 1 <= z <= most_z


def _check_geometry(kernel: Kernel, grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int) -> None:
    if not _fits(grid, _MAX_GRID):
        raise ValueError(f"{kernel}: grid {grid} is outside 1 .. {_MAX_GRID}")
    if not _fits(block, _MAX_BLOCK):
        raise ValueError(f"{kernel}: block {block} is outside 1 .. {_MAX_BLOCK}")
    if block[0] * block[1] * block[2] > _MAX_BLOCK_THREADS:
        raise ValueError(f"{kernel}: block {block} has more than {_MAX_BLOCK_THREADS} threads")
    if not 0 <= shared_bytes <= MAX_SHARED_BYTES:
        raise ValueError(f"{kernel}: {shared_bytes} bytes of shared memory are outside 0 .. {MAX_SHARED_BYTES}")


def _where(kernel: Kernel, parameter: Parameter) -> str:
    return f"{kernel}: argument {parameter.name} ({parameter.c_type})"


def _check_array(kernel: Kernel, parameter: Parameter, value: Any) -> None:
    is_numpy = isinstance(value, np.ndarray)
    if not (is_numpy or is_cupy_array(value)):
        raise TypeError(f"{_where(kernel, parameter)} needs an array, got {type(value).__name__}")
    if value.dtype != parameter.dtype:
        raise TypeError(f"{_where(kernel, parameter)} needs an array of {parameter.dtype}, got {value.dtype}")
    flags = value.flags
    if not flags.c_contiguous:
        raise ValueError(f"{_where(kernel, parameter)} needs a C-contiguous array")
    if is_numpy and not (parameter.is_const or flags.writeable):
        raise ValueError(f"{_where(kernel, parameter)} is written to, but the array is read-only")


def _scalar(kernel: Kernel, parameter: Parameter, value: Any) -> np.ndarray:
    """A scalar or struct, as an array of one element of exactly the declared type."""
    if is_cupy_array(value) or (isinstance(value, np.ndarray) and value.size != 1):
        raise TypeError(f"{_where(kernel, parameter)} needs a scalar, got an array")
    if parameter.dtype.kind in "iu" and not isinstance(value, (int, np.integer)):
        raise TypeError(f"{_where(kernel, parameter)} needs an integer, got {type(value).__name__}")
    try:
        return np.asarray(value, dtype=parameter.dtype)
    except OverflowError as error:
        raise ValueError(f"{_where(kernel, parameter)} does not hold {value}") from error


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
    values: list[Any] = []
    devices: set[int | None] = set()
    for parameter, value in zip(kernel.parameters, args, strict=True):
        if not parameter.is_pointer:
            values.append(_scalar(kernel, parameter, value))
            continue
        if value is not None:
            _check_array(kernel, parameter, value)
            devices.add(None if isinstance(value, np.ndarray) else value.device.id)
        values.append(value)
    if len(devices) != 1:
        raise ValueError(f"{kernel}: the arrays must all be on one device")
    device = devices.pop()
    if device is None:
        emulation().launch(kernel, grid, block, values, shared_bytes, cooperative)
    else:
        launch_on_gpu(kernel, grid, block, values, device, shared_bytes, cooperative)


def resident_blocks(
    kernel: Kernel, block: int | Sequence[int], shared_bytes: int, like: Any, *, cooperative: bool
) -> int:
    """Blocks of a launch that can be resident at once, which is all that a cooperative one may have.

    Parameters
    ----------
    kernel : Kernel
    block, shared_bytes, cooperative
        As of :func:`launch`.
    like : array
        On the GPU in question; for NumPy arrays the emulator's, which are those of an H100.
    """
    x, y, z = _three(block)
    if isinstance(like, np.ndarray):
        most = EMULATED_RESIDENT_BLOCKS
    else:
        most = resident_blocks_of_gpu(kernel, x * y * z, shared_bytes, like.device.id, cooperative)
    return min(most, limits().max_blocks)
