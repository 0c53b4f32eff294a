"""Fractional max pooling: the reference's bits, however planes are cut into boxes and put together."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.runtime.limits import force_limits
from tests.inputs import DTYPES, assert_same_bits, integers, normal, to_channels_last

# (N, C, *spatial), kernel, outputs: small planes, several in a block; windows that overlap, from box to box; channels
# of several blocks; rows longer than a box; more starts than a block keeps; three axes.
CASES = [
    ((40, 100, 7, 7), (2, 2), (3, 3)),
    ((6, 700, 2, 2), (2, 2), (1, 1)),
    ((1, 40, 30, 20), (3, 3), (20, 16)),
    ((1, 2, 3, 700), (2, 3), (2, 400)),
    ((1, 2, 2, 4200), (1, 2), (2, 4150)),
    ((1, 2, 2, 4200), (2, 2), (1, 4150)),
    ((1, 2, 5, 4200), (3, 3), (2, 4150)),
    ((2, 3, 12, 8, 16), (3, 3, 3), (8, 5, 12)),
]


@pytest.mark.parametrize("limits", [{}, {"full_grid": 1, "max_blocks": 3}, {"index64": True}], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "kernel", "outputs"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [DTYPES[1], np.float32, np.float64], ids=str)
def test_bits_of_the_reference(dtype, shape, kernel, outputs, channels_last, limits):
    x = integers(shape, dtype)
    x = to_channels_last(x) if channels_last else x
    y, saved = gl.ops.fractional_max_pool_forward(x, kernel, outputs, 3, 5, channels_last=channels_last)
    dy = normal(y.shape, dtype)
    dy[..., 0] = -0.0
    with gl.use_backend("emulated"), force_limits(**limits):
        own_y, own_saved = gl.ops.fractional_max_pool_forward(x, kernel, outputs, 3, 5, channels_last=channels_last)
        dx = gl.ops.fractional_max_pool_backward(dy, own_saved)
    assert_same_bits(own_y, y)
    assert_same_bits(own_saved.argmax, saved.argmax)
    assert_same_bits(dx, gl.ops.fractional_max_pool_backward(dy, saved))
