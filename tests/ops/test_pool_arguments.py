"""What both poolings refuse, in PyTorch's words, before anything is computed."""

import numpy as np
import pytest

import gpu_layers as gl
from tests.ops.pool_cases import BAD_WINDOWS

each_pool = pytest.mark.parametrize(
    "pool", [gl.ops.max_pool_forward, gl.ops.avg_pool_forward], ids=["max_pool", "avg_pool"]
)
X = np.ones((2, 3, 6, 6), np.float32)


@each_pool
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *BAD_WINDOWS,
        ({"kernel_size": 2}, TypeError, "kernel_size must be a tuple, one int a spatial axis, got int"),
        ({"kernel_size": "22"}, TypeError, "kernel_size must be a tuple, one int a spatial axis, got str"),
        ({"kernel_size": ()}, ValueError, "kernel_size must have 1 to 3 elements, one a spatial axis, got 0"),
        ({"kernel_size": (1, 1, 1, 1)}, ValueError, "kernel_size must have 1 to 3 elements, one a spatial axis, got 4"),
        ({"kernel_size": (7, 7)}, ValueError, "Output size is too small$"),
        ({"dilation": 3}, ValueError, "Output size is too small$"),
    ],
)
def test_bad_windows(pool, change, error, message):
    arguments = {"kernel_size": (3, 3)} | change
    with pytest.raises(error, match=message):
        pool(X, **arguments)


@each_pool
@pytest.mark.parametrize("shape", [(), (3,), (3, 6), (1, 2, 3, 6, 6)])
def test_wrong_ranks(pool, shape):
    with pytest.raises(ValueError, match=r"^Expected 3D or 4D \(batch mode\) tensor with optional 0 dim batch size"):
        pool(np.ones(shape, np.float32), (2, 2))


@each_pool
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        ((2, 0, 6, 6), False),
        ((2, 3, 0, 6), False),
        ((2, 3, 6, 0), False),
        ((0, 3, 6, 0), False),
        ((0, 6, 6), False),
        ((2, 6, 6, 0), True),
        ((2, 0, 6, 3), True),
        ((6, 6, 0), True),
    ],
)
def test_empty_channels_and_planes(pool, shape, channels_last):
    with pytest.raises(ValueError, match=r"^Expected 3D or 4D \(batch mode\) .* input, but got:\[\d, "):
        pool(np.ones(shape, np.float32), (1, 1), channels_last=channels_last)


@each_pool
def test_numpy_integers_and_lists_are_sizes(pool):
    expected, _ = pool(X, (2, 3), (1, 2), (1, 1))
    y, _ = pool(X, [np.int64(2), np.uint8(3)], [1, np.int32(2)], np.int16(1))
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("divisor", "error", "message"),
    [
        (0, ValueError, "^divisor must be not zero$"),
        (1.5, TypeError, "divisor_override must be an integer, got float"),
        ("2", TypeError, "divisor_override must be an integer, got str"),
        (True, TypeError, "divisor_override must be an integer, got bool"),
        (2**40, ValueError, "divisor_override must be in"),
    ],
)
def test_bad_divisors(divisor, error, message):
    with pytest.raises(error, match=message):
        gl.ops.avg_pool_forward(X, (2, 2), divisor_override=divisor)
