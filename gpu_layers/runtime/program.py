"""Programs: the work of an operation on arrays of one signature, recorded once and run in each call.

A launcher of ``gpu_layers.kernels`` computes grids, blocks and the structs that kernels take from shapes, dtypes and
arguments alone. So it runs once for each of them, on operands, which have a shape and a dtype but no memory. What it
asks for is recorded: arrays to allocate, kernels to launch. A call then looks the program up and runs it. The arrays'
library allocates, in one place (``gpu_layers.runtime.arrays``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np

from gpu_layers.core.array import Array, DTypeLike
from gpu_layers.runtime.arrays import ALIGNMENT, KINDS, ArrayKind, kind_of
from gpu_layers.runtime.copying import ready_copy
from gpu_layers.runtime.kernel import Arguments, Kernel
from gpu_layers.runtime.limits import limits
from gpu_layers.runtime.steps import Allocate, Compute, CooperativeLaunchRefusedError, Deliver, Launch, Views


class Operand:
    """An array of a program, before it exists.

    Attributes
    ----------
    program : Program
    slot : int
        Its number among the program's arrays.
    shape : tuple of int
    dtype : numpy.dtype
    is_ready : bool
        Whether kernels can use it as it is: C-contiguous, at a multiple of 16 bytes.
    is_contiguous : bool
        Whether kernels can go through it element by element: C-contiguous, each at its natural address.
    is_writeable : bool
    of_bytes : bool
        Whether it stands for the bytes of the array, whatever its dtype.
    """

    __slots__ = ("dtype", "is_contiguous", "is_ready", "is_writeable", "of_bytes", "program", "shape", "slot")

    def __init__(
        self,
        program: Program,
        slot: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        *,
        is_ready: bool = True,
        is_contiguous: bool = True,
        is_writeable: bool = True,
        of_bytes: bool = False,
    ) -> None:
        self.program, self.slot, self.shape, self.dtype = program, slot, shape, dtype
        self.is_ready, self.is_contiguous, self.is_writeable = is_ready, is_contiguous, is_writeable
        self.of_bytes = of_bytes

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def reshape(self, *shape: int) -> Operand:
        """The same memory of a ready operand in another shape; a result is returned in the shape it is reshaped to."""
        if math.prod(shape) != self.size or not self.is_ready:
            raise ValueError(f"an operand of shape {self.shape} has no view of shape {shape}")
        return Operand(
            self.program, self.slot, shape, self.dtype, is_writeable=self.is_writeable, of_bytes=self.of_bytes
        )

    def as_bytes(self) -> Operand:
        """The same memory as bytes."""
        shape = (self.size * self.dtype.itemsize,)
        bytes_of = np.dtype(np.uint8)
        return Operand(self.program, self.slot, shape, bytes_of, is_writeable=self.is_writeable, of_bytes=True)


@dataclass(frozen=True)
class Number:
    """An unsigned 64-bit number that changes from call to call."""

    program: Program
    slot: int


class Program:
    """The steps of an operation on arrays of one signature.

    Parameters
    ----------
    kind : ArrayKind
    arrays : sequence of array or None
        Those of the first call: the program is recorded for their shapes, dtypes and layouts.
    numbers : int
        Number of numbers that each call passes.

    Attributes
    ----------
    device : int or None
        Number of the GPU; None for arrays in the host's memory.
    operands : tuple of Operand or None
        One for each array.
    steps : list
    slots : int
        How many arrays and numbers there are.
    """

    def __init__(self, kind: ArrayKind, arrays: Sequence[Array], numbers: int) -> None:
        devices = {kind.device(array) for array in arrays if array is not None}
        if len(devices) != 1:
            raise ValueError(f"the arrays must all be on one device, got {sorted(devices, key=str)}")
        self.kind, self.device = kind, devices.pop()
        self.operands = tuple(
            None
            if array is None
            else Operand(
                self,
                slot,
                tuple(array.shape),
                kind.dtype(array),
                is_ready=kind.is_ready(array),
                is_contiguous=kind.is_contiguous(array),
                is_writeable=kind.is_writeable(array),
            )
            for slot, array in enumerate(arrays)
        )
        self.numbers = tuple(Number(self, len(arrays) + index) for index in range(numbers))
        self.steps: list[Any] = []
        self.slots = len(arrays) + numbers
        self._shapes: dict[int, tuple[int, ...]] = {}
        self.result: Array = None

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike, *, zeroed: bool = False) -> Operand:
        """An uninitialised array, or one of zeros."""
        operand = Operand(self, self._new_slot(), tuple(int(size) for size in shape), np.dtype(dtype))
        self.steps.append(Allocate(operand.slot, operand.shape, operand.dtype, zeroed))
        return operand

    def views(
        self,
        operand: Operand,
        offsets: Sequence[int],
        shapes: Sequence[tuple[int, ...]],
        dtype: DTypeLike | None = None,
    ) -> list[Operand]:
        """Parts of a contiguous operand in the same memory, of its dtype or another, each after so many elements."""
        if not operand.is_contiguous:
            raise ValueError(f"an operand of shape {operand.shape} that is not contiguous has no parts in its memory")
        slots = tuple([self._new_slot() for _ in offsets])
        dtype = operand.dtype if dtype is None else np.dtype(dtype)
        self.steps.append(Views(slots, operand.slot, tuple(offsets), tuple(shapes), dtype))
        return [
            Operand(
                self,
                slot,
                shape,
                dtype,
                is_ready=operand.is_ready and offset * dtype.itemsize % ALIGNMENT == 0,
                is_writeable=operand.is_writeable,
            )
            for slot, offset, shape in zip(slots, offsets, shapes, strict=True)
        ]

    def rows(self, operand: Operand) -> list[Operand]:
        """The rows of an array of two axes, in the same memory."""
        count, length = operand.shape
        return self.views(operand, range(0, count * length, length), [(length,)] * count)

    def split(self, operand: Operand, bounds: Sequence[int]) -> list[Operand]:
        """Its parts along the first axis, in the same memory: part i from bounds[i] to bounds[i + 1]."""
        shape, of_one = operand.shape[1:], math.prod(operand.shape[1:])
        offsets = [start * of_one for start in bounds[:-1]]
        return self.views(operand, offsets, [(stop - start, *shape) for start, stop in pairwise(bounds)])

    def compute(
        self, function: Callable[..., object], operands: Sequence[Operand], shape: tuple[int, ...], dtype: DTypeLike
    ) -> Operand:
        """The result of ``function(xp, *arrays)``, of this shape and dtype; ``xp`` is the array library."""
        result = Operand(self, self._new_slot(), shape, np.dtype(dtype))
        self.steps.append(Compute(result.slot, function, tuple(operand.slot for operand in operands)))
        return result

    def ready(self, operand: Operand) -> Operand:
        """The operand, or a copy that kernels can use."""
        if operand.is_ready:
            return operand
        return self.compute(ready_copy, [operand], operand.shape, operand.dtype)

    def deliver(self, operand: Operand, target: Operand) -> Operand:
        """Copy into an array of the caller."""
        self.steps.append(Deliver(operand.slot, target.slot))
        return target

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Arguments,
        shared_bytes: int,
        cooperative: bool,
    ) -> None:
        """Start a kernel; see ``gpu_layers.runtime.launch``, which has checked the arguments."""
        self.steps.append(Launch(kernel, grid, block, arguments, shared_bytes, cooperative))

    def returns(self, result: Array) -> None:
        """Set what each call returns: an operand, None, or a tuple of these."""
        self._take_shapes(result)
        self.result = result
        self.steps = [
            Allocate(step.slot, self._shapes.get(step.slot, step.shape), step.dtype, step.zeroed)
            if isinstance(step, Allocate)
            else step
            for step in self.steps
        ]
        # Where there is no result there is a slot that stays empty.
        empty = self._new_slot()
        slots = [empty if one is None else one.slot for one in (result if isinstance(result, tuple) else (result,))]
        #: Picks what a call returns among the arrays.
        self.results: Callable[[list[Any]], Any] = itemgetter(*slots)
        if isinstance(result, tuple) and len(slots) == 1:
            self.results = lambda objects: (objects[slots[0]],)
        used = [step.of for step in self.steps if isinstance(step, Compute)]
        used += [(step.source, step.target) for step in self.steps if isinstance(step, Deliver)]
        needed = set(self._shapes).union(*used)
        allocated = {step.slot for step in self.steps if isinstance(step, Allocate)}
        for step in reversed(self.steps):
            # What is allocated has parts without being an array itself.
            if isinstance(step, Views) and step.of not in allocated and not needed.isdisjoint(step.slots):
                needed.add(step.of)
        #: Slots that must be arrays of the library; memory is enough for the others.
        self.needs_array = frozenset(needed)
        #: Runs the steps on arrays of the recorded signature: ``run(arrays, addresses, numbers)``.
        self.run = self.kind.runner(self)

    def _new_slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    def _take_shapes(self, result: Array) -> None:
        if isinstance(result, tuple):
            for one in result:
                self._take_shapes(one)
        elif result is not None:
            self._shapes[result.slot] = result.shape


#: What a launcher's function is given: operands, None where there is no array, and numbers that it only hands on.
Operands: TypeAlias = Sequence[Array]
Numbers: TypeAlias = tuple[Any, ...]


class Launcher:
    """A function on operands, and its programs.

    Parameters
    ----------
    record : callable
        ``record(operands, numbers, *arguments)`` asks for arrays and launches, and returns the operands that the call
        returns. It may depend on shapes, dtypes and layouts of the operands, on the arguments and on the limits in
        force, and on nothing else.
    """

    # Programs that are kept, of some kilobytes each; the oldest goes first.
    MOST = 4096

    def __init__(self, record: Callable[..., object]) -> None:
        self._record = record
        self._programs: dict[Hashable, Program] = {}

    def __call__(self, arrays: Sequence[Array], arguments: Arguments = (), numbers: tuple[int, ...] = ()) -> Any:
        """Run the program of this call.

        Parameters
        ----------
        arrays : sequence of array or None
            Of one kind and on one device; the first must not be None.
        arguments : tuple of hashable
            The program may depend on these.
        numbers : tuple of int
            The program may not depend on these.

        Returns
        -------
        array, tuple or None
            What the program returns.
        """
        first = arrays[0]
        if type(first) is Operand:
            return self._record(arrays, numbers, *arguments)
        kind = KINDS.get(type(first)) or kind_of(first)
        signature, addresses = kind.read(arrays)
        key = (kind, limits(), arguments, signature)
        program = self._programs.get(key)
        if program is None:
            program = self._recorded(key, kind, arrays, arguments, len(numbers))
        try:
            return program.run(arrays, addresses, numbers)
        except CooperativeLaunchRefusedError:
            # Nothing was written: record the kernels that need no cooperative launch.
            return self._recorded(key, kind, arrays, arguments, len(numbers)).run(arrays, addresses, numbers)

    def _recorded(
        self, key: Hashable, kind: ArrayKind, arrays: Sequence[Array], arguments: Arguments, numbers: int
    ) -> Program:
        program = Program(kind, arrays, numbers)
        with kind.on(program.device):
            program.returns(self._record(program.operands, program.numbers, *arguments))
        if len(self._programs) >= self.MOST:
            self._programs.pop(next(iter(self._programs)), None)
        self._programs[key] = program
        return program
