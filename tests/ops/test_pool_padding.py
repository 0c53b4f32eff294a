"""Padding of each side, and "same": against padding by hand, whatever the operation."""

import numpy as np
import pytest

import gpu_layers as gl
from tests.inputs import assert_same_bits, assert_same_values, integers, tie_free

PAIRS = [((1, 2), (0, 1)), ((2, 0), (2, 2)), ((0, 0), (1, 0))]
OPTIONS = [{"stride": 1}, {"stride": 2}, {"stride": (2, 3), "dilation": (1, 2)}]


def by_hand(x, pairs, value):
    return np.pad(x, ((0, 0), (0, 0), *pairs), constant_values=value)


@pytest.mark.parametrize("pairs", PAIRS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pool_pads_each_side_with_minus_infinity(pairs, options, ceil_mode):
    x = tie_free((2, 3, 7, 8))
    options = options | {"kernel_size": (3, 3), "ceil_mode": ceil_mode}
    y, saved = gl.ops.max_pool_forward(x, padding=pairs, **options)
    padded = by_hand(x, pairs, -np.inf)
    expected, saved_padded = gl.ops.max_pool_forward(padded, **options)
    # A window in ceil mode must start before the padding at the end, which by hand is part of the input.
    expected = expected[..., : y.shape[2], : y.shape[3]]
    assert_same_bits(y, np.ascontiguousarray(expected))
    dy = integers(y.shape)
    wide = np.zeros(saved_padded.output_shape)
    wide[..., : y.shape[2], : y.shape[3]] = dy
    dx = gl.ops.max_pool_backward(wide, saved_padded)
    (top, _), (left, _) = pairs
    assert_same_bits(gl.ops.max_pool_backward(dy, saved), dx[..., top : top + 7, left : left + 8].copy())


@pytest.mark.parametrize("pairs", PAIRS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_avg_pool_pads_each_side_with_zeros(pairs, options):
    x = integers((2, 3, 7, 8))
    options = options | {"kernel_size": (3, 3)}
    y, saved = gl.ops.avg_pool_forward(x, padding=pairs, **options)
    expected, saved_padded = gl.ops.avg_pool_forward(by_hand(x, pairs, 0), **options)
    assert_same_values(y + 0.0, expected + 0.0)
    dy = integers(y.shape, seed=1)
    dx = gl.ops.avg_pool_backward(dy, saved_padded)
    (top, _), (left, _) = pairs
    assert_same_bits(gl.ops.avg_pool_backward(dy, saved), dx[..., top : top + 7, left : left + 8].copy())


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (2, 1), (3, 1), (4, 1), (3, 2)])
def test_same_gives_an_output_for_each_stride_of_the_input(size, stride, kernel, dilation):
    x = tie_free((1, 1, size))
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    for padding, before in (("same_upper", total // 2), ("same_lower", -(-total // 2))):
        y, saved = gl.ops.max_pool_forward(x, (kernel,), stride, padding, dilation)
        assert y.shape == (1, 1, -(-size // stride))
        expected, _ = gl.ops.max_pool_forward(x, (kernel,), stride, ((before, total - before),), dilation)
        assert_same_bits(y, expected)
        # Ceil mode has nothing to add.
        assert_same_bits(gl.ops.max_pool_forward(x, (kernel,), stride, padding, dilation, ceil_mode=True)[0], y)
        assert saved.window.pad_before == (before,)


def test_same_follows_the_input_of_each_call():
    layer = gl.AvgPool1d(3, 2, "same_upper")
    for size in (5, 8, 1):
        assert layer(np.ones((2, 3, size))).shape == (2, 3, -(-size // 2))
    assert repr(layer) == "AvgPool1d(kernel_size=(3,), stride=(2,), padding=same_upper)"


@pytest.mark.parametrize("pool", [gl.ops.max_pool_forward, gl.ops.avg_pool_forward], ids=["max", "avg"])
@pytest.mark.parametrize(
    ("padding", "error", "message"),
    [
        (((3, 0), (0, 0)), ValueError, "^pad should be smaller than the effective kernel size, but got pad=3, kernel"),
        (((0, -1), (0, 0)), ValueError, "^pad must be non-negative, but got pad: -1$"),
        (((1, 1),), ValueError, r"^padding must be 2 \(before, after\) pairs, one a spatial axis, got "),
        (((1, 1), (1, 1, 1)), ValueError, r"^padding must be 2 \(before, after\) pairs"),
        (((1, 1), 1), ValueError, r"^padding must be 2 \(before, after\) pairs"),
        (((1, 1.0), (1, 1)), TypeError, "padding must be an integer, got float"),
        ("same", TypeError, "^padding must be an integer, got str 'same': give integers"),
    ],
)
def test_bad_padding(pool, padding, error, message):
    with pytest.raises(error, match=message):
        pool(np.ones((1, 1, 6, 6)), (3, 3), padding=padding)


@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_a_dilated_window_of_as_many_taps_as_inputs_is_not_the_whole_plane(backend):
    """Its second tap lies in the padding."""
    x, options = np.array([[[3.0, 8.0]]]), {"stride": 1, "padding": ((0, 1),), "dilation": 2}
    with gl.use_backend(backend):
        y, saved = gl.ops.max_pool_forward(x, (2,), **options)
        assert_same_bits(y, np.array([[[3.0]]]))
        assert_same_bits(gl.ops.max_pool_backward(y, saved), np.array([[[3.0, 0.0]]]))
        for include, value in ((True, 1.5), (False, 3.0)):
            y, saved = gl.ops.avg_pool_forward(x, (2,), **options, count_include_pad=include)
            assert_same_bits(y, np.array([[[value]]]))
            assert_same_bits(gl.ops.avg_pool_backward(y, saved), np.array([[[value * value / 3, 0.0]]]))
