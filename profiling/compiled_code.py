"""What is in a cubin: registers and memory of each kernel, its instructions and loops; what is allowed, what fits."""

from __future__ import annotations

import math
import re
import shutil
import struct
import subprocess
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gpu_layers.core.reference_gpu import RESERVED_BYTES, WARP_THREADS
from profiling.devices import MODELLED, Gpu

_WHEEL_FOLDER = "nvidia/cu13/bin"
_TOOLKIT_FOLDER = "/usr/local/cuda/bin"


@dataclass(frozen=True)
class Resources:
    """What a kernel takes.

    Attributes
    ----------
    registers : int
        Of a thread.
    stack, local : int
        Bytes of a thread, in what is really global memory.
    shared : int
        Static shared memory of a block, bytes (with what the system reserves).
    """

    registers: int
    stack: int
    shared: int
    local: int


@dataclass(frozen=True)
class Instruction:
    """One instruction of SASS.

    Attributes
    ----------
    address : int
    predicate : str
        E.g. ``@!P0``; empty if it is always executed.
    opcode : str
        With its modifiers, e.g. ``LDG.E.128``.
    operands : str
    """

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def mnemonic(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def global_bytes(self) -> int:
        """Bytes that it moves between a thread and global memory; 0 for other instructions."""
        if self.mnemonic not in ("LDG", "STG", "LDGSTS"):
            return 0
        modifiers = self.opcode.split(".")
        return next((size for name, size in _ACCESS_BYTES.items() if name in modifiers), 4)


_ACCESS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Loop:
    """The costliest way through one round of an innermost loop: most bytes, then most instructions.

    Attributes
    ----------
    instructions : tuple of Instruction
        In order.
    """

    instructions: tuple[Instruction, ...]

    @property
    def global_bytes(self) -> int:
        """Bytes that a thread moves from and to global memory in a round."""
        return sum(instruction.global_bytes for instruction in self.instructions)

    @property
    def instructions_per_byte(self) -> float:
        """Instructions of a thread for each of these bytes."""
        return len(self.instructions) / self.global_bytes


@dataclass(frozen=True, eq=False)
class CompiledKernel:
    """One kernel of a cubin.

    Attributes
    ----------
    symbol : str
    resources : Resources
    instructions : tuple of Instruction
    labels : dict of str to int
        Index of the instruction that each label stands before.
    jump_table : bytes
        Where its switches find their targets.
    """

    symbol: str
    resources: Resources
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    jump_table: bytes = b""

    def loops(self) -> list[Loop]:
        """The innermost loops that touch global memory."""
        ranges = self._ranges()
        innermost = [
            (first, last)
            for first, last in ranges
            if not any(first <= other[0] and other[1] <= last and other != (first, last) for other in ranges)
        ]
        loops = [Loop(self._costliest_path(first, last)) for first, last in sorted(innermost)]
        # The way back from code that lies apart, for lanes that exchange values and are not together, is no loop.
        apart = ("ENDCOLLECTIVE", "BRA.DIV", "WARPSYNC.COLLECTIVE", "EXIT")
        return [
            loop
            for loop in loops
            if loop.global_bytes and not any(i.opcode.startswith(apart) for i in loop.instructions)
        ]

    def hot_loop(self) -> Loop:
        """The innermost loop that moves the most bytes a round.

        Raises
        ------
        ValueError
            If no loop touches global memory.
        """
        loops = self.loops()
        if not loops:
            raise ValueError(f"{self.symbol} has no loop that touches global memory")
        return max(loops, key=lambda loop: loop.global_bytes)

    def around(self, loop: Loop) -> Loop:
        """The smallest loop around another one that stores to global memory, and every loop in it once.

        Raises
        ------
        ValueError
            If there is none.
        """
        inner = {instruction.address for instruction in loop.instructions}
        for first, last in sorted(self._ranges(), key=lambda ends: ends[1] - ends[0]):
            inside = self.instructions[first : last + 1]
            if inner < {instruction.address for instruction in inside}:
                outer = Loop(self._costliest_path(first, last))
                if any(instruction.mnemonic == "STG" for instruction in outer.instructions):
                    return outer
        raise ValueError(f"no loop of {self.symbol} is around this one and stores")

    def _ranges(self) -> set[tuple[int, int]]:
        """First and last instruction of each loop."""
        ranges = set()
        for index, instruction in enumerate(self.instructions):
            target = self._target(instruction)
            # A branch to itself ends every function: it is padding.
            if target is not None and target < index:
                ranges.add((target, index))
        return ranges

    def _target(self, instruction: Instruction) -> int | None:
        if instruction.mnemonic != "BRA":
            return None
        found = re.search(r"`\((\.L_\w+)\)", instruction.operands)
        return self.labels.get(found[1]) if found else None

    def _costliest_path(self, first: int, last: int) -> tuple[Instruction, ...]:
        best: dict[int, tuple[int, int, tuple[int, ...]]] = {first: (0, 0, ())}
        for index in range(first, last + 1):
            if index not in best:
                continue
            size, count, path = best[index]
            instruction = self.instructions[index]
            here = (size + instruction.global_bytes, count + 1, (*path, index))
            target = self._target(instruction)
            conditional = bool(instruction.predicate)
            following = [] if instruction.mnemonic in ("BRA", "EXIT", "RET") and not conditional else [index + 1]
            if target is not None and index < target <= last:
                following.append(target)
            for next_index in following:
                if next_index not in best or best[next_index][:2] < here[:2]:
                    best[next_index] = here
            if index == last:
                return tuple(self.instructions[i] for i in here[2])
        # The way leads through code placed elsewhere: every instruction in between is more than it can take.
        return self.instructions[first : last + 1]


def _tool(name: str) -> str:
    for folder in (Path(sysconfig.get_paths()["purelib"]) / _WHEEL_FOLDER, Path(_TOOLKIT_FOLDER)):
        if (folder / name).is_file():
            return str(folder / name)
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} was not found: pip install nvidia-cuda-{name}")
    return found


def _output(name: str, *arguments: str | Path) -> str:
    done = subprocess.run([_tool(name), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _resources(cubin: Path) -> dict[str, Resources]:
    found = re.findall(
        r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", _output("cuobjdump", "-res-usage", cubin)
    )
    return {symbol: Resources(*map(int, numbers)) for symbol, *numbers in found}


def _sections(disassembly: str) -> Iterable[tuple[str, list[str]]]:
    """Symbol and lines of each kernel's code."""
    symbol = ""
    lines: list[str] = []
    for line in disassembly.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\w+)", line)
        if section or re.match(r"\s*\.section\s", line):
            if symbol:
                yield symbol, lines
            symbol, lines = (section[1] if section else ""), []
        elif symbol:
            lines.append(line)
    if symbol:
        yield symbol, lines


def _jump_tables(cubin: Path) -> dict[str, bytes]:
    """The tables that kernels look the targets of a ``switch`` up in, by symbol."""
    data = cubin.read_bytes()
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", data, offset + number * size) for number in range(count)]
    tables = {}
    for name, _, _, _, begin, length in sections:
        start = sections[names][4] + name
        text = data[start : data.index(b"\0", start)].decode()
        if text.startswith(".nv.constant2."):
            tables[text.removeprefix(".nv.constant2.")] = data[begin : begin + length]
    return tables


@cache
def read_cubin(cubin: Path) -> dict[str, CompiledKernel]:
    """Disassemble a cubin.

    Parameters
    ----------
    cubin : Path

    Returns
    -------
    dict of str to CompiledKernel
        By symbol.

    Raises
    ------
    RuntimeError
        If ``cuobjdump`` or ``nvdisasm`` is missing or does not take the file.
    """
    resources, tables = _resources(cubin), _jump_tables(cubin)
    kernels = {}
    for symbol, lines in _sections(_output("nvdisasm", "-c", cubin)):
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in lines:
            label = re.match(r"\s*(\.L_\w+|\$[\w$]+):", line)
            if label:
                labels[label[1]] = len(instructions)
            code = re.match(r"\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;", line)
            if code:
                instructions.append(Instruction(int(code[1], 16), code[2] or "", code[3], code[4]))
        if symbol in resources:
            kernels[symbol] = CompiledKernel(
                symbol, resources[symbol], tuple(instructions), labels, tables.get(symbol, b"")
            )
    return kernels


# ---- How many blocks of a kernel a multiprocessor holds --------------------------------------------------------------


_REGISTER_UNIT = 256
# Registers lie in four parts; each serves a quarter of the warps.
_PARTS = 4


def resident_blocks(resources: Resources, block_threads: int, dynamic_shared: int = 0, gpu: Gpu = MODELLED) -> int:
    """Blocks that fit at once: by threads, registers, shared memory and number.

    ``resources.shared`` holds the kilobyte that the system reserves for each block, as the compiler reports it.
    """
    warps = math.ceil(block_threads / WARP_THREADS)
    registers = math.ceil(max(resources.registers, 1) * WARP_THREADS / _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _PARTS * (gpu.registers // _PARTS // registers) // warps
    shared = max(resources.shared, RESERVED_BYTES) + dynamic_shared
    return min(gpu.blocks, gpu.threads // WARP_THREADS // warps, by_registers, gpu.shared_bytes // shared)


def occupancy(resources: Resources, block_threads: int, dynamic_shared: int = 0, gpu: Gpu = MODELLED) -> float:
    """Resident threads, as a part of the most that there can be."""
    blocks = resident_blocks(resources, block_threads, dynamic_shared, gpu)
    return blocks * math.ceil(block_threads / WARP_THREADS) * WARP_THREADS / gpu.threads


# ---- How many registers a thread of each kernel may take -------------------------------------------------------------


# 65,536 registers of a multiprocessor for at least 1,024 threads.
_MOST_REGISTERS = 64

# Those that carry much from row to row: sums for eight channels, the largest of five rows, or numbers of every channel.
_CARRIES_ROWS = re.compile(
    r"(max|avg)_pool_backward_tiled<__(half|nv_bfloat16), 3, \d, 1, true, "
    r"|max_pool_(forward|backward)_tiled<\w+, 5, "
    r"|max_pool_backward_wide<"
    r"|(max|avg)_pool_forward_adaptive<"
    r"|(padded_)?batch_norm_(normalize|gradient_sums)<\w+, NhwcLayout<\d>, kPiecewiseLinear>"
    r"|(padded_)?batch_norm_input_gradient<\w+, NhwcLayout"
    r"|batch_norm_max_pool_forward_tiled<\w+, \d, \d, \d, true, "
    r"|batch_norm_max_pool_gradient_sums<\w+, NhwcLayout"
    r"|batch_norm_max_pool_input_gradient<\w+, \d, \d, \d, true, "
)
# So many that three blocks of 256 threads are held.
_THREE_BLOCKS = re.compile(
    r"^(batch_norm_max_pool|activation_dropout|dropout_add)_"
    r"|^(padded_batch_norm_|batch_norm_statistics<\w+, NhwcLayout)"
    r"|kPiecewiseLinear>$"
    r"|^max_pool_forward_tiled<\w+, 3, \d, \d, false, true>$"
    r"|^fractional_max_pool_(forward|backward)<"
    r"|^dropout_apply_repeated<"
)


def most_registers(kernel_name: str) -> int:
    """Registers of a thread, at most, of a kernel by its C++ name.

    The kernels of 64-bit indices, for images of 2**31 elements and more, those with an activation that is not
    straight, where arithmetic limits, those of second derivatives, with nine numbers of every channel, those that keep
    what they read, of whose blocks shared memory holds two, and the moments of dropout, of four Philox blocks a thread,
    may take twice as many. So may those that carry much from row to row: the float32 sums of gradients for eight
    channels of half types; the largest of five rows; and, of channels-last batch norm with
    something fused, with a pooling, or of its input's gradient, the numbers of its channels. Of the kernel that merges
    statistics there are few blocks, which wait for all that they read.
    80, for 768 threads on a multiprocessor, may be taken by those that hold numbers of every channel for the
    statistics and for what is fused, those of activation and dropout, which read far ahead, those that add a branch to
    a residual, with numbers of every feature, the statistics of rows, those of padded batches, which know what counts,
    the largest of deep windows over planes, fractional pooling, which has several windows on their way, and dropout of
    rows that share decisions, which has eight vectors.
    """
    if _CARRIES_ROWS.match(kernel_name) or kernel_name.startswith("batch_norm_merge_statistics<"):
        return 2 * _MOST_REGISTERS
    if kernel_name.endswith(("long long>", "kSmooth>")) or "_persistent<" in kernel_name or "_double_" in kernel_name:
        return 2 * _MOST_REGISTERS
    if kernel_name.startswith(("dropout_add_", "dropout_moments")) and kernel_name.endswith("false>"):
        return 2 * _MOST_REGISTERS
    return 80 if _THREE_BLOCKS.search(kernel_name) else _MOST_REGISTERS
