"""Masks that neighbouring elements share: by channels and by samples."""

import itertools

import numpy as np
import pytest

import gpu_layers as gl
from tests import philox_in_ints
from tests.inputs import WRITABLE_LAYOUTS, accumulation_dtype, assert_same_bits, each_dtype, normal, with_specials

SEED, OFFSET = 2**63 + 12345, 2**32 + 7
SHAPES = [((3, 5, 7), 2), ((4, 6, 3, 3), 2), ((5, 8), 1), ((6, 2, 3), 1), ((9,), 1), ((3, 4, 1), 2), ((2, 3, 4), 3)]


def expected_dropout(x, p, mask_axes, start=0):
    """One word for each index of the mask's axes, by plain integers."""
    shape = x.shape[:mask_axes]
    keep = philox_in_ints.kept(int(np.prod(shape)), p, SEED, OFFSET, start).reshape(shape)
    keep = keep.reshape(shape + (1,) * (x.ndim - mask_axes))
    wide = accumulation_dtype(x.dtype)
    with np.errstate(all="ignore"):
        return np.where(keep, (x.astype(wide) * wide.type(1 / (1 - p))).astype(x.dtype), x.dtype.type(0))


@each_dtype
@pytest.mark.parametrize("mask_axes", [1, 2])
@pytest.mark.parametrize("length", [2**16 - 1, 2**16, 3 * 2**16 + 5])
def test_runs_longer_than_a_piece_of_the_walk(dtype, mask_axes, length):
    x = np.ones((2, 3, length), dtype)
    y, _ = gl.ops.dropout_forward(x, 0.5, SEED, OFFSET, start=3, mask_axes=mask_axes)
    assert_same_bits(y, expected_dropout(x, 0.5, mask_axes, 3))


@each_dtype
def test_a_dropped_channel_is_plus_zero_whatever_it_was(dtype):
    x = with_specials((20, 10, 6), dtype)
    y, _ = gl.ops.dropout_forward(x, 0.5, SEED, OFFSET, mask_axes=2)
    keep = philox_in_ints.kept(200, 0.5, SEED, OFFSET).reshape(20, 10)
    assert 50 < keep.sum() < 150
    assert y[~keep].tobytes() == bytes(y[~keep].nbytes)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(y[keep].astype(np.float64), x[keep].astype(np.float64) * 2)


@each_dtype
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS.values(), ids=WRITABLE_LAYOUTS)
def test_in_place(dtype, layout):
    values = normal((4, 5, 3), dtype)
    x = layout(values)
    assert gl.ops.dropout_forward(x, 0.5, SEED, OFFSET, mask_axes=2, out=x)[0] is x
    assert_same_bits(x, expected_dropout(values, 0.5, 2))


def test_shards_of_samples_together_are_the_whole():
    x = normal((10, 3, 5), np.float32)
    whole, _ = gl.ops.dropout_forward(x, 0.5, SEED, OFFSET, mask_axes=2)
    for first, last in itertools.pairwise([0, 1, 4, 10]):
        shard, saved = gl.ops.dropout_forward(x[first:last], 0.5, SEED, OFFSET, start=3 * first, mask_axes=2)
        assert_same_bits(shard, whole[first:last])
        assert_same_bits(gl.ops.dropout_backward(x[first:last], saved), whole[first:last])


def test_start_counts_decisions():
    x = np.ones((2, 3, 1000), np.float32)
    gl.ops.dropout_forward(x, 0.5, 1, 2, start=2**64 - 6, mask_axes=2)
    with pytest.raises(ValueError, match=r"start must be in 0 \.\. 18446744073709551610"):
        gl.ops.dropout_forward(x, 0.5, 1, 2, start=2**64 - 5, mask_axes=2)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_axes(shape):
    x = np.ones(shape, np.float32)
    y, saved = gl.ops.dropout_forward(x, 0.5, 1, 2, mask_axes=2)
    assert y.shape == gl.ops.dropout_backward(x, saved).shape == shape
