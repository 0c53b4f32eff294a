"""How the blocks of a batch-norm kernel share the values of one shape, and whether it reads them once or twice.

A plan follows from shape and dtype alone, not from the GPU: it fixes the order of the sums, and so every bit of the
result. A GPU that cannot hold what a plan wants resident runs the same plan in two reads, with the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpu_layers.runtime.kernel import c_name

#: Threads of a block: ``kChannelThreads`` of ``channel_layout.cuh``.
THREADS = 256
_VECTOR_BYTES = 16
# Blocks that fill any GPU twice over (132 multiprocessors of 8 blocks of 256 threads), so that it is busy
# whatever the number of channels. A constant, not the GPU's own number.
_TARGET_BLOCKS = 2112
# Resident blocks of an H100, of two a multiprocessor, each with half of the 228 KB of shared memory but for 1 KB that
# the system takes and, of rows, 12 KB of scratch: so many places of 16 bytes a thread.
PERSISTENT_BLOCKS = 264
_PLACES_OF_PLANES, _PLACES_OF_ROWS = 27, 25
# Groups of so many blocks leave none over.
_GROUP_SIZES = tuple(size for size in range(1, PERSISTENT_BLOCKS + 1) if PERSISTENT_BLOCKS % size == 0)
# What the parts of a channel may add to the traffic.
_WORKSPACE_SHARE = 0.03

_PLANE_LAYOUT = np.dtype(
    [
        (name, np.int64)
        for name in ("channels", "plane", "segment", "segments_per_plane", "segments", "segments_per_part", "parts")
    ],
    align=True,
)
_ROW_LAYOUT = np.dtype(
    [(name, np.int64) for name in ("rows", "channels", "tiles", "rows_per_part", "parts")], align=True
)
#: Structs of the kernels' parameters.
STRUCTS = {
    "NchwLayout": _PLANE_LAYOUT,
    "NhwcLayout": _ROW_LAYOUT,
    **{
        f"FoldingRule<{c_name(dtype)}>": np.dtype([(name, dtype) for name in ("old", "newest", "unbiased")])
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
        Threads side by side, and those that take segments or rows in turn.
    layout : ndarray
        ``NchwLayout`` or ``NhwcLayout``.
    channels : int
    tiles : int
        What a group of blocks shares: channels, or of rows tiles of neighbouring channels.
    parts : int
        Blocks of a group.
    count : int
        Values of a channel.
    places : int or None
        Of 16 bytes, that a thread needs to keep what it reads of each array; None where that does not fit, so that
        everything is read twice.
    arrays : int
        To keep: one in the forward, two in the backward.
    """

    width: int | None
    block: tuple[int, int]
    layout: Any
    channels: int
    tiles: int
    parts: int
    count: int
    places: int | None
    arrays: int

    @property
    def blocks(self) -> int:
        """Blocks of each of the two reads."""
        return self.tiles * self.parts

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block that keeps what it reads."""
        return (self.places or 0) * self.arrays * THREADS * _VECTOR_BYTES

    def __str__(self) -> str:
        kind = "planes" if self.width is None else f"rows of {self.width}-channel vectors"
        groups = f"{self.tiles} group{'s' * (self.tiles > 1)} of {self.parts} block{'s' * (self.parts > 1)}"
        threads = f"{self.block[0]} x {self.block[1]} threads"
        if self.places is None:
            return f"two reads, {kind}, {groups}, {threads}"
        how = "cooperative" if self.parts > 1 else "plain launch"
        kept = f"{self.shared_bytes / 1024:.0f} KB of shared memory a block"
        return f"one read, {kind}, {groups}, {threads}, {kept}, {how}"


@lru_cache(maxsize=1024)
def forward_plan(shape: tuple[int, ...], itemsize: int, channels_last: bool) -> Plan:
    """The plan of the statistics, for an input of this shape."""
    return _plan(shape, itemsize, channels_last, 1)


@lru_cache(maxsize=1024)
def backward_plan(shape: tuple[int, ...], itemsize: int, channels_last: bool) -> Plan:
    """The plan of the gradients' sums, of two arrays."""
    return _plan(shape, itemsize, channels_last, 2)


@lru_cache(maxsize=1024)
def elementwise_plan(shape: tuple[int, ...], itemsize: int, channels_last: bool) -> Plan:
    """The plan of what sums nothing: evaluation, and the second of two reads."""
    if channels_last or len(shape) == 2:
        return _two_reads_of_nhwc(math.prod(shape[:-1]), shape[-1], itemsize, 1)
    return _two_reads_of_nchw(shape[0], shape[1], math.prod(shape[2:]), itemsize, 1)


def _plan(shape: tuple[int, ...], itemsize: int, channels_last: bool, arrays: int) -> Plan:
    if channels_last or len(shape) == 2:
        rows, channels = math.prod(shape[:-1]), shape[-1]
        return _persistent_nhwc(rows, channels, itemsize, arrays) or _two_reads_of_nhwc(
            rows, channels, itemsize, arrays
        )
    batch, channels, plane = shape[0], shape[1], math.prod(shape[2:])
    resident = _persistent_nchw(batch, channels, plane, itemsize, arrays)
    return resident or _two_reads_of_nchw(batch, channels, plane, itemsize, arrays)


def _power_of_two_up_to(value: float) -> int:
    return 1 << max(0, int(math.log2(max(value, 1))))


def _number_bytes(itemsize: int) -> int:
    return 8 if itemsize == 8 else 4


def _group_size(parts: int, most: int) -> int:
    """The next size of a group that leaves no blocks over, if it is not more than ``most``."""
    size = next(size for size in _GROUP_SIZES if size >= parts)
    return size if size <= most else parts


# ---- one read --------------------------------------------------------------------------------------------------------


def _persistent_nchw(batch: int, channels: int, plane: int, itemsize: int, arrays: int) -> Plan | None:
    width = _VECTOR_BYTES // itemsize
    budget = _PLACES_OF_PLANES // arrays
    best: tuple[Any, ...] | None = None
    # Neighbouring threads read 128 bytes together, where a plane has as many.
    for along in (256, 128, 64, 32, 16, 8, *([4] if plane * itemsize <= 128 else [])):
        pieces, places = _pieces(plane, along, width, budget)
        if places > budget:
            continue
        segments_per_part = THREADS // along * (budget // places)
        needed = -(-batch * pieces // segments_per_part)
        if needed > PERSISTENT_BLOCKS:
            continue
        # Few parts; then a loop with several loads in flight (see Share in channel_layout.cuh); then long rows.
        rank = (needed, min(-(-plane // (width * along * pieces)), 6) * -1, -along)
        if best is None or rank < best[0]:
            best = (rank, along, pieces, needed)
    if best is None:
        return None
    _, along, pieces, needed = best
    # More blocks where there are few channels, up to what a GPU holds; but each reads what all of a group leave.
    slab = batch * plane * itemsize * arrays
    most = int(math.sqrt(_WORKSPACE_SHARE * slab / (4 * _number_bytes(itemsize))))
    parts = max(needed, min(PERSISTENT_BLOCKS // max(channels, 1), most))
    slots = THREADS // along
    if parts > -(-batch * pieces // slots):
        # Shorter segments, of two vectors a thread at least.
        pieces = max(pieces, min(-(-parts * slots // batch), plane // (2 * along * width)))
        parts = max(1, min(parts, -(-batch * pieces // slots)))
    segment = _segment(plane, pieces, width)
    segments_per_plane = -(-plane // segment)
    segments = batch * segments_per_plane
    parts = _group_size(parts, segments) if parts > 1 else 1
    segments_per_part = -(-segments // parts)
    parts = -(-segments // segments_per_part)
    places = -(-segments_per_part // slots) * _places(segment, plane, along, width)
    values = (channels, plane, segment, segments_per_plane, segments, segments_per_part, parts)
    layout = np.array(values, _PLANE_LAYOUT)
    return Plan(None, (along, slots), layout, channels, channels, parts, batch * plane, places, arrays)


def _segment(plane: int, pieces: int, width: int) -> int:
    vectors = -(-plane // (pieces * width))
    return vectors * width


def _places(segment: int, plane: int, along: int, width: int) -> int:
    """Places that a thread needs for a segment: its vectors, and single values at both ends of odd planes."""
    singles = 0 if plane % width == 0 else 2 * -(-(width - 1) // along)
    return -(-segment // (width * along)) + singles


def _pieces(plane: int, along: int, width: int, budget: int) -> tuple[int, int]:
    """The fewest pieces of a plane of which each fits, and the places that one needs."""
    singles = _places(0, plane, along, width)
    if singles >= budget:
        return 1, budget + 1
    pieces = -(-plane // ((budget - singles) * along * width))
    return pieces, _places(_segment(plane, pieces, width), plane, along, width)


def _persistent_nhwc(rows: int, channels: int, itemsize: int, arrays: int) -> Plan | None:
    width = _VECTOR_BYTES // itemsize
    if channels % width:
        return None
    budget = _PLACES_OF_ROWS // arrays
    vectors = channels // width
    # 128 bytes of a row, or the 64 that still are whole sectors where this leaves room for a second group, or for one.
    half = PERSISTENT_BLOCKS // 2
    for widest, most in ((8, half), (4, half), (8, PERSISTENT_BLOCKS), (4, PERSISTENT_BLOCKS)):
        along = min(_power_of_two_up_to(2 * vectors - 1), widest)
        slots = THREADS // along
        needed = -(-rows // (slots * budget))
        if needed <= most:
            break
    else:
        return None
    tiles = -(-vectors // along)
    count_bytes = rows * itemsize * arrays
    most_parts = max(1, int(_WORKSPACE_SHARE * 2 * count_bytes / (8 * _number_bytes(itemsize))))
    parts = max(needed, min(PERSISTENT_BLOCKS // tiles, most_parts, -(-rows // slots)))
    parts = _group_size(parts, -(-rows // slots)) if parts > 1 else 1
    rows_per_part = -(-rows // parts)
    parts = -(-rows // rows_per_part)
    layout = np.array((rows, channels, tiles, rows_per_part, parts), _ROW_LAYOUT)
    return Plan(width, (along, slots), layout, channels, tiles, parts, rows, -(-rows_per_part // slots), arrays)


# ---- two reads -------------------------------------------------------------------------------------------------------


def _most_parts(count: int, itemsize: int) -> int:
    """Parts of a channel whose four numbers each, written and read again, stay below 3 % of the traffic.

    A forward moves ``3 * itemsize * count`` bytes of a channel, and two times four numbers for each part.
    """
    return max(1, int(_WORKSPACE_SHARE * 3 * itemsize * count / (2 * 4 * _number_bytes(itemsize))))


def _two_reads_of_nchw(batch: int, channels: int, plane: int, itemsize: int, arrays: int) -> Plan:
    width = _VECTOR_BYTES // itemsize
    # Threads along a segment: enough for some six vectors each, so that the loop with several loads in flight
    # is entered and what is left over stays small.
    along = min(max(_power_of_two_up_to(plane / width / 6), 4), THREADS)
    slots = THREADS // along
    most_parts = min(-(-_TARGET_BLOCKS // channels), _most_parts(batch * plane, itemsize))
    # Vectors of a thread in a segment: fewer where few channels would not make enough blocks; one more than the loop
    # with several loads in flight takes at a time.
    for vectors in (16, 5):
        segment = -(-min(plane, along * width * vectors) // width) * width
        segments_per_plane = -(-plane // segment)
        segments = batch * segments_per_plane
        parts = min(most_parts, -(-segments // slots))
        if 2 * channels * parts >= _TARGET_BLOCKS:
            break
    segments_per_part = -(-segments // parts)
    parts = -(-segments // segments_per_part)
    values = (channels, plane, segment, segments_per_plane, segments, segments_per_part, parts)
    layout = np.array(values, _PLANE_LAYOUT)
    return Plan(None, (along, slots), layout, channels, channels, parts, batch * plane, None, arrays)


def _two_reads_of_nhwc(rows: int, channels: int, itemsize: int, arrays: int) -> Plan:
    width = _VECTOR_BYTES // itemsize
    if channels % width:
        width = 1
    vectors = channels // width
    # Threads side by side: 128 bytes of a row, or the 64 that still are whole sectors where this takes more blocks
    # to fill a GPU than there are; single channels by the warp.
    for widest in (8, 4) if width > 1 else (32,):
        along = min(_power_of_two_up_to(2 * vectors - 1), widest)
        slots = THREADS // along
        tiles = -(-vectors // along)
        parts = min(-(-_TARGET_BLOCKS // tiles), -(-rows // slots), _most_parts(rows, itemsize))
        if 2 * tiles * parts >= _TARGET_BLOCKS:
            break
    rows_per_part = -(-rows // parts)
    parts = -(-rows // rows_per_part)
    layout = np.array((rows, channels, tiles, rows_per_part, parts), _ROW_LAYOUT)
    return Plan(width, (along, slots), layout, channels, tiles, parts, rows, None, arrays)


def summation_depth(shape: tuple[int, ...], dtype: Any, channels_last: bool) -> int:
    """Additions on the way of one value into a sum over its channel, at most: what bounds the sum's rounding error.

    A thread adds its values one after another, a block those of its threads in a tree, and the lanes of a warp the
    blocks' results in turn and then in a tree.
    """
    itemsize = np.dtype(dtype).itemsize
    return max(_depth(plan(tuple(shape), itemsize, channels_last)) for plan in (forward_plan, backward_plan))


def _depth(plan: Plan) -> int:
    along, slots = plan.block
    if plan.width is None:
        layout = plan.layout
        of_a_thread = -(-int(layout["segments_per_part"]) // slots) * (-(-int(layout["segment"]) // along) + 16)
    else:
        of_a_thread = -(-int(plan.layout["rows_per_part"]) // slots)
    warp = 32
    return of_a_thread + THREADS.bit_length() + -(-plan.parts // warp) + warp.bit_length()
