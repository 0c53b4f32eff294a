"""How many blocks of a kernel a multiprocessor holds at once."""

from __future__ import annotations

import math

from gpu_layers.core.reference_gpu import RESERVED_BYTES, WARP_THREADS
from profiling.compiled_code import Resources
from profiling.devices import MODELLED, Gpu

_REGISTER_UNIT = 256
# Registers lie in four parts, each of which serves a quarter of the warps.
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
