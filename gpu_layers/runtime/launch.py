"""The one seam through which every kernel starts, on a GPU or emulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_layers.runtime.arrays import kind_of
from gpu_layers.runtime.cuda import is_cupy_array
from gpu_layers.runtime.gpu import is_refused, resident_blocks_of_gpu
from gpu_layers.runtime.kernel import Kernel, Parameter
from gpu_layers.runtime.limits import limits
from gpu_layers.runtime.program import Number, Operand, Program
from gpu_layers.runtime.steps import Slot

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


def _check_operand(kernel: Kernel, parameter: Parameter, value: Any) -> None:
    if not isinstance(value, Operand):
        raise TypeError(f"{_where(kernel, parameter)} needs an array, got {type(value).__name__}")
    if value.dtype != parameter.dtype:
        raise TypeError(f"{_where(kernel, parameter)} needs an array of {parameter.dtype}, got {value.dtype}")
    if not value.is_contiguous:
        raise ValueError(f"{_where(kernel, parameter)} needs a C-contiguous array")
    if not (parameter.is_const or value.is_writeable):
        raise ValueError(f"{_where(kernel, parameter)} is written to, but the array is read-only")


def _scalar(kernel: Kernel, parameter: Parameter, value: Any) -> np.ndarray:
    """A scalar or struct, as an array of one element of exactly the declared type."""
    if isinstance(value, Operand) or (isinstance(value, np.ndarray) and value.size != 1):
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
        One a parameter: an operand of a program (or None, a null pointer) for a pointer; a number, a structured scalar
        or a :class:`Number` of the program else. Every number is converted to the declared type, which the GPU itself
        would not check. With arrays in place of operands the kernel is started at once.
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
    program = next((value.program for value in args if isinstance(value, Operand)), None)
    if program is None:
        _launch_arrays(kernel, grid, block, args, shared_bytes, cooperative)
        return
    arguments: list[Any] = []
    for parameter, value in zip(kernel.parameters, args, strict=True):
        if isinstance(value, Number) and parameter.dtype == np.uint64:
            arguments.append(Slot(value.slot))
        elif not parameter.is_pointer:
            arguments.append(_scalar(kernel, parameter, value))
        elif value is None:
            arguments.append(None)
        else:
            _check_operand(kernel, parameter, value)
            arguments.append(Slot(value.slot, value.of_bytes))
    program.launch(kernel, grid, block, tuple(arguments), shared_bytes, cooperative)


def _launch_arrays(
    kernel: Kernel, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared_bytes: int, cooperative: bool
) -> None:
    """A program of one launch, run once."""
    places = [index for index, parameter in enumerate(kernel.parameters) if parameter.is_pointer]
    for index in places:
        if args[index] is not None and not (isinstance(args[index], np.ndarray) or is_cupy_array(args[index])):
            # As of an operand.
            _check_operand(kernel, kernel.parameters[index], args[index])
    arrays = [args[index] for index in places if args[index] is not None]
    if not arrays:
        raise ValueError(f"{kernel}: a launch needs an array, which says where it runs")
    program = Program(kind_of(arrays[0]), arrays, 0)
    operands = iter(program.operands)
    bound = [next(operands) if index in places and value is not None else value for index, value in enumerate(args)]
    launch(kernel, grid, block, bound, shared_bytes=shared_bytes, cooperative=cooperative)
    program.returns(None)
    program.run(arrays, ())


def resident_blocks(
    kernel: Kernel, block: int | Sequence[int], shared_bytes: int, like: Operand, *, cooperative: bool
) -> int:
    """Blocks of a launch that can be resident at once, which is all that a cooperative one may have.

    Parameters
    ----------
    kernel : Kernel
    block, shared_bytes, cooperative
        As of :func:`launch`.
    like : Operand
        On the GPU in question; for NumPy arrays the emulator's, which are those of an H100.
    """
    x, y, z = _three(block)
    device = like.program.device
    if device is None:
        most = EMULATED_RESIDENT_BLOCKS
    elif cooperative and is_refused(kernel, device):
        most = 0
    else:
        most = resident_blocks_of_gpu(kernel, x * y * z, shared_bytes, device, cooperative)
    return min(most, limits().max_blocks)
