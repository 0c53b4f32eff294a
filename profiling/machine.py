"""Machine code executed without a GPU: which instructions do the warps of some blocks of a launch execute, how often.

The threads of the chosen blocks are the columns of one register file, and an instruction is a NumPy operation on those
that stand before it. Of the threads of a warp that went different ways, those furthest behind go on, and they meet
again where the code says so (BSSY, BSYNC). Nothing here knows of time.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from profiling.compiled_code import CompiledKernel, Instruction
from profiling.instructions import (
    PREDICATES,
    REGISTERS,
    U32,
    U64,
    Action,
    UnknownInstructionError,
    arithmetic,
    integer,
    predicate,
    register,
    split,
    truth,
    wide,
)

#: Bytes of each array that a sample of blocks reads and writes, again and again: the rest takes no memory.
FOLD = 2**22
_LANES, _SECTOR, _LINE = 32, 32, 128
_RUNNING, _ASLEEP, _AT_JOIN, _AT_BARRIER, _DONE = range(5)
# Where the parameters begin in the bank of constants, and where a block's shared memory begins: a kilobyte is reserved.
_PARAMETERS, _SHARED_BASE = 0x210, 0x400
# Generic addresses of shared memory have these upper 32 bits, which no array's have.
_SHARED_WINDOW = 0x7FFF0000
_JOINS = 16
# What waits for copies to shared memory waits for this register, which no load writes to.
_COPIES = 255
# What a sample of blocks reads where blocks count each other: all have come.
_MANY = 0x7FFFFFFF
_MOST_STEPS = 5_000_000


class MachineError(Exception):
    """The code does what no GPU would survive, or waits for ever."""


@dataclass
class Execution:
    """What some blocks of a launch executed.

    Attributes
    ----------
    blocks, warps : int
        How many were executed.
    executed : ndarray
        Of each instruction of the kernel, how often a warp issued it.
    trips : float
        How often a warp waited for global memory that nobody had read before, on average.
    cached_trips : float
        The same for memory that had been read before.
    loaded_bytes : int
        Bytes of 32-byte sectors that were read for the first time.
    barriers : float
        Barriers of a block, on average.
    arrivals : float
        How often a block counts itself in, where blocks wait for each other.
    pipe_cycles : int
        Of the pipe through which a multiprocessor reaches its memories: one for each line of 128 bytes that an access
        of a warp touches, and one for each lane that asks for something to be brought to a cache.
    """

    blocks: int
    warps: int
    executed: np.ndarray
    trips: float
    cached_trips: float
    loaded_bytes: int
    barriers: float
    arrivals: float
    pipe_cycles: int

    @property
    def warp_instructions(self) -> int:
        """Instructions that were issued, each for a warp."""
        return int(self.executed.sum())


class Memory:
    """Arrays where they are, read and written by address.

    Parameters
    ----------
    arrays : sequence of ndarray
    is_folded : bool
        Use the first megabytes of an array in place of all of it.
    """

    def __init__(self, arrays: Sequence[np.ndarray], is_folded: bool) -> None:
        self._is_folded = is_folded
        places = sorted({(array.ctypes.data, array.nbytes) for array in arrays if array.nbytes})
        self._bases = np.array([base for base, _ in places], U64)
        self._ends = np.array([base + size for base, size in places], U64)
        sectors = [size // _SECTOR + 2 for _, size in places]
        self._first_sector = np.concatenate([[0], np.cumsum(sectors)]).astype(np.int64)
        self._seen = np.zeros(self._first_sector[-1], bool)
        self._low = int(self._bases[0]) & ~15 if places else 0
        size = (int(self._ends.max()) - self._low + 16) if places else 16
        raw: Any = (ctypes.c_uint8 * size).from_address(self._low) if places else (ctypes.c_uint8 * size)()
        memory = np.frombuffer(raw, np.uint8)
        self._views: dict[int, Any] = {
            1: memory,
            2: memory[: size // 2 * 2].view(np.uint16),
            4: memory[: size // 4 * 4].view(U32),
        }

    def _places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        which = np.searchsorted(self._bases, addresses, "right") - 1
        if (which < 0).any() or (addresses + U64(size) > self._ends[which]).any() or (addresses % U64(size)).any():
            raise MachineError(f"an access of {size} bytes outside all arrays, or misaligned")
        return which

    def _folded(self, addresses: np.ndarray, which: np.ndarray) -> np.ndarray:
        if not self._is_folded:
            return addresses
        return self._bases[which] + (addresses - self._bases[which]) % U64(FOLD)

    def load(self, addresses: np.ndarray, size: int) -> list[np.ndarray]:
        """The 32-bit words (or what is smaller) at each address."""
        addresses = self._folded(addresses, self._places(addresses, size))
        unit = min(size, 4)
        first = ((addresses - U64(self._low)) // U64(unit)).astype(np.int64)
        return [self._views[unit][first + word] for word in range(size // unit)]

    def store(self, addresses: np.ndarray, size: int, words: Sequence[Any]) -> None:
        """Write them."""
        addresses = self._folded(addresses, self._places(addresses, size))
        unit = min(size, 4)
        first = ((addresses - U64(self._low)) // U64(unit)).astype(np.int64)
        for number, word in enumerate(words):
            self._views[unit][first + number] = word

    def lines(self, addresses: np.ndarray) -> np.ndarray:
        """Numbers of the lines of 128 bytes; arrays begin with one, too."""
        which = np.searchsorted(self._bases, addresses, "right") - 1
        offset = (addresses - self._bases[which]).astype(np.int64)
        return self._first_sector[which] + offset // _LINE

    def new_sectors(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """For each access whether it is the first to its 32-byte sector, and how many sectors are new."""
        which = self._places(addresses, size)
        # Arrays begin with a sector, as on a GPU.
        offset = (addresses - self._bases[which]).astype(np.int64)
        sector = self._first_sector[which] + offset // _SECTOR
        is_new = ~self._seen[sector]
        count = np.unique(sector[is_new]).size
        self._seen[sector] = True
        return is_new, count


def packed_parameters(values: Sequence[Any]) -> bytes:
    """The parameters as a kernel finds them: each at a multiple of its own alignment."""
    packed = bytearray()
    for value in values:
        if value is None or (isinstance(value, np.ndarray) and value.ndim):
            data, alignment = struct.pack("<Q", 0 if value is None else value.ctypes.data), 8
        else:
            scalar = np.asarray(value)
            data, alignment = scalar.tobytes(), _alignment(scalar.dtype)
        packed += bytes(-len(packed) % alignment) + data
    return bytes(packed)


def _alignment(dtype: np.dtype) -> int:
    if dtype.fields is None:
        return dtype.base.alignment if dtype.subdtype is None else _alignment(dtype.subdtype[0])
    return max(_alignment(field[0]) for field in dtype.fields.values())


@dataclass(frozen=True)
class _Step:
    """An instruction, ready to be executed."""

    instruction: Instruction
    guard: tuple[int, bool] | None
    action: Action | None
    kind: str
    operands: tuple[str, ...]
    sources: frozenset[int]


@cache
def _steps(kernel: CompiledKernel) -> tuple[_Step, ...]:
    return tuple(map(_step, kernel.instructions))


def _step(instruction: Instruction) -> _Step:
    guard = predicate(instruction.predicate[1:]) if instruction.predicate else None
    if guard is not None and guard[0] in (7, 15) and not guard[1]:
        guard = None
    try:
        action = arithmetic(instruction)
    except UnknownInstructionError as error:
        action, message = None, str(error)

        def refuse(threads: Any, at: Any) -> None:
            raise UnknownInstructionError(message)

        action = refuse
    operands = split(instruction.operands)
    read = operands if instruction.mnemonic in ("STG", "STS", "ST", "LDGSTS") else operands[1:]
    sources = {int(number) for text in read for number in re.findall(r"(?<!U)\bR(\d+)", text)}
    # Numbers of 64 bits, and addresses.
    wide_sources = {row + 1 for row in sources}
    return _Step(
        instruction,
        guard,
        action,
        "" if action else instruction.mnemonic,
        tuple(operands),
        frozenset(sources | (wide_sources if instruction.mnemonic.startswith(("D", "LD", "ST")) else set())),
    )


class _Machine:
    def __init__(
        self,
        kernel: CompiledKernel,
        jump_table: bytes,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        values: Sequence[Any],
        dynamic_shared: int,
        blocks: Sequence[int],
    ) -> None:
        self._kernel, self._steps = kernel, _steps(kernel)
        self._index = {instruction.address: i for i, instruction in enumerate(kernel.instructions)}
        self._is_sample = len(blocks) < math.prod(grid)
        size = math.prod(block)
        padded = -(-size // _LANES) * _LANES
        count = padded * len(blocks)
        self.registers = np.zeros((REGISTERS, count), U32)
        self.predicates = np.zeros((PREDICATES, count), bool)
        self.predicates[[7, 15]] = True
        constants = np.zeros(_PARAMETERS // 4, U32)
        constants[:6] = (*block, *grid)
        parameters = packed_parameters(values)
        parameters += bytes(-len(parameters) % 4 + 8)
        self.constants = {
            0: np.concatenate([constants, np.frombuffer(parameters, U32)]),
            2: np.frombuffer(jump_table + bytes(-len(jump_table) % 4), U32),
        }
        self.memory = Memory([v for v in values if isinstance(v, np.ndarray) and v.ndim], self._is_sample)
        shared = max(0, kernel.resources.shared - _SHARED_BASE) + dynamic_shared
        self._shared_size = -(-shared // 16) * 16 + 16
        self._shared = np.zeros((len(blocks), self._shared_size), np.uint8)
        self._block_of = np.repeat(np.arange(len(blocks)), padded)
        self._warp_of = np.arange(count) // _LANES
        self._warps = count // _LANES
        self._lane = np.arange(count) % _LANES
        self._bit = (U32(1) << self._lane.astype(U32)).astype(U32)
        thread, number = np.arange(count) % padded, np.repeat(np.asarray(blocks, np.int64), padded)
        self._special = {
            "SR_TID.X": thread % block[0],
            "SR_TID.Y": thread // block[0] % block[1],
            "SR_TID.Z": thread // (block[0] * block[1]),
            "SR_CTAID.X": number % grid[0],
            "SR_CTAID.Y": number // grid[0] % grid[1],
            "SR_CTAID.Z": number // (grid[0] * grid[1]),
            "SR_LANEID": self._lane,
            "SR_CgaCtaId": np.zeros(count, np.int64),
            "SR_SWINHI": np.full(count, _SHARED_WINDOW, np.int64),
        }
        self._pc = np.zeros(count, np.int64)
        self._state = np.where(thread < size, _RUNNING, _DONE)
        self._joins = np.zeros((_JOINS, count), U32)
        self._join_mask = np.zeros(count, U32)
        self.executed = np.zeros(len(self._steps), np.int64)
        self._barriers = 0
        self._votes, self._agree = np.zeros(count, bool), False
        # By register and warp: a load on its way, from memory that was (1) or was not (2) read before.
        self._pending = np.zeros((256, self._warps), np.uint8)
        self._maybe_pending: set[int] = set()
        self._trips = [0, 0]
        self._loaded = self._arrivals = self._pipe = 0
        self._blocks = len(blocks)

    # Which threads go on

    def run(self) -> Execution:
        rounds = 0
        while True:
            runnable = self._state == _RUNNING
            if not runnable.any() and not self._release():
                if (self._state == _DONE).all():
                    break
                raise MachineError(f"{self._kernel.symbol}: threads wait for ever")
            rounds += 1
            if rounds > _MOST_STEPS:
                raise MachineError(f"{self._kernel.symbol}: it does not end")
            if runnable.any():
                self._go_on(runnable)
            if (self._state == _AT_JOIN).any():
                self._release_joins()
        return Execution(
            self._blocks,
            self._warps,
            self.executed,
            self._trips[1] / self._warps,
            self._trips[0] / self._warps,
            self._loaded,
            self._barriers / self._blocks,
            self._arrivals / self._blocks,
            self._pipe,
        )

    def _release(self) -> bool:
        """Let those go on who have waited long enough; False if there are none."""
        if (self._state == _AT_JOIN).any() and self._release_joins():
            return True
        at_barrier = (self._state == _AT_BARRIER).reshape(self._blocks, -1)
        there = (at_barrier | (self._state == _DONE).reshape(self._blocks, -1)).all(1) & at_barrier.any(1)
        if there.any():
            self._state[self._state == _AT_BARRIER] = np.where(
                there[self._block_of[self._state == _AT_BARRIER]], _RUNNING, _AT_BARRIER
            )
            self._barriers += int(there.sum())
            return True
        asleep = self._state == _ASLEEP
        self._state[asleep] = _RUNNING
        return bool(asleep.any())

    def _release_joins(self) -> bool:
        waiting = np.nonzero(self._state == _AT_JOIN)[0]
        key = self._warp_of[waiting] * len(self._steps) + self._pc[waiting]
        groups, group = np.unique(key, return_inverse=True)
        arrived = np.zeros(groups.size, np.int64)
        np.add.at(arrived, group, self._bit[waiting].astype(np.int64))
        gone = self._mask(self._state == _DONE)[self._warp_of[waiting]]
        wanted = self._join_mask[waiting] & ~gone
        free = waiting[(arrived[group].astype(U32) & wanted) == wanted]
        self._state[free] = _RUNNING
        return bool(free.size)

    def _mask(self, chosen: np.ndarray) -> np.ndarray:
        """Of each warp, which lanes are chosen."""
        return np.packbits(chosen.reshape(-1, _LANES), axis=1, bitorder="little").view(U32)[:, 0]

    def _go_on(self, runnable: np.ndarray) -> None:
        """Those threads that are furthest behind, up to where they meet others or part."""
        places = np.where(runnable, self._pc, len(self._steps))
        place = int(places.min())
        chosen = places == place
        if chosen.all():
            at: Any = slice(None)
            self._next, self._active_warps = len(self._steps), np.arange(self._warps)
            warps = self._warps
        else:
            at = np.nonzero(chosen)[0]
            self._next = int(places[~chosen].min())
            self._active_warps = np.unique(self._warp_of[at])
            warps = self._active_warps.size
        self._active: np.ndarray | None = None
        self._chosen = chosen
        begin = place
        while True:
            step = self._steps[place]
            if self._maybe_pending and not self._maybe_pending.isdisjoint(step.sources):
                self._wait_for_loads(step.sources)
            if step.action is not None:
                where = at if step.guard is None else self._guarded(step.guard, at)
                if isinstance(where, slice) or where.size:
                    step.action(self, where)
                following = place + 1
            else:
                following = self._special_step(step, place, at)
            if following == place + 1 and following < self._next:
                place = following
                continue
            self.executed[begin : place + 1] += warps
            if following < 0:  # the threads have parted, or wait
                return
            if following >= self._next:
                self._pc[at] = following
                return
            begin = place = following

    def _guarded(self, guard: tuple[int, bool], at: Any) -> Any:
        row, negated = guard
        passing = self.predicates[row, at] ^ negated
        if passing.all():
            return at
        return np.nonzero(passing)[0] if isinstance(at, slice) else at[passing]

    def _masks(self) -> np.ndarray:
        if self._active is None:
            self._active = self._mask(self._chosen)
        return self._active

    # What is not arithmetic

    def _special_step(self, step: _Step, place: int, at: Any) -> int:
        where = at if step.guard is None else self._guarded(step.guard, at)
        if step.kind in _CONTROL:
            return _CONTROL[step.kind](self, step, place, at, where)
        if step.kind not in _EFFECTS:
            raise UnknownInstructionError(f"{step.instruction.opcode} {step.instruction.operands}")
        if self._indices(where).size:
            _EFFECTS[step.kind](self, step, where)
        return place + 1

    def _indices(self, at: Any) -> np.ndarray:
        return np.arange(self._pc.size) if isinstance(at, slice) else at

    def _everyone(self, at: Any, where: Any) -> bool:
        return where is at

    def _label(self, step: _Step) -> int:
        found = re.search(r"`\(([^)]+)\)", step.instruction.operands)
        if found is None or found[1] not in self._kernel.labels:
            raise UnknownInstructionError(f"{step.instruction.opcode} {step.instruction.operands}")
        return self._kernel.labels[found[1]]

    def _branch(self, step: _Step, place: int, at: Any, where: Any) -> int:
        modifiers = step.instruction.opcode.split(".")[1:]
        if "DIV" in modifiers:
            wanted = integer(step.operands[0])(self, at)
            return self._join(at, np.broadcast_to(wanted, self._indices(at).shape), place)
        if len(step.operands) > 1 and predicate(step.operands[0]):
            where = self._guarded(predicate(step.operands[0]) or (7, False), where)
        target = self._label(step)
        if self._everyone(at, where):
            return target
        if not self._indices(where).size:
            return place + 1
        self._pc[at] = place + 1
        self._pc[where] = target
        return -1

    def _jump_to(self, step: _Step, place: int, at: Any, where: Any) -> int:
        text = step.operands[0].split()[0] if step.kind == "BRX" else step.instruction.operands.split()[0]
        row, offset = _row(text), 0
        if step.kind == "BRX":
            offset = int(step.operands[0].split()[1], 16) + step.instruction.address + 16
        addresses = np.unique(self.registers[row, where].astype(np.int64) + offset)
        if self._everyone(at, where) and addresses.size == 1:
            return self._index[int(addresses[0])]
        self._pc[at] = place + 1
        chosen = self.registers[row, where].astype(np.int64) + offset
        self._pc[where] = [self._index[int(address)] for address in chosen]
        return -1

    def _exit(self, step: _Step, place: int, at: Any, where: Any) -> int:
        self._state[where] = _DONE
        if self._everyone(at, where):
            return -1
        if not self._indices(where).size:
            return place + 1
        self._pc[at] = place + 1
        return -1

    def _begin_join(self, step: _Step, place: int, at: Any, where: Any) -> int:
        row = int(step.operands[0][1:])
        self._joins[row, at] = self._masks()[self._warp_of[at]]
        return place + 1

    def _leave_join(self, step: _Step, place: int, at: Any, where: Any) -> int:
        row = int(step.operands[-1][1:])
        gone = np.zeros(self._pc.size, bool)
        gone[where] = True
        self._joins[row] &= ~self._mask(gone)[self._warp_of]
        return place + 1

    def _end_join(self, step: _Step, place: int, at: Any, where: Any) -> int:
        if not self._everyone(at, where):
            raise UnknownInstructionError("BSYNC of some threads")
        return self._join(at, self._joins[int(step.operands[0][1:]), at], place)

    def _sync_warp(self, step: _Step, place: int, at: Any, where: Any) -> int:
        if "ALL" not in step.instruction.opcode:
            raise UnknownInstructionError(step.instruction.opcode)
        return self._join(at, np.full(self._indices(at).shape, 0xFFFFFFFF, U32), place)

    def _join(self, at: Any, wanted: np.ndarray, place: int) -> int:
        """Wait for the lanes that are wanted, as far as they have not ended."""
        warps = self._warp_of[at]
        here = self._masks()[warps]
        missing = wanted & ~here
        if not missing.any():
            return place + 1
        gone = self._mask(self._state == _DONE)[warps]
        if not (missing & ~gone).any():
            return place + 1
        self._pc[at] = place + 1
        self._join_mask[at] = wanted
        self._state[at] = _AT_JOIN
        return -1

    def _barrier(self, step: _Step, place: int, at: Any, where: Any) -> int:
        if step.operands[0] != "0x0":
            raise UnknownInstructionError(f"{step.instruction.opcode} {step.instruction.operands}")
        waiting = self._indices(where)
        if not waiting.size:
            return place + 1
        if "RED" in step.instruction.opcode:
            self._votes[where] = truth(step.operands[1])(self, where)
            self._agree = "AND" in step.instruction.opcode
        self._pc[at] = place + 1
        self._state[where] = _AT_BARRIER
        return -1

    def _sleep(self, step: _Step, place: int, at: Any, where: Any) -> int:
        self._pc[at] = place + 1
        self._state[where] = _ASLEEP
        return -1

    # What only changes the state: where there is a thread for it

    def _barrier_result(self, step: _Step, where: Any) -> None:
        """Whether one thread of the block, or each, has voted so at the last barrier."""
        out = predicate(step.operands[1])
        if "RESULT" not in step.instruction.opcode or step.operands[0] != "RZ" or out is None:
            raise UnknownInstructionError(step.instruction.opcode)
        votes = self._votes.reshape(self._blocks, -1)
        gone = (self._state == _DONE).reshape(votes.shape)
        result: np.ndarray = np.all(votes | gone, axis=1) if self._agree else np.any(votes, axis=1)
        self.predicates[out[0], where] = result[self._block_of[where]]

    def _special_register(self, step: _Step, where: Any) -> None:
        if step.operands[1] not in self._special:
            raise UnknownInstructionError(f"S2R of {step.operands[1]}")
        self.registers[_row(step.operands[0]), where] = self._special[step.operands[1]][where]

    # Memory

    def _address(self, text: str, where: Any, is_wide: bool = False) -> np.ndarray:
        found = re.fullmatch(
            r"(?:desc\[UR\w+\])?\[(?:(R\w+)(\.64|\.U32|\.X4|\.X8|\.X16)?)?(?:\+?(UR\w+))?(?:\+?(-?0x\w+))?\]", text
        )
        if found is None:
            raise UnknownInstructionError(f"address {text}")
        count = self._indices(where).size
        total = np.zeros(count, np.int64)
        if found[1]:
            if (is_wide or found[2] == ".64") and not found[3]:
                total = total + np.asarray(wide(found[1])(self, where)).astype(np.int64)
            else:
                scale = int(found[2][2:]) if found[2] and found[2].startswith(".X") else 1
                total = total + np.asarray(integer(found[1])(self, where)).astype(np.int64) * scale
        if found[3]:
            is_wide = text.startswith("desc")
            total = total + np.asarray((wide if is_wide else integer)(found[3])(self, where)).astype(np.int64)
        return total + (int(found[4], 16) if found[4] else 0)

    def _load_global(self, step: _Step, where: Any) -> None:
        row, size = _row(step.operands[0]), step.instruction.global_bytes
        addresses = self._address(step.operands[1], where).astype(U64)
        words = self.memory.load(addresses, size)
        if "STRONG" in step.instruction.opcode and self._is_sample:
            words = [np.full(addresses.size, _MANY, U32) for _ in words]
        self._keep(row, where, words, step.instruction.opcode)
        self._note_lines(addresses, where)
        self._note_read(addresses, size, where, range(row, row + len(words)) if row != 255 else ())

    def _note_lines(self, addresses: np.ndarray, where: Any) -> None:
        """Count the lines that an access to memory touches, of each warp."""
        lines = self.memory.lines(addresses.astype(U64)) * self._warps + self._warp_of[where]
        self._pipe += np.unique(lines).size

    def _note_read(self, addresses: np.ndarray, size: int, where: Any, rows: Iterable[int]) -> None:
        """Count what is read, which is on its way to these registers."""
        is_new, sectors = self.memory.new_sectors(addresses, size)
        self._loaded += sectors * _SECTOR
        lanes = self._indices(where)
        for row in rows:
            self._pending[row, self._warp_of[lanes]] |= 1
            self._pending[row, self._warp_of[lanes[is_new]]] |= 2
            self._maybe_pending.add(row)

    def _wait_for_loads(self, sources: frozenset[int]) -> None:
        """A warp that needs one load waits for all that are on their way: they come in order."""
        rows = sorted(self._maybe_pending & sources)
        late = self._pending[rows][:, self._active_warps].max(0)
        if late.any():
            warps = self._active_warps[late > 0]
            late = self._pending[:, warps].max(0)
            self._trips[1] += int((late >= 2).sum())
            self._trips[0] += int((late == 1).sum())
            self._pending[:, warps] = 0
            if not self._pending.any():
                self._maybe_pending.clear()

    def _keep(self, row: int, where: Any, words: list[np.ndarray], opcode: str) -> None:
        modifiers = opcode.split(".")
        if row == 255:
            return
        for number, word in enumerate(words):
            if "S8" in modifiers or "S16" in modifiers:
                word = word.view(np.int8 if "S8" in modifiers else np.int16).astype(np.int32).view(U32)
            self.registers[row + number, where] = word

    def _store_global(self, step: _Step, where: Any) -> None:
        row, size = _row(step.operands[1]), step.instruction.global_bytes
        addresses = self._address(step.operands[0], where).astype(U64)
        self.memory.store(addresses, size, self._words(row, where, size))
        self._note_lines(addresses, where)

    def _words(self, row: int, where: Any, size: int) -> list[np.ndarray]:
        mask = U32(0xFFFFFFFF if size >= 4 else (1 << 8 * size) - 1)
        step = 0 if row == 255 else 1
        return [self.registers[row + step * word, where] & mask for word in range(max(1, size // 4))]

    def _shared_places(self, text: str, where: Any, size: int) -> tuple[Any, np.ndarray, np.ndarray]:
        """Shared memory in units of an access, of four bytes at most: blocks and places that an access begins at."""
        view, places = self._shared_units(self._address(text, where), size)
        # Without conflicts of banks.
        self._pipe += max(np.unique(self._warp_of[where]).size, places.size * size // _LINE)
        return view, self._block_of[where], places

    def _shared_units(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        places = addresses - _SHARED_BASE
        if (places < 0).any() or (places + size > self._shared_size).any() or (places % size).any():
            raise MachineError(f"{self._kernel.symbol}: shared memory outside the block's, or misaligned")
        return self._shared.view({1: np.uint8, 2: np.uint16}.get(size, U32)), places // min(size, 4)

    def _load_shared(self, step: _Step, where: Any) -> None:
        size = _access_bytes(step.instruction.opcode)
        view, blocks, places = self._shared_places(step.operands[1], where, size)
        words = [view[blocks, places + word] for word in range(max(1, size // 4))]
        self._keep(_row(step.operands[0]), where, words, step.instruction.opcode)

    def _load_generic(self, step: _Step, where: Any) -> None:
        """From shared memory or from global memory, as each thread's address tells."""
        row, size = _row(step.operands[0]), _access_bytes(step.instruction.opcode)
        addresses, lanes = self._address(step.operands[1], where), self._indices(where)
        is_shared = addresses >> 32 == _SHARED_WINDOW
        for chosen in (is_shared, ~is_shared):
            if not chosen.any():
                continue
            if chosen is is_shared:
                view, places = self._shared_units(addresses[chosen] & 0xFFFFFFFF, size)
                blocks = self._block_of[lanes[chosen]]
                words = [view[blocks, places + word] for word in range(max(1, size // 4))]
            else:
                words = self.memory.load(addresses[chosen].astype(U64), size)
                self._note_lines(addresses[chosen], lanes[chosen])
                self._note_read(addresses[chosen].astype(U64), size, lanes[chosen], range(row, row + len(words)))
            self._keep(row, lanes[chosen], words, step.instruction.opcode)

    def _copy_to_shared(self, step: _Step, where: Any) -> None:
        """From global memory: it is there at once, but a warp waits where it says so."""
        size = step.instruction.global_bytes
        addresses = self._address(step.operands[1], where).astype(U64)
        view, blocks, places = self._shared_places(step.operands[0], where, size)
        for word, value in enumerate(self.memory.load(addresses, size)):
            view[blocks, places + word] = value
        self._note_lines(addresses, where)
        self._note_read(addresses, size, where, [_COPIES])

    def _control_cache(self, step: _Step, where: Any) -> None:
        """A prefetch: whoever reads from there later finds it in a cache. Anything else is nothing here."""
        if "PF2" in step.instruction.opcode.split("."):
            self._note_read(self._address(step.operands[0], where, is_wide=True).astype(U64), 1, where, ())
            self._pipe += self._indices(where).size

    def _wait_for_copies(self, step: _Step, where: Any) -> None:
        if step.operands[1] != "0x0":
            raise UnknownInstructionError(f"{step.instruction.opcode} {step.instruction.operands}")
        if _COPIES in self._maybe_pending:
            self._wait_for_loads(frozenset({_COPIES}))

    def _store_shared(self, step: _Step, where: Any) -> None:
        size = _access_bytes(step.instruction.opcode)
        view, blocks, places = self._shared_places(step.operands[0], where, size)
        for word, value in enumerate(self._words(_row(step.operands[1]), where, size)):
            view[blocks, places + word] = value

    def _shared_maximum(self, step: _Step, where: Any) -> None:
        """Of unsigned integers of 32 bits, where nobody reads what was there before."""
        if step.instruction.opcode != "ATOMS.MAX" or step.operands[0] != "RZ":
            raise UnknownInstructionError(f"{step.instruction.opcode} {step.instruction.operands}")
        view, blocks, places = self._shared_places(step.operands[1], where, 4)
        np.maximum.at(view, (blocks, places), self._words(_row(step.operands[2]), where, 4)[0])

    def _atomic(self, step: _Step, where: Any) -> None:
        """An atomic sum of 32-bit integers: what blocks count each other with."""
        opcode = step.instruction.opcode
        if "ADD" not in opcode or {"64", "F32", "F16x2", "F64"} & set(opcode.split(".")):
            raise UnknownInstructionError(opcode)
        lanes = self._indices(where)
        operands = [o for o in step.operands if predicate(o) is None]
        if step.kind == "REDG":
            operands = ["RZ", *operands]
        addresses = self._address(operands[1], where).astype(U64)
        added = np.broadcast_to(integer(operands[2])(self, where), lanes.shape)
        row = _row(operands[0])
        if row == 255:
            self._arrivals += lanes.size
        for lane, address, value in zip(lanes, addresses, added, strict=True):
            one = np.asarray([address], U64)
            (old,) = self.memory.load(one, 4)
            self.memory.store(one, 4, [old + value])
            if row != 255:
                self.registers[row, lane] = _MANY if self._is_sample else old[0]

    # Between the lanes of a warp

    def _shuffle(self, step: _Step, where: Any) -> None:
        lanes = self._indices(where)
        done, row, source = step.operands[:3]
        mode = step.instruction.opcode.split(".")[1]
        by = np.broadcast_to(integer(step.operands[3])(self, where), lanes.shape).astype(np.int64)
        clamp = np.broadcast_to(integer(step.operands[4])(self, where), lanes.shape).astype(np.int64)
        lane = self._lane[lanes]
        segment, last = clamp >> 8 & 31, clamp & 31
        low, high = lane & segment, (lane & segment) | (last & ~segment)
        wanted = {"DOWN": lane + by, "UP": lane - by, "BFLY": lane ^ by, "IDX": low | (by & ~segment & 31)}.get(mode)
        if wanted is None:
            raise UnknownInstructionError(step.instruction.opcode)
        valid = wanted >= high if mode == "UP" else wanted <= high
        from_lane = np.where(valid, wanted, lane)
        columns = lanes - lane + from_lane
        values = np.zeros(self._pc.size, U32)
        values[lanes] = self.registers[_row(source), where]
        put_row, put_valid = _row(row), predicate(done)
        if put_row != 255:
            self.registers[put_row, where] = values[columns]
        if put_valid is not None and put_valid[0] != 7:
            self.predicates[put_valid[0], where] = valid

    def _vote(self, step: _Step, place: int, at: Any, where: Any) -> int:
        operands = list(step.operands)
        row = register(operands[0])
        chosen = np.zeros(self._pc.size, bool)
        chosen[at] = truth(operands[-1])(self, at)
        votes = self._mask(chosen)[self._warp_of[at]]
        if row is not None and row not in (255, 319):
            self.registers[row, at] = votes
        out = predicate(operands[1] if row is not None else operands[0])
        if out is not None and out[0] not in (7, 15):
            mode = step.instruction.opcode.split(".")[1]
            here = self._masks()[self._warp_of[at]]
            self.predicates[out[0], at] = votes != 0 if mode == "ANY" else votes == here
        return place + 1

    def _reduce(self, step: _Step, where: Any) -> None:
        """A sum or an extreme of the lanes of a warp."""
        modifiers = step.instruction.opcode.split(".")[1:]
        operation = {"SUM": np.add, "MIN": np.minimum, "MAX": np.maximum, "OR": np.bitwise_or, "AND": np.bitwise_and}
        chosen = [operation[m] for m in modifiers if m in operation]
        row, warps = _row(step.operands[0]), self._warp_of[where]
        if not chosen:
            raise UnknownInstructionError(step.instruction.opcode)
        dtype = np.int32 if "S32" in modifiers else U32
        values = np.asarray(integer(step.operands[1])(self, where)).view(dtype)
        first = np.nonzero(np.diff(warps, prepend=-1))[0]
        results = chosen[0].reduceat(values, first).astype(dtype).view(U32)
        self.registers[row, where] = np.repeat(results, np.diff(np.append(first, warps.size)))

    def _match(self, step: _Step, where: Any) -> None:
        if "ANY" not in step.instruction.opcode:
            raise UnknownInstructionError(step.instruction.opcode)
        lanes = self._indices(where)
        read = wide if "U64" in step.instruction.opcode else integer
        values = np.asarray(read(step.operands[1])(self, where)).astype(U64)
        values = np.broadcast_to(values, lanes.shape)
        _, group = np.unique(np.stack([self._warp_of[lanes].astype(U64), values]), axis=1, return_inverse=True)
        group = group.reshape(-1)
        masks = np.zeros(int(group.max()) + 1, np.int64)
        np.add.at(masks, group, self._bit[lanes].astype(np.int64))
        self.registers[_row(step.operands[0]), where] = masks[group].astype(U32)


def _row(text: str) -> int:
    row = register(text)
    if row is None:
        raise UnknownInstructionError(f"register {text}")
    return row


def _access_bytes(opcode: str) -> int:
    modifiers = opcode.split(".")
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((size for name, size in sizes.items() if name in modifiers), 4)


#: Which instruction is next; -1 where the threads have parted, or wait.
_CONTROL: dict[str, Callable[[_Machine, _Step, int, Any, Any], int]] = {
    "BRA": _Machine._branch,
    "CALL": _Machine._branch,
    "RET": _Machine._jump_to,
    "BRX": _Machine._jump_to,
    "EXIT": _Machine._exit,
    "BSSY": _Machine._begin_join,
    "BSYNC": _Machine._end_join,
    "BREAK": _Machine._leave_join,
    "WARPSYNC": _Machine._sync_warp,
    "BAR": _Machine._barrier,
    "NANOSLEEP": _Machine._sleep,
    "VOTE": _Machine._vote,
    "VOTEU": _Machine._vote,
}
_EFFECTS: dict[str, Callable[[_Machine, _Step, Any], None]] = {
    "B2R": _Machine._barrier_result,
    "S2R": _Machine._special_register,
    "S2UR": _Machine._special_register,
    "LD": _Machine._load_generic,
    "LDG": _Machine._load_global,
    "STG": _Machine._store_global,
    "LDS": _Machine._load_shared,
    "STS": _Machine._store_shared,
    "ATOMS": _Machine._shared_maximum,
    "LDGSTS": _Machine._copy_to_shared,
    "CCTL": _Machine._control_cache,
    "DEPBAR": _Machine._wait_for_copies,
    "ATOMG": _Machine._atomic,
    "REDG": _Machine._atomic,
    "SHFL": _Machine._shuffle,
    "MATCH": _Machine._match,
    "REDUX": _Machine._reduce,
}


def execute(
    kernel: CompiledKernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    values: Sequence[Any],
    *,
    dynamic_shared: int = 0,
    blocks: Sequence[int] | None = None,
) -> Execution:
    """Execute some blocks of a launch.

    Parameters
    ----------
    kernel : CompiledKernel
        For compute capability 9.0.
    grid, block : tuple of three int
    values : sequence
        One a parameter: an array or None for a pointer, a NumPy scalar else. Arrays are read and written where they
        are.
    dynamic_shared : int
        Bytes of a block.
    blocks : sequence of int, optional
        Numbers of the blocks to execute; all of them by default. Where only some are executed, one that waits for
        others is told that they have come, and the first 4 MB of an array stand for all of it: such a launch is
        good for counting only.

    Raises
    ------
    UnknownInstructionError
        If the code holds an instruction, on the way that was taken, that is not described.
    MachineError
        For an access outside the arrays, or threads that wait for ever.
    """
    chosen = range(math.prod(grid)) if blocks is None else blocks
    with np.errstate(all="ignore"):
        return _Machine(kernel, kernel.jump_table, grid, block, values, dynamic_shared, chosen).run()
