"""Pooling of whole planes: how planes share vectors, threads and blocks changes nothing."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.runtime.limits import force_limits
from profiling.traffic import listed_launches
from tests.inputs import (
    BFLOAT16,
    DTYPES,
    UNIT_ROUNDOFF,
    accumulation_dtype,
    assert_same_bits,
    assert_same_values,
    assert_within,
    normal,
    to_channels_last,
)

# (N, C, height, width), channels_last: planes of less than a vector, no whole vectors, whole ones; several in a vector,
# in a warp, in a block; more than a block's; the last planes of a block alone. Channels side by side, which make
# vectors or do not.
SHAPES = [
    ((9, 130, 1, 3), False),
    ((70, 64, 1, 9), False),
    ((3, 129, 7, 7), False),
    ((1, 129, 15, 17), False),
    ((2, 65, 22, 23), False),
    ((2, 9, 31, 33), False),
    ((3, 3, 32, 32), False),
    ((2, 2, 33, 32), False),
    ((2, 3, 91, 93), False),
    ((3, 5, 8, 9), True),
    ((2, 3, 70, 71), True),
    ((1, 40, 11, 7), True),
    ((2, 33, 9, 8), True),
]


@pytest.mark.parametrize("limits", [{}, {"max_blocks": 2}], ids=str)
@pytest.mark.parametrize(("shape", "channels_last"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, *DTYPES[2:]], ids=str)
def test_largest_values_and_gradients_are_those_of_the_reference(dtype, shape, channels_last, limits):
    x, plane = normal(shape, dtype), shape[2:]
    x[0, 0, 0, -1] = x[-1, -1, -1, 0] = np.nan
    x = to_channels_last(x) if channels_last else x
    y, saved = gl.ops.max_pool_forward(x, plane, channels_last=channels_last)
    dy = normal(y.shape, dtype, seed=1)
    dy[0, ..., 0] = -0.0
    _, averaged = gl.ops.avg_pool_forward(x, plane, channels_last=channels_last)
    with gl.use_backend("emulated"), force_limits(**limits):
        own_y, own_saved = gl.ops.max_pool_forward(x, plane, channels_last=channels_last)
        gradients = gl.ops.max_pool_backward(dy, own_saved), gl.ops.avg_pool_backward(dy, averaged)
    assert_same_values(own_y, y)
    assert_same_bits(own_saved.argmax, saved.argmax)
    assert_same_bits(gradients[0], gl.ops.max_pool_backward(dy, saved))
    # The factor, the product and the result are rounded; so is the reference's quotient.
    shares = np.broadcast_to(dy.astype(np.float64) / (shape[2] * shape[3]), x.shape)
    assert_within(gradients[1], shares, 3 * UNIT_ROUNDOFF[dtype] * np.abs(shares))
    assert not np.signbit(gradients[1][0, ..., 0][shares[0, ..., 0] == 0]).any()


@pytest.mark.parametrize("limits", [{}, {"max_blocks": 2}], ids=str)
@pytest.mark.parametrize(("shape", "channels_last"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, *DTYPES[2:]], ids=str)
def test_means_are_within_their_rounding(dtype, shape, channels_last, limits):
    x = normal(shape, dtype)
    x = to_channels_last(x) if channels_last else x
    with gl.use_backend("emulated"), force_limits(**limits):
        y, _ = gl.ops.avg_pool_forward(x, shape[2:], channels_last=channels_last)
    wide = x.astype(np.longdouble)
    axes = (1, 2) if channels_last else (2, 3)
    exact, size = wide.mean(axes, keepdims=True), np.abs(wide).mean(axes, keepdims=True)
    # At most 32 additions without compensation, the sum of these, the factor and the product: each errs by the unit
    # roundoff of what is added up, at most; and the result is rounded.
    accumulated = 35 * UNIT_ROUNDOFF[accumulation_dtype(dtype)] * size
    assert_within(y, exact, accumulated + UNIT_ROUNDOFF[dtype] * (np.abs(exact) + accumulated))


def test_chunks_of_a_full_round_of_blocks():
    """Three chunks of 334, 334 and 332 positions: threads of a block have different numbers of them."""
    shape = (170, 25, 40, 128)
    x = np.random.default_rng(1).integers(-8, 9, shape).astype(np.float32)
    with listed_launches() as launches:
        gl.ops.avg_pool_forward(x, shape[1:3], channels_last=True)
    assert [launch.grid[0] for launch in launches] == [3 * 170, 170 * 128 // 256]
    with gl.use_backend("emulated"):
        y, _ = gl.ops.avg_pool_forward(x, shape[1:3], channels_last=True)
        largest, saved = gl.ops.max_pool_forward(x, shape[1:3], channels_last=True)
    # Sums of whole numbers are exact.
    sums = x.sum((1, 2), dtype=np.float64)
    assert_within(y[:, 0, 0], sums / 1000, 2 * UNIT_ROUNDOFF[np.dtype(np.float32)] * np.abs(sums / 1000))
    of_planes = x.reshape(170, 1000, 128)
    np.testing.assert_array_equal(largest[:, 0, 0], of_planes.max(1))
    np.testing.assert_array_equal(saved.argmax[:, 0, 0], of_planes.argmax(1))
