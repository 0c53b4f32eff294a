"""Launch geometry of the elementwise kernels: ``elementwise.cuh``."""

from __future__ import annotations

from collections.abc import Callable

from gpu_layers.core.array import DTypeLike
from gpu_layers.core.reference_gpu import MULTIPROCESSORS
from gpu_layers.kernels.arrays import delivered, destination, vector_width
from gpu_layers.runtime.limits import limits
from gpu_layers.runtime.program import Operand

THREADS = 256
_UNROLL = 2
_MOST_TILES = 4


def blocks_for(units: int, units_per_block: int) -> int:
    """Blocks for this many units of work, at least one and at most those of a grid."""
    return max(1, min(-(-units // units_per_block), limits().max_blocks))


def tile_blocks(units: int, units_per_tile: int) -> int:
    """Blocks that take tiles in turn: several each, so that they begin less often, where all GPUs stay busy for long.

    They are busy while there are six rounds of the four blocks that a multiprocessor holds at least.
    """
    tiles = blocks_for(units, units_per_tile)
    return -(-tiles // max(1, min(_MOST_TILES, tiles // (6 * 4 * MULTIPROCESSORS))))


def vector_blocks(n: int, dtype: DTypeLike, unroll: int = _UNROLL) -> int:
    """Blocks of an elementwise kernel over n elements, whose threads have so many vectors in a tile."""
    return tile_blocks(n, THREADS * unroll * vector_width(dtype))


def filled(out: Operand | None, like: Operand, fill: Callable[[Operand], None]) -> Operand:
    """``out``, or a new array like another, after ``fill(array)``; through a copy where kernels cannot write to out.

    Parameters
    ----------
    out : Operand or None
    like : Operand
        Gives shape, dtype and place.
    fill : callable
        Launches a kernel that fills the array. Not called for an empty array.
    """
    target = destination(out, like)
    if target.size:
        fill(target)
    return delivered(target, out)
