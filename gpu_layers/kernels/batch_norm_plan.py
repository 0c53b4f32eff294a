"""How the blocks of a batch-norm kernel share the values of one shape, and whether it reads them once or twice.

A plan follows from shape and dtype alone, not from the GPU: it fixes the order of the sums, and so every bit of the
result. A GPU that cannot keep resident what a plan asks for runs the same plan in two reads, with the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gpu_layers.core.array import DTypeLike
from gpu_layers.core.reference_gpu import MULTIPROCESSORS, RESERVED_BYTES, SHARED_BYTES, WARP_THREADS, WARPS
from gpu_layers.runtime.kernel import c_name

#: Threads of a block: ``kChannelThreads`` of ``channel_layout.cuh``.
THREADS = 256
_VECTOR_BYTES = 16
# Blocks that fill any GPU twice over, so that it is busy whatever the number of channels. A constant, not the GPU's
# own number.
_TARGET_BLOCKS = 2 * MULTIPROCESSORS * WARPS * WARP_THREADS // THREADS
# Likewise of rows, whose kernels leave room for four blocks on a multiprocessor or for two: rounds are full. Half of
# that where a thread would have less than so many vectors: it would spend more on its sums than on what it reads.
_TARGET_BLOCKS_OF_ROWS = 8 * MULTIPROCESSORS
_VECTORS_OF_ROWS = 12
#: Blocks that the reference GPU holds at once: two a multiprocessor, each with half of its shared memory.
PERSISTENT_BLOCKS = 2 * MULTIPROCESSORS
# What slots may take of that memory: all but for what the system takes and what the kernels use themselves.
_SCRATCH_OF_NCHW, _SCRATCH_OF_NHWC = 2 * 1024, 5 * 1024
_BYTES_OF_NCHW, _BYTES_OF_NHWC = (
    SHARED_BYTES // 2 - RESERVED_BYTES - scratch for scratch in (_SCRATCH_OF_NCHW, _SCRATCH_OF_NHWC)
)
# Groups of so many blocks leave none over.
_GROUP_SIZES = tuple(size for size in range(1, PERSISTENT_BLOCKS + 1) if PERSISTENT_BLOCKS % size == 0)
# What the blocks of a channel may add to the traffic.
_WORKSPACE_SHARE = 0.03

_NCHW_LAYOUT = np.dtype(
    [
        (name, np.int64)
        for name in ("channels", "plane", "chunk", "chunks_per_plane", "chunks", "chunks_per_block", "blocks")
    ],
    align=True,
)
_NHWC_LAYOUT = np.dtype(
    [(name, np.int64) for name in ("rows", "channels", "tiles", "rows_per_block", "blocks")], align=True
)
#: Structs of the kernels' parameters.
STRUCTS = {
    "NchwLayout": _NCHW_LAYOUT,
    **{f"NhwcLayout<{width}>": _NHWC_LAYOUT for width in (8, 4, 2, 1)},
    **{
        f"FoldingRule<{c_name(dtype)}>": np.dtype(
            [(name, dtype) for name in ("old", "newest", "unbiased")]
            + [(name, np.int32) for name in ("cumulative", "finite_only")]
        )
        for dtype in (np.dtype(np.float32), np.dtype(np.float64))
    },
}


@dataclass(frozen=True)
class Plan:
    """How the blocks share the values of one shape.

    Attributes
    ----------
    width : int or None
        Of rows: channels a thread. None for planes.
    block : tuple of int
        Threads side by side, and those that take chunks or rows in turn.
    layout : ndarray
        ``NchwLayout`` or ``NhwcLayout`` of ``channel_layout.cuh``.
    channels : int
    tiles : int
        What a group of blocks shares: channels, or of rows tiles of neighbouring channels.
    blocks_per_group : int
        Blocks of a group.
    count : int
        Values of a channel.
    slots : int or None
        Of 16 bytes, that a thread has to keep what it reads of each array; None where too little fits, so that
        everything is read twice.
    arrays : int
        To keep: one in the forward, two in the backward.
    padded : bool
        Whether only some positions count: which of a slot do is kept beside it.
    """

    width: int | None
    block: tuple[int, int]
    layout: np.ndarray
    channels: int
    tiles: int
    blocks_per_group: int
    count: int
    slots: int | None
    arrays: int
    padded: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of each of the two reads."""
        return self.tiles * self.blocks_per_group

    @property
    def layout_type(self) -> str:
        """C++ type of the layout."""
        return "NchwLayout" if self.width is None else f"NhwcLayout<{self.width}>"

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block that keeps what it reads."""
        return (self.slots or 0) * _slot_bytes(self.arrays, self.padded)

    def __str__(self) -> str:
        kind = "planes" if self.width is None else f"rows of {self.width}-channel vectors"
        of_blocks = f"{self.blocks_per_group} block{'s' * (self.blocks_per_group > 1)}"
        groups = f"{self.tiles} group{'s' * (self.tiles > 1)} of {of_blocks}"
        threads = f"{self.block[0]} x {self.block[1]} threads"
        if self.slots is None:
            return f"two reads, {kind}, {groups}, {threads}"
        how = "cooperative" if self.blocks_per_group > 1 else "plain launch"
        kept = f"{self.shared_bytes / 1024:.0f} KB of shared memory a block"
        return f"one read, {kind}, {groups}, {threads}, {kept}, {how}"


@lru_cache(maxsize=1024)
def forward_plan(shape: tuple[int, ...], itemsize: int, channels_last: bool, padded: bool = False) -> Plan:
    """The plan of the statistics, for an input of this shape."""
    return _plan(shape, itemsize, channels_last, 1, padded)


@lru_cache(maxsize=1024)
def backward_plan(shape: tuple[int, ...], itemsize: int, channels_last: bool, padded: bool = False) -> Plan:
    """The plan of the gradients' sums, of two arrays."""
    return _plan(shape, itemsize, channels_last, 2, padded)


@lru_cache(maxsize=1024)
def elementwise_plan(shape: tuple[int, ...], itemsize: int, channels_last: bool) -> Plan:
    """The plan of what sums nothing: evaluation, and the second of two reads."""
    if channels_last or len(shape) == 2:
        return _two_reads_of_nhwc(math.prod(shape[:-1]), shape[-1], itemsize, 1)
    return _two_reads_of_nchw(shape[0], shape[1], math.prod(shape[2:]), itemsize, 1)


def _plan(shape: tuple[int, ...], itemsize: int, channels_last: bool, arrays: int, padded: bool) -> Plan:
    if channels_last or len(shape) == 2:
        rows, channels = math.prod(shape[:-1]), shape[-1]
        return _persistent_nhwc(rows, channels, itemsize, arrays, padded) or _two_reads_of_nhwc(
            rows, channels, itemsize, arrays
        )
    batch, channels, plane = shape[0], shape[1], math.prod(shape[2:])
    resident = _persistent_nchw(batch, channels, plane, itemsize, arrays, padded)
    return resident or _two_reads_of_nchw(batch, channels, plane, itemsize, arrays)


def _slot_bytes(arrays: int, padded: bool) -> int:
    """Of a block, for a slot of each thread: a vector of each array, and a bit for each value that may not count."""
    return THREADS * (arrays * _VECTOR_BYTES + padded)


def _power_of_two_up_to(value: float) -> int:
    return 1 << max(0, int(math.log2(max(value, 1))))


def _number_bytes(itemsize: int) -> int:
    return 8 if itemsize == 8 else 4


def _group_size(blocks: int, most: int) -> int:
    """The next size of a group that leaves no blocks over, if it is not more than ``most``."""
    size = next(size for size in _GROUP_SIZES if size >= blocks)
    return size if size <= most else blocks


# ---- one read --------------------------------------------------------------------------------------------------------


def _persistent_nchw(batch: int, channels: int, plane: int, itemsize: int, arrays: int, padded: bool) -> Plan | None:
    width = _VECTOR_BYTES // itemsize
    budget = _BYTES_OF_NCHW // _slot_bytes(arrays, padded)
    best: tuple[tuple[int, ...], int, int, int] | None = None
    # Neighbouring threads read 128 bytes together, where a plane has as many.
    for threads_x in (256, 128, 64, 32, 16, 8, *([4] if plane * itemsize <= 128 else [])):
        pieces, slots = _pieces(plane, threads_x, width, budget)
        if slots > budget:
            continue
        chunks_per_block = THREADS // threads_x * (budget // slots)
        needed = -(-batch * pieces // chunks_per_block)
        if needed > PERSISTENT_BLOCKS:
            continue
        # Few blocks; then a loop with several loads in flight (see Share in channel_layout.cuh); then long rows.
        rank = (needed, min(-(-plane // (width * threads_x * pieces)), 6) * -1, -threads_x)
        if best is None or rank < best[0]:
            best = (rank, threads_x, pieces, needed)
    if best is None:
        return None
    _, threads_x, pieces, needed = best
    # More blocks where there are few channels, up to what a GPU holds; but each reads what all of a group leave.
    slab = batch * plane * itemsize * arrays
    most = int(math.sqrt(_WORKSPACE_SHARE * slab / (4 * _number_bytes(itemsize))))
    blocks = max(needed, min(PERSISTENT_BLOCKS // max(channels, 1), most))
    threads_y = THREADS // threads_x
    if blocks > -(-batch * pieces // threads_y):
        # Shorter chunks, of two vectors a thread at least.
        pieces = max(pieces, min(-(-blocks * threads_y // batch), plane // (2 * threads_x * width)))
        blocks = max(1, min(blocks, -(-batch * pieces // threads_y)))
    chunk = _chunk(plane, pieces, width)
    chunks_per_plane = -(-plane // chunk)
    chunks = batch * chunks_per_plane
    blocks = _group_size(blocks, chunks) if blocks > 1 else 1
    chunks_per_block = -(-chunks // blocks)
    blocks = -(-chunks // chunks_per_block)
    slots = -(-chunks_per_block // threads_y) * _slots(chunk, plane, threads_x, width)
    values = (channels, plane, chunk, chunks_per_plane, chunks, chunks_per_block, blocks)
    layout = np.array(values, _NCHW_LAYOUT)
    block, count = (threads_x, threads_y), batch * plane
    return Plan(None, block, layout, channels, channels, blocks, count, slots, arrays, padded)


def _chunk(plane: int, pieces: int, width: int) -> int:
    vectors = -(-plane // (pieces * width))
    return vectors * width


def _slots(chunk: int, plane: int, threads_x: int, width: int) -> int:
    """Slots that a thread needs for a chunk: its vectors, and single values at both ends of odd planes."""
    singles = 0 if plane % width == 0 else 2 * -(-(width - 1) // threads_x)
    return -(-chunk // (width * threads_x)) + singles


def _pieces(plane: int, threads_x: int, width: int, budget: int) -> tuple[int, int]:
    """The fewest pieces of a plane such that each fits, and the slots that one needs."""
    singles = _slots(0, plane, threads_x, width)
    if singles >= budget:
        return 1, budget + 1
    pieces = -(-plane // ((budget - singles) * threads_x * width))
    return pieces, _slots(_chunk(plane, pieces, width), plane, threads_x, width)


def _persistent_nhwc(rows: int, channels: int, itemsize: int, arrays: int, padded: bool) -> Plan | None:
    width = _VECTOR_BYTES // itemsize
    if channels % width:
        return None
    budget = _BYTES_OF_NHWC // _slot_bytes(arrays, padded)
    vectors = channels // width
    # 128 bytes of a row, or the 64 that still are whole sectors.
    for widest in (8, 4):
        threads_x = min(_power_of_two_up_to(2 * vectors - 1), widest)
        threads_y = THREADS // threads_x
        tiles = -(-vectors // threads_x)
        needed = -(-rows // (threads_y * budget))
        if tiles * needed <= PERSISTENT_BLOCKS:
            break
    else:
        # One group after another would stand still at each barrier, and all of the memory with it: that took a third
        # longer than two reads on an H200 (64x56x56x256 bfloat16).
        return None
    count_bytes = rows * itemsize * arrays
    most_blocks = max(1, int(_WORKSPACE_SHARE * 2 * count_bytes / (8 * _number_bytes(itemsize))))
    blocks = max(needed, min(PERSISTENT_BLOCKS // tiles, most_blocks, -(-rows // threads_y)))
    none_over = _group_size(blocks, -(-rows // threads_y))
    if tiles * none_over <= PERSISTENT_BLOCKS:
        blocks = none_over
    rows_per_block = -(-rows // blocks)
    blocks = -(-rows // rows_per_block)
    slots = -(-rows_per_block // threads_y)
    layout = np.array((rows, channels, tiles, rows_per_block, blocks), _NHWC_LAYOUT)
    return Plan(width, (threads_x, threads_y), layout, channels, tiles, blocks, rows, slots, arrays, padded)


# ---- two reads -------------------------------------------------------------------------------------------------------


def _most_blocks(count: int, itemsize: int) -> int:
    """Parts of a channel whose four numbers each, written and read again, stay below 3 % of the traffic.

    A forward moves ``3 * itemsize * count`` bytes of a channel, and two times four numbers for each part.
    """
    return max(1, int(_WORKSPACE_SHARE * 3 * itemsize * count / (2 * 4 * _number_bytes(itemsize))))


def _two_reads_of_nchw(batch: int, channels: int, plane: int, itemsize: int, arrays: int) -> Plan:
    width = _VECTOR_BYTES // itemsize
    # Threads along a chunk: enough for some six vectors each, so that the loop with several loads in flight
    # is entered and what is left over stays small.
    threads_x = min(max(_power_of_two_up_to(plane / width / 6), 4), THREADS)
    threads_y = THREADS // threads_x
    most_blocks = min(-(-_TARGET_BLOCKS // channels), _most_blocks(batch * plane, itemsize))
    # Vectors of a thread in a chunk: fewer where few channels would not make enough blocks; one more than the loop
    # with several loads in flight takes at a time.
    for vectors in (16, 5):
        chunk = -(-min(plane, threads_x * width * vectors) // width) * width
        chunks_per_plane = -(-plane // chunk)
        chunks = batch * chunks_per_plane
        blocks = min(most_blocks, -(-chunks // threads_y))
        if 2 * channels * blocks >= _TARGET_BLOCKS:
            break
    chunks_per_block = -(-chunks // blocks)
    blocks = -(-chunks // chunks_per_block)
    values = (channels, plane, chunk, chunks_per_plane, chunks, chunks_per_block, blocks)
    layout = np.array(values, _NCHW_LAYOUT)
    return Plan(None, (threads_x, threads_y), layout, channels, channels, blocks, batch * plane, None, arrays)


def _two_reads_of_nhwc(rows: int, channels: int, itemsize: int, arrays: int) -> Plan:
    width = _VECTOR_BYTES // itemsize
    if channels % width:
        width = 1
    vectors = channels // width
    # Threads side by side: 128 bytes of a row, or the 64 that still are whole sectors where this takes more blocks
    # to fill a GPU than there are; single channels by the warp.
    has_few = rows * vectors < _VECTORS_OF_ROWS * THREADS * _TARGET_BLOCKS_OF_ROWS
    target = _TARGET_BLOCKS_OF_ROWS // 2 if has_few else _TARGET_BLOCKS_OF_ROWS
    for widest in (8, 4) if width > 1 else (32,):
        threads_x = min(_power_of_two_up_to(2 * vectors - 1), widest)
        threads_y = THREADS // threads_x
        tiles = -(-vectors // threads_x)
        blocks = min(-(-target // tiles), -(-rows // threads_y), _most_blocks(rows, itemsize))
        if 2 * tiles * blocks >= _TARGET_BLOCKS_OF_ROWS:
            break
    rows_per_block = -(-rows // blocks)
    blocks = -(-rows // rows_per_block)
    layout = np.array((rows, channels, tiles, rows_per_block, blocks), _NHWC_LAYOUT)
    return Plan(width, (threads_x, threads_y), layout, channels, tiles, blocks, rows, None, arrays)


def summation_depth(shape: tuple[int, ...], dtype: DTypeLike, channels_last: bool, *, padded: bool = False) -> int:
    """Additions on the way of one value into a sum over its channel, at most: what bounds the sum's rounding error.

    A thread adds its values one after another, a block those of its threads in a tree, and the lanes of a warp the
    blocks' results in turn and then in a tree.
    """
    itemsize = np.dtype(dtype).itemsize
    return max(_depth(plan(tuple(shape), itemsize, channels_last, padded)) for plan in (forward_plan, backward_plan))


def _depth(plan: Plan) -> int:
    threads_x, threads_y = plan.block
    if plan.width is None:
        layout = plan.layout
        of_a_thread = -(-int(layout["chunks_per_block"]) // threads_y) * (-(-int(layout["chunk"]) // threads_x) + 16)
    else:
        of_a_thread = -(-int(plan.layout["rows_per_block"]) // threads_y)
    warp = 32
    return of_a_thread + THREADS.bit_length() + -(-plan.blocks_per_group // warp) + warp.bit_length()
