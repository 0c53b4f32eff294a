"""Unpooling: the reference's bits, however planes are cut and put together; of equal indices the last value."""

import math

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.runtime.limits import force_limits
from tests.inputs import DTYPES, assert_same_bits, normal

# (N, C, *spatial) of the values, output size: small planes, several in a block; a plane of a few values, and of more
# than a half type is packed with; all values at one place.
CASES = [((40, 33, 3, 3), (7, 7)), ((1, 2, 40, 33), (121, 66)), ((1, 1, 300, 220), (310, 230)), ((4, 5, 6, 6), (1, 1))]


@pytest.mark.parametrize("limits", [{}, {"full_grid": 1, "max_blocks": 3}], ids=str)
@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [DTYPES[1], np.float32], ids=str)
def test_bits_of_the_reference(dtype, shape, size, limits):
    x, plane = normal(shape, dtype), math.prod(size)
    indices = np.random.default_rng(1).integers(-1, plane + 1, shape)
    y, _ = gl.ops.max_unpool_forward(x, indices, size, check=False)
    with gl.use_backend("emulated", check=True), force_limits(**limits):
        own, saved = gl.ops.max_unpool_forward(x, indices, size, check=False)
        checked, _ = gl.ops.max_unpool_forward(x, indices.clip(0, plane - 1), size)
    assert_same_bits(own, y)
    assert_same_bits(saved.indices, indices)
    assert not np.shares_memory(saved.indices, indices)
    assert_same_bits(checked, gl.ops.max_unpool_forward(x, indices.clip(0, plane - 1), size)[0])
