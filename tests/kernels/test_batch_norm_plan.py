"""How blocks share a shape: nothing is left out, and what is kept has room."""

import itertools
import math
from functools import partial

import pytest

from gpu_layers.kernels import batch_norm_plan
from gpu_layers.kernels.batch_norm_plan import PERSISTENT_BLOCKS, THREADS, backward_plan, elementwise_plan, forward_plan

PLANES = [
    (256, 64, 112, 112),
    (64, 256, 56, 56),
    (32, 64, 28, 28),
    (128, 512, 7, 7),
    (1, 3, 224, 224),
    (3, 5, 9, 11),
    (70, 3, 1, 1),
    (5, 8, 7),
    (1, 1, 2_000_003),
    (2, 1, 1, 1),
    (1000, 1, 3, 3),
    (2, 300, 1),
    (513, 17, 61, 67),
]
ROWS = [
    (256 * 112 * 112, 64),
    (200_704, 256),
    (25_088, 512),
    (6272, 2048),
    (64, 1000),
    (2, 1),
    (7, 8),
    (1001, 24),
    (3, 5),
]
PADDED_FORWARD, PADDED_BACKWARD = (partial(plan, padded=True) for plan in (forward_plan, backward_plan))
each_itemsize = pytest.mark.parametrize("itemsize", [2, 4, 8])
each_plan = pytest.mark.parametrize("planned", [forward_plan, backward_plan, elementwise_plan])


@each_itemsize
@each_plan
@pytest.mark.parametrize("shape", PLANES, ids=str)
def test_segments_cover_every_plane_once(shape, planned, itemsize):
    plan = planned(shape, itemsize, False)
    layout, plane = plan.layout, math.prod(shape[2:])
    width = 16 // itemsize
    assert plan.width is None
    assert layout["plane"] == plane
    assert layout["chunk"] % width == 0
    pieces = int(layout["chunks_per_plane"])
    assert (pieces - 1) * layout["chunk"] < plane <= pieces * layout["chunk"]
    assert layout["chunks"] == shape[0] * pieces
    assert layout["blocks"] == plan.blocks_per_group
    assert (plan.blocks_per_group - 1) * layout["chunks_per_block"] < layout["chunks"]
    assert layout["chunks"] <= plan.blocks_per_group * layout["chunks_per_block"]
    assert math.prod(plan.block) == THREADS


@each_itemsize
@each_plan
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_parts_and_tiles_cover_all_rows_and_channels_once(shape, planned, itemsize):
    plan = planned(shape, itemsize, True)
    layout, (rows, channels) = plan.layout, shape
    assert channels % plan.width == 0
    across = plan.block[0] * plan.width
    assert (plan.tiles - 1) * across < channels <= plan.tiles * across
    assert (
        (plan.blocks_per_group - 1) * layout["rows_per_block"]
        < rows
        <= plan.blocks_per_group * layout["rows_per_block"]
    )
    assert math.prod(plan.block) == THREADS


def visits(plan, channel, part, thread_x, thread_y, plane, itemsize):
    """Vectors and single values of one thread, counted as ``for_each_in_block`` walks."""
    layout, width = plan.layout, 16 // itemsize
    along, slots = plan.block
    begin = part * int(layout["chunks_per_block"])
    count = 0
    for s in range(begin + thread_y, min(begin + int(layout["chunks_per_block"]), int(layout["chunks"])), slots):
        sample, piece = divmod(s, int(layout["chunks_per_plane"]))
        first = piece * int(layout["chunk"])
        base = (sample * plan.channels + channel) * plane + first
        length = min(int(layout["chunk"]), plane - first)
        head = min(length, -base % width)
        vectors = (length - head) // width
        tail = length - head - vectors * width
        for amount in (head, vectors, tail):
            count += len(range(thread_x, amount, along))
    return count


@each_itemsize
@pytest.mark.parametrize("planned", [forward_plan, backward_plan, PADDED_FORWARD, PADDED_BACKWARD])
@pytest.mark.parametrize("shape", [shape for shape in PLANES if math.prod(shape) < 2_000_000], ids=str)
def test_there_is_a_place_for_everything_that_a_thread_keeps(shape, planned, itemsize):
    plan = planned(shape, itemsize, False)
    assert plan.slots is not None
    corners = itertools.product(
        {0, min(1, plan.channels - 1), plan.channels - 1},
        {0, plan.blocks_per_group // 2, plan.blocks_per_group - 1},
        {0, 1, plan.block[0] - 1},
        {0, plan.block[1] - 1},
    )
    most = max(visits(plan, *corner, math.prod(shape[2:]), itemsize) for corner in corners)
    assert 1 <= most <= plan.slots


@each_itemsize
@pytest.mark.parametrize(
    ("planned", "bytes_a_thread"),
    # Of padded batches a byte says which values of a slot count.
    [(forward_plan, 16), (backward_plan, 32), (PADDED_FORWARD, 17), (PADDED_BACKWARD, 33)],
)
def test_what_is_kept_fits_into_half_of_the_shared_memory(planned, bytes_a_thread, itemsize):
    kept = [planned(shape, itemsize, False) for shape in PLANES] + [planned(shape, itemsize, True) for shape in ROWS]
    kept = [plan for plan in kept if plan.slots is not None]
    assert len(kept) > 10
    for plan in kept:
        # 228 KB of a multiprocessor, 1 KB of it the system's for each block, 5 KB of static scratch for rows.
        assert plan.shared_bytes == plan.slots * THREADS * bytes_a_thread
        assert 2 * (plan.shared_bytes + 1024 + (0 if plan.width is None else 5 * 1024)) <= 228 * 1024
        assert plan.blocks_per_group <= PERSISTENT_BLOCKS
    values = batch_norm_plan.forward_plan((256, 64, 112, 112), 4, False)
    assert values.slots is not None
    assert "one read" in str(values)


def test_what_does_not_fit_is_read_twice():
    plan = forward_plan((4096, 112, 112, 64), 2, True)
    assert plan.slots is None
    assert "two reads" in str(plan)


def test_rows_are_read_once_where_all_of_them_fit_at_once():
    """And not group after group, however little one of them keeps."""
    for shape, once in (((25_088, 512), True), ((200_704, 256), False), ((256, 112, 112, 64), False)):
        plan = forward_plan(shape, 2, True)
        assert (plan.slots is not None) == once
        assert not once or plan.tiles * plan.blocks_per_group <= PERSISTENT_BLOCKS


def planes(count):
    return (1, 1, count), False


def rows(channels):
    return lambda count: ((count, channels), True)


# Values of a channel that the resident blocks hold, by hand: blocks, places a thread, threads, and values a place. Of
# rows a place has a value of each of four channels, and of sixteen channels four threads share a row.
@pytest.mark.parametrize(
    ("planned", "shape_of", "most", "step", "places"),
    [
        (forward_plan, planes, 264 * 27 * 256 * 4, 4, 27),
        (backward_plan, planes, 264 * 13 * 256 * 4, 4, 13),
        (forward_plan, rows(4), 264 * 27 * 256, 1, 27),
        (backward_plan, rows(4), 264 * 13 * 256, 1, 13),
        (forward_plan, rows(16), 264 * 27 * 64, 1, 27),
        (PADDED_FORWARD, planes, 264 * 26 * 256 * 4, 4, 26),
        (PADDED_BACKWARD, planes, 264 * 13 * 256 * 4, 4, 13),
        (PADDED_FORWARD, rows(4), 264 * 25 * 256, 1, 25),
    ],
)
def test_a_channel_is_resident_up_to_what_the_blocks_hold(planned, shape_of, most, step, places):
    def plan(count):
        shape, channels_last = shape_of(count)
        return planned(shape, 4, channels_last)

    fits, beyond = plan(most), plan(most + step)
    assert (fits.slots, fits.blocks_per_group) == (places, PERSISTENT_BLOCKS)
    assert beyond.slots is None
    # Two blocks share the 228 KB of a multiprocessor. The system takes 1 KB of each, and the kernels, of rows, 5 KB.
    scratch = 1024 if fits.width is None else 6 * 1024
    assert 2 * (fits.shared_bytes + scratch) <= 228 * 1024
