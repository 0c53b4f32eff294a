"""Power-average pooling: values against PyTorch for x >= 0, gradients against finite differences, and the corners."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests.gradients import finite_differences
from tests.inputs import (
    DTYPES,
    UNIT_ROUNDOFF,
    assert_same_bits,
    assert_within,
    integers,
    normal,
    tie_free,
    to_channels_first,
    to_channels_last,
    unchanged,
)
from tests.torch_bridge import from_torch, to_torch

pytestmark = pytest.mark.filterwarnings("error")

POWERS = [1, 2, 3, 2.5, 0.5, np.inf]
each_power = pytest.mark.parametrize("p", POWERS, ids=str)
SHAPES = {1: (2, 3, 9), 2: (2, 3, 7, 6), 3: (1, 2, 4, 5, 6)}
TORCH = {1: torch.nn.functional.lp_pool1d, 2: torch.nn.functional.lp_pool2d, 3: torch.nn.functional.lp_pool3d}


@each_power
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("stride", [None, 1, 2])
def test_values_and_gradients_of_positive_inputs_are_torchs(p, rank, stride):
    x = np.abs(normal(SHAPES[rank])) + 0.1
    leaf = to_torch(x).requires_grad_()
    if rank == 3 and np.isinf(p):
        expected = torch.nn.functional.max_pool3d(leaf, 2, stride)  # torch's own lacks this one
    else:
        expected = TORCH[rank](leaf, float(p), 2, stride)
    y, saved = gl.ops.lp_pool_forward(x, p, (2,) * rank, stride)
    # Powers and roots err by a few units in the last place, torch's division and product of the count by two more.
    assert_within(y, from_torch(expected), 40 * 2.0**-53 * y)
    dy = normal(y.shape, seed=1)
    expected.backward(to_torch(dy))
    dx = gl.ops.lp_pool_backward(dy, saved)
    _, magnitude = y, gl.ops.lp_pool_backward(np.abs(dy), saved)
    assert_within(dx, from_torch(leaf.grad), 100 * 2.0**-53 * magnitude)


@pytest.mark.parametrize("p", [1, 2, 3, 2.5, np.inf], ids=str)
def test_gradients_are_those_of_finite_differences(p):
    x = tie_free((1, 2, 5, 4)) + 0.25  # of both signs; neither a zero nor a tie within the steps
    options = {"kernel_size": (3, 2), "stride": (1, 2), "padding": ((1, 0), (0, 1)), "dilation": (2, 1)}
    y, saved = gl.ops.lp_pool_forward(x, p, **options)
    dy = normal(y.shape)
    expected = finite_differences(lambda moved: float((gl.ops.lp_pool_forward(moved, p, **options)[0] * dy).sum()), x)
    assert_within(gl.ops.lp_pool_backward(dy, saved), expected, 1e-9)  # of losses of some hundred: 2e-13 of each


@pytest.mark.parametrize("p", [1, 2, 3, np.inf], ids=str)
def test_a_window_that_is_cut_off_is_the_norm_of_what_is_left(p):
    x = np.array([[[3.0, -4.0, 5.0]]])
    y, _ = gl.ops.lp_pool_forward(x, p, (2,), ceil_mode=True)
    expected = [np.linalg.norm([3, 4], p), 5]
    assert_within(y, np.reshape(expected, (1, 1, 2)), 1e-14)


@each_power
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_get_no_gradient(p, dtype):
    x = np.array([[[0, 0, 0, -0.0, 1, 0]]], dtype)
    y, saved = gl.ops.lp_pool_forward(x, p, (2,))
    assert_same_bits(y, np.array([[[0, 0, 1]]], dtype))
    dx = gl.ops.lp_pool_backward(np.ones_like(y), saved)
    np.testing.assert_array_equal(dx.astype(np.float64), [[[0, 0, 0, 0, 1, 0]]])


def test_the_first_of_the_largest_gets_the_gradient():
    _, saved = gl.ops.lp_pool_forward(np.array([[[-2.0, 2, 1, np.nan, 5, np.nan]]]), np.inf, (3,))
    dx = gl.ops.lp_pool_backward(np.array([[[1.0, 2.0]]]), saved)
    np.testing.assert_array_equal(dx, [[[-1, 0, 0, np.nan, 0, np.nan]]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_types_are_summed_in_float32(dtype):
    x = np.full((1, 1, 16), 200, dtype)  # 200 squared is beyond float16
    y, _ = gl.ops.lp_pool_forward(x, 2, (16,))
    assert y.item() == 800


@each_power
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_ranks_agree(p, dtype):
    x = integers((2, 3, 6, 5), dtype)
    options = {"kernel_size": (3, 2), "stride": 2, "padding": 1, "ceil_mode": True}
    y, saved = gl.ops.lp_pool_forward(x, p, **options)
    dy = normal(y.shape, dtype, seed=1)
    with unchanged(x, dy):
        dx = gl.ops.lp_pool_backward(dy, saved)
        last, saved_last = gl.ops.lp_pool_forward(to_channels_last(x), p, **options, channels_last=True)
        one, saved_one = gl.ops.lp_pool_forward(x[1], p, **options)
    assert_same_bits(to_channels_first(last), y)
    assert_same_bits(to_channels_first(gl.ops.lp_pool_backward(to_channels_last(dy), saved_last)), dx)
    assert_same_bits(one, y[1])
    assert_same_bits(gl.ops.lp_pool_backward(dy[1], saved_one), dx[1])


def test_what_is_saved_is_a_copy():
    x = normal((1, 2, 8))
    for p in (2, np.inf):
        y, saved = gl.ops.lp_pool_forward(x, p, (2,))
        dx = gl.ops.lp_pool_backward(np.ones_like(y), saved)
        changed = x.copy()
        x[...] = y[...] = 7
        assert_same_bits(gl.ops.lp_pool_backward(np.ones_like(y), saved), dx)
        x[...] = changed


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("arguments", [(2, 3), (2.0, 2, 1), (3, 2, None, True)], ids=str)
def test_layers_are_torchs(rank, arguments):
    ours, theirs = getattr(gl, f"LPPool{rank}d")(*arguments), getattr(torch.nn, f"LPPool{rank}d")(*arguments)
    assert repr(ours) == repr(theirs)
    x = np.abs(normal((2, 3, 6, 6, 6)[: rank + 2])).astype(np.float32)  # windows that all fit
    y, expected = ours(x), from_torch(theirs(to_torch(x)))
    assert_within(y, expected, 60 * UNIT_ROUNDOFF[x.dtype] * expected)
    dx = ours.backward(np.ones_like(y))
    assert dx.shape == x.shape
    assert_same_bits(ours.backward(np.ones_like(y)), dx)


@pytest.mark.parametrize(
    ("p", "error"), [(0, ValueError), (-1, ValueError), (np.nan, ValueError), ("2", TypeError), (None, TypeError)]
)
def test_bad_powers(p, error):
    with pytest.raises(error, match=r"^norm_type must be"):
        gl.ops.lp_pool_forward(np.ones((1, 1, 4)), p, (2,))
    with pytest.raises(error, match=r"^norm_type must be"):
        gl.LPPool1d(p, 2)
