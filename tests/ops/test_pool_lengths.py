"""Padded batches: each sample pooled as though it came alone, cut to its lengths."""

import numpy as np
import pytest

import gpu_layers as gl
from tests.inputs import assert_same_bits, assert_within, integers, normal, to_channels_first, to_channels_last

SHAPE = (4, 3, 9, 8)
LENGTHS = [[9, 8], [5, 8], [4, 3], [3, 7]]
OPTIONS = [
    {"kernel_size": (2, 2)},
    {"kernel_size": (3, 3), "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "stride": 1, "padding": ((1, 2), (0, 1)), "ceil_mode": True},
    {"kernel_size": (2, 2), "stride": 2, "dilation": (2, 1)},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def alone(x, lengths):
    """Samples without their padding."""
    for sample, (height, width) in zip(x, lengths, strict=True):
        yield sample[None, :, :height, :width].copy()


@each_option
def test_max_pool_is_that_of_each_sample_alone(options):
    x = integers(SHAPE)
    y, saved = gl.ops.max_pool_forward(x, **options, lengths=LENGTHS)
    indices = gl.ops.max_pool_indices(saved)
    for n, sample in enumerate(alone(x, LENGTHS)):
        expected, own = gl.ops.max_pool_forward(sample, **options)
        rows, columns = expected.shape[2:]
        assert_same_bits(y[n : n + 1, :, :rows, :columns].copy(), expected)
        width = sample.shape[3]
        flat = gl.ops.max_pool_indices(own)
        assert_same_bits(indices[n : n + 1, :, :rows, :columns].copy(), flat // width * SHAPE[3] + flat % width)


@each_option
@pytest.mark.parametrize("count_include_pad", [False, True])
def test_avg_pool_is_that_of_each_sample_alone(options, count_include_pad):
    x = normal(SHAPE)
    options = options | {"count_include_pad": count_include_pad}
    y, _ = gl.ops.avg_pool_forward(x, **options, lengths=LENGTHS)
    for n, sample in enumerate(alone(x, LENGTHS)):
        expected, _ = gl.ops.avg_pool_forward(sample, **options)
        rows, columns = expected.shape[2:]
        assert_within(y[n : n + 1, :, :rows, :columns], expected, 9 * 4 * 2.0**-52)


@each_option
@pytest.mark.parametrize("forward", [gl.ops.max_pool_forward, gl.ops.avg_pool_forward], ids=["max", "avg"])
def test_what_is_beyond_neither_counts_nor_gets_a_gradient(options, forward):
    x = normal(SHAPE)
    backward = gl.ops.max_pool_backward if forward is gl.ops.max_pool_forward else gl.ops.avg_pool_backward
    y, saved = forward(x, **options, lengths=LENGTHS)
    dx = backward(normal(y.shape, seed=1), saved)
    changed = np.full_like(x, np.nan)
    for n, (height, width) in enumerate(LENGTHS):
        changed[n, :, :height, :width] = x[n, :, :height, :width]
        assert not dx[n, :, height:].any()
        assert not dx[n, :, :, width:].any()
    assert_same_bits(forward(changed, **options, lengths=LENGTHS)[0], y)


@pytest.mark.parametrize("forward", [gl.ops.max_pool_forward, gl.ops.avg_pool_forward], ids=["max", "avg"])
def test_padding_stays_padding(forward):
    y, saved = forward(np.full((2, 1, 8), 5.0), (2,), lengths=[3, 0])
    np.testing.assert_array_equal(y[:, 0] != 0, [[True, True, False, False], [False] * 4])
    if forward is gl.ops.max_pool_forward:
        np.testing.assert_array_equal(gl.ops.max_pool_indices(saved)[:, 0], [[0, 2, -1, -1], [-1] * 4])
        assert gl.ops.max_pool_backward(np.ones_like(y), saved).sum() == 2


@each_option
@pytest.mark.parametrize("forward", [gl.ops.max_pool_forward, gl.ops.avg_pool_forward], ids=["max", "avg"])
def test_full_lengths_and_channels_last_change_nothing(options, forward):
    x = integers(SHAPE, np.float32)
    y, _ = forward(x, **options)
    assert_same_bits(forward(x, **options, lengths=[[9, 8]] * 4)[0], y)
    y, _ = forward(x, **options, lengths=LENGTHS)
    last, _ = forward(to_channels_last(x), **options, lengths=LENGTHS, channels_last=True)
    assert_same_bits(to_channels_first(last), y)


def test_layers_take_lengths_and_keep_a_copy():
    x, lengths = normal((2, 3, 8)), np.array([3, 8])
    for layer in (gl.MaxPool1d(3, 2, 1), gl.AvgPool1d(3, 2, 1)):
        lengths[:] = 3, 8
        y = layer(x, lengths=lengths)
        dx = layer.backward(np.ones_like(y))
        lengths[:] = 8
        assert_same_bits(layer.backward(np.ones_like(y)), dx)
        one = layer(x[0], lengths=3)
        assert_same_bits(one, y[0])


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([3], ValueError, r"^lengths must have the shape \[2, 1\] or \[2\], got \[1\]$"),
        ([[3, 3], [3, 3]], ValueError, r"^lengths must have the shape \[2, 1\] or \[2\], got \[2, 2\]$"),
        ([3, 9], ValueError, r"^lengths must be in 0 \.\. the input's size \[8\], got "),
        ([-1, 3], ValueError, r"^lengths must be in 0 \.\. the input's size"),
        ([3.0, 3.0], TypeError, "^lengths must be integers, got float64$"),
        ({0: 3, 1: 3}, TypeError, "^lengths must be integers, got object$"),
    ],
)
def test_bad_lengths(lengths, error, message):
    for forward in (gl.ops.max_pool_forward, gl.ops.avg_pool_forward):
        with pytest.raises(error, match=message):
            forward(np.ones((2, 3, 8)), (2,), lengths=lengths)


def test_lengths_are_kept_while_somebody_has_them():
    x = normal((2, 1, 9), np.float32)
    given = np.array([3, 7])
    _, first = gl.ops.max_pool_forward(x, (2,), lengths=given)
    _, second = gl.ops.avg_pool_forward(x, (3,), lengths=[3, 7])
    assert first.lengths is second.lengths
    # By value: another list is another one, and so is the same for another input.
    given[1] = 6
    y, third = gl.ops.max_pool_forward(x, (2,), lengths=given)
    assert third.lengths.tolist() == [[3], [6]]
    assert first.lengths.tolist() == [[3], [7]]
    assert_same_bits(y, gl.ops.max_pool_forward(x, (2,), lengths=[3, 6])[0])
    with pytest.raises(ValueError, match=r"in 0 \.\. the input's size"):
        gl.ops.max_pool_forward(x[:, :, :5], (2,), lengths=[3, 7])
    with pytest.raises(ValueError, match="must have the shape"):
        gl.ops.max_pool_forward(x[:1], (2,), lengths=[3, 7])
