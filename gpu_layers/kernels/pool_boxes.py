"""Boxes of planes, for the kernels whose blocks have one after another: ``pool_box.cuh``."""

from __future__ import annotations

import math

import numpy as np

from gpu_layers.kernels.dropout import DIVISOR, divisor
from gpu_layers.runtime.limits import limits

#: ``kBoxBytes``.
BOX_BYTES = 24 * 1024
# Planes side by side, which are read in whole sectors: a box has so many places of them. Outputs of some planes
# together at most: so many that a block is worth its beginning. Rows of a box at least.
_SIDE_BY_SIDE, _PLACES, _TOGETHER, _LEAST_ROWS = 32, 256, 8192, 4
# Columns that the threads of a warp have side by side, and rows that each has on its way.
_MOST_LOG2_COLUMNS, _AT_ONCE = 5, 4
#: Layout of ``PoolBoxes``.
BOXES = np.dtype(
    [
        ("along", DIVISOR, (3,)),
        ("groups", DIVISOR),
        ("size", np.int32, (3,)),
        ("box", np.int32, (3,)),
        ("log2_group", np.int32),
        ("log2_columns", np.int32),
        ("channels_last", np.int32),
        ("number", np.uint64),
        ("images", np.int64),
        ("channels", np.int64),
    ],
    align=True,
)


def boxed(
    sizes: tuple[int, int, int],
    shape: tuple[int, ...],
    channels_last: bool,
    most: int,
    outputs: tuple[int, int, int],
    threads: int,
    kept: float = 0.0,
) -> tuple[int, np.ndarray]:
    """Boxes of planes of these sizes: their number, and ``PoolBoxes``.

    Parameters
    ----------
    sizes : tuple of int
    shape : tuple of int
        Of an array with these planes, or others of the same samples and channels.
    channels_last : bool
    most : int
        Elements of a box at most.
    outputs : tuple of int
        Of a plane, along each axis.
    threads : int
        Of a block.
    kept : float
        What a block keeps of a plane, as a part of what it can keep.
    """
    images, channels = (shape[0], shape[-1]) if channels_last else (1, shape[0] * shape[1])
    enough, group = limits().full_grid, 1
    if channels_last:
        group = min(_SIDE_BY_SIDE, 1 << (channels - 1).bit_length())
        while group > _SIDE_BY_SIDE // 4 and max((group + 1) * kept, group * _PLACES / most) > 1:
            group //= 2
    else:
        share = max(math.prod(sizes) / most, kept, math.prod(outputs) / _TOGETHER, enough / channels, 1 / threads)
        while 2 * group * share <= 1:
            group *= 2
    groups = -(-channels // group)
    columns = min(sizes[2], most // group)
    rows = min(sizes[1], most // (group * columns))
    depth = min(sizes[0], most // (group * columns * rows)) if (rows, columns) == sizes[1:] else 1
    while rows > _LEAST_ROWS and images * groups * math.prod(_numbers(sizes, (depth, rows, columns))) < enough:
        depth, rows = 1, -(-rows // 2)
    box = depth, -(-sizes[1] // -(-sizes[1] // rows)), columns
    numbers = _numbers(sizes, box)
    boxes = np.zeros((), BOXES)
    boxes["along"], boxes["groups"] = [divisor(one) for one in numbers], divisor(groups)
    boxes["size"], boxes["box"] = sizes, box
    boxes["log2_group"], boxes["channels_last"] = group.bit_length() - 1, channels_last
    boxes["log2_columns"] = _log2_columns(outputs, threads // group)
    boxes["images"], boxes["channels"] = images, channels
    boxes["number"] = number = images * groups * math.prod(numbers)
    return number, boxes


def _log2_columns(outputs: tuple[int, int, int], workers: int) -> int:
    """The number of columns side by side that leaves the fewest workers of a plane without work."""
    _, rows, columns = outputs

    def steps(log2: int) -> int:
        of_rows = -(-rows // (workers >> log2))
        return -(-columns >> log2) * -(-of_rows // _AT_ONCE)

    # Of equal ones the largest: most neighbours are read together.
    return min(range(min(workers.bit_length() - 1, _MOST_LOG2_COLUMNS), -1, -1), key=steps)


def _numbers(sizes: tuple[int, int, int], box: tuple[int, int, int]) -> list[int]:
    return [-(-size // own) for size, own in zip(sizes, box, strict=True)]
