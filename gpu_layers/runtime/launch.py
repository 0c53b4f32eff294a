"""The one function that starts every kernel, on a GPU or emulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_layers.core.cuda import is_cupy_array
from gpu_layers.core.reference_gpu import MULTIPROCESSORS, RESERVED_BYTES, SHARED_BYTES
from gpu_layers.runtime.arrays import kind_of
from gpu_layers.runtime.gpu import is_refused, resident_blocks_of_gpu
from gpu_layers.runtime.kernel import Kernel, Parameter
from gpu_layers.runtime.limits import limits
from gpu_layers.runtime.program import Number, Operand, Program
from gpu_layers.runtime.steps import Slot

_MAX_BLOCK_THREADS = 1024
_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_BLOCK = (1024, 1024, 64)
MAX_SHARED_BYTES = SHARED_BYTES - RESERVED_BYTES
#: Two on each multiprocessor.
EMULATED_RESIDENT_BLOCKS = 2 * MULTIPROCESSORS


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
        raise ValueError(f"{kernel}: grid must be in 1 .. {_MAX_GRID}, got {grid}")
    if not _fits(block, _MAX_BLOCK):
        raise ValueError(f"{kernel}: block must be in 1 .. {_MAX_BLOCK}, got {block}")
    if block[0] * block[1] * block[2] > _MAX_BLOCK_THREADS:
        raise ValueError(f"{kernel}: block must have at most {_MAX_BLOCK_THREADS} threads, got {block}")
    if not 0 <= shared_bytes <= MAX_SHARED_BYTES:
        raise ValueError(f"{kernel}: shared_bytes must be in 0 .. {MAX_SHARED_BYTES}, got {shared_bytes}")


def _where(kernel: Kernel, parameter: Parameter) -> str:
    return f"{kernel}: argument {parameter.name} ({parameter.c_type})"


def _check_operand(kernel: Kernel, parameter: Parameter, value: object) -> None:
    if not isinstance(value, Operand):
        raise TypeError(f"{_where(kernel, parameter)} needs an array, got {type(value).__name__}")
    if value.dtype != parameter.dtype:
        raise TypeError(f"{_where(kernel, parameter)} needs an array of {parameter.dtype}, got {value.dtype}")
    if not value.is_contiguous:
        raise ValueError(f"{_where(kernel, parameter)} needs an array that is C-contiguous and aligned, got another")
    if not (parameter.is_const or value.is_writeable):
        raise ValueError(f"{_where(kernel, parameter)} is written to, but the array is read-only")


def _scalar(kernel: Kernel, parameter: Parameter, value: object) -> np.ndarray:
    """A scalar or struct as an array of one element of the declared type."""
    if isinstance(value, Operand) or (isinstance(value, np.ndarray) and value.size != 1):
        raise TypeError(f"{_where(kernel, parameter)} needs a scalar, got an array")
    if parameter.dtype.kind in "iu" and not isinstance(value, (int, np.integer)):
        raise TypeError(f"{_where(kernel, parameter)} needs an integer, got {type(value).__name__}")
    try:
        return np.asarray(value, dtype=parameter.dtype)
    except OverflowError as error:
        raise ValueError(f"{_where(kernel, parameter)} is out of range, got {value}") from error


def _numbers(kernel: Kernel, parameter: Parameter, numbers: tuple[Number, ...]) -> Slot:
    """Numbers of a program whose slots, of 8 bytes each, are a struct."""
    first = numbers[0].slot
    if parameter.is_pointer or parameter.dtype.itemsize != 8 * len(numbers):
        raise TypeError(f"{_where(kernel, parameter)} does not consist of {len(numbers)} numbers")
    if [number.slot for number in numbers] != [*range(first, first + len(numbers))]:
        raise ValueError(f"{_where(kernel, parameter)} needs numbers that follow one another")
    return Slot(first)


def launch(
    kernel: Kernel,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    args: Sequence[Any],
    *,
    shared_bytes: int = 0,
    cooperative: bool = False,
) -> None:
    """Start a kernel on the device of its arrays; on a GPU asynchronously.

    Parameters
    ----------
    kernel : Kernel
    grid, block : int or sequence of up to three int
        Number of blocks, and of threads in a block.
    args : sequence
        One for each parameter. For a pointer: an operand of a program, or None, a null pointer. Otherwise: a number, a
        structured scalar, a :class:`Number` of the program, or neighbours among these for a struct. Every number is
        converted to the declared type, which the GPU itself would not check. With arrays instead of operands the kernel
        starts at once.
    shared_bytes : int
        Dynamic shared memory of a block.
    cooperative : bool
        All blocks are resident at once, so they may wait for each other.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit its declaration, or no GPU takes the geometry.
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
        elif isinstance(value, tuple) and value and isinstance(value[0], Number):
            arguments.append(_numbers(kernel, parameter, value))
        elif not parameter.is_pointer:
            arguments.append(_scalar(kernel, parameter, value))
        elif value is None:
            arguments.append(None)
        else:
            _check_operand(kernel, parameter, value)
            arguments.append(Slot(value.slot, value.of_bytes))
    program.launch(kernel, grid, block, tuple(arguments), shared_bytes, cooperative)


def _launch_arrays(
    kernel: Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[object],
    shared_bytes: int,
    cooperative: bool,
) -> None:
    """A program of one launch, run once."""
    places = [index for index, parameter in enumerate(kernel.parameters) if parameter.is_pointer]
    for index in places:
        if args[index] is not None and not (isinstance(args[index], np.ndarray) or is_cupy_array(args[index])):
            # The error of an operand.
            _check_operand(kernel, kernel.parameters[index], args[index])
    arrays = [args[index] for index in places if args[index] is not None]
    if not arrays:
        raise ValueError(f"{kernel}: a launch needs at least one array, whose device it runs on, got none")
    program = Program(kind_of(arrays[0]), arrays, 0)
    operands = iter(program.operands)
    bound = [next(operands) if index in places and value is not None else value for index, value in enumerate(args)]
    launch(kernel, grid, block, bound, shared_bytes=shared_bytes, cooperative=cooperative)
    program.returns(None)
    program.run(arrays, program.kind.read(arrays)[1], ())


def resident_blocks(
    kernel: Kernel, block: int | Sequence[int], shared_bytes: int, like: Operand, *, cooperative: bool
) -> int:
    """Number of blocks of a launch that can be resident at once: the most that a cooperative launch may have.

    Parameters
    ----------
    kernel : Kernel
    block, shared_bytes, cooperative
        As in :func:`launch`.
    like : Operand
        An operand on the GPU in question. For NumPy arrays it is the emulator's number, that of an H100.

    Returns
    -------
    int
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
