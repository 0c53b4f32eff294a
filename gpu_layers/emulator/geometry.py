"""The limits of a driver for a launch."""

from __future__ import annotations

from collections.abc import Sequence

#: Shared memory that a block has without asking, and the most that it can ask for (227 KB, as on an H100).
DEFAULT_SHARED_BYTES = 48 * 1024
MAX_SHARED_BYTES = 232_448

#: Blocks that a cooperative launch may have: two on each multiprocessor of an H100.
MAX_COOPERATIVE_BLOCKS = 264

_MAX_GRID = (2**31 - 1, 65_535, 65_535)
_MAX_BLOCK = (1024, 1024, 64)
_MAX_THREADS = 1024


def extent(what: str, sizes: Sequence[int], limits: Sequence[int]) -> tuple[int, int, int]:
    """``sizes`` as three positive ints within ``limits``.

    Raises
    ------
    ValueError
        If the driver would refuse the launch.
    """
    given = tuple(int(size) for size in sizes)
    if not 1 <= len(given) <= 3:
        raise ValueError(f"{what} must have 1 to 3 sizes, got {given}")
    x, y, z = given + (1,) * (3 - len(given))
    for axis, size, limit in zip("xyz", (x, y, z), limits, strict=True):
        if not 1 <= size <= limit:
            raise ValueError(f"{what} size {axis} must be between 1 and {limit}, got {size}")
    return x, y, z


def check_launch(
    grid: Sequence[int],
    block: Sequence[int],
    shared_bytes: int,
    *,
    cooperative: bool,
    max_shared_bytes: int,
    max_cooperative_blocks: int,
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The launch's grid and block as triples, or the error a driver would give.

    Raises
    ------
    ValueError
        If any limit is exceeded.
    """
    full_grid = extent("grid", grid, _MAX_GRID)
    full_block = extent("block", block, _MAX_BLOCK)
    threads = full_block[0] * full_block[1] * full_block[2]
    if threads > _MAX_THREADS:
        raise ValueError(f"a block has at most {_MAX_THREADS} threads, got {full_block}: {threads}")
    if not 0 <= shared_bytes <= max_shared_bytes:
        raise ValueError(f"dynamic shared memory must be between 0 and {max_shared_bytes} bytes, got {shared_bytes}")
    blocks = full_grid[0] * full_grid[1] * full_grid[2]
    if cooperative and blocks > max_cooperative_blocks:
        raise ValueError(
            f"a cooperative launch needs all its blocks resident at once: at most {max_cooperative_blocks}, "
            f"got {blocks}"
        )
    return full_grid, full_block
