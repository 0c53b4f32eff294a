"""How many blocks of a kernel a multiprocessor of an H100 holds at once."""

from __future__ import annotations

import math

from profiling.compiled_code import Resources

#: Of an H100 (compute capability 9.0); CUDA C++ Programming Guide, "Compute Capabilities".
MULTIPROCESSORS = 132
_THREADS, _BLOCKS, _WARP = 2048, 32, 32
_REGISTERS, _REGISTER_UNIT = 65536, 256
_SHARED, _SHARED_PER_BLOCK = 228 * 1024, 1024
# Registers lie in four parts, each of which serves a quarter of the warps.
_PARTS = 4


def resident_blocks(resources: Resources, block_threads: int, dynamic_shared: int = 0) -> int:
    """Blocks that fit at once: by threads, registers, shared memory and number.

    ``resources.shared`` holds the kilobyte that the system reserves for each block, as the compiler reports it.
    """
    warps = math.ceil(block_threads / _WARP)
    registers = math.ceil(max(resources.registers, 1) * _WARP / _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _PARTS * (_REGISTERS // _PARTS // registers) // warps
    shared = max(resources.shared, _SHARED_PER_BLOCK) + dynamic_shared
    return min(_BLOCKS, _THREADS // _WARP // warps, by_registers, _SHARED // shared)


def occupancy(resources: Resources, block_threads: int, dynamic_shared: int = 0) -> float:
    """Resident threads, as a part of the most that there can be."""
    blocks = resident_blocks(resources, block_threads, dynamic_shared)
    return blocks * math.ceil(block_threads / _WARP) * _WARP / _THREADS
