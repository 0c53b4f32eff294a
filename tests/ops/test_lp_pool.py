"""Power-average pooling: values against PyTorch for x >= 0, gradients against finite differences, and the corners."""

from decimal import Decimal, localcontext

import ml_dtypes
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

POWERS = [1, 2, 3, 2.5, 0.5, np.inf]
both_floors = pytest.mark.parametrize("backend", ["reference", "emulated"])
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


@both_floors
@pytest.mark.parametrize("p", [1, 2, 2.5, 3, np.inf], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_sum_of_a_window_that_is_cut_off_is_scaled_up_as_torchs(backend, p, channels_last):
    # Rows 0-2, 3-5, 6; columns 0-1, ..., 8: corners are cut off along both axes.
    x = np.abs(normal((2, 3, 7, 9))) + 0.1
    leaf = to_torch(x).requires_grad_()
    expected = torch.nn.functional.lp_pool2d(leaf, float(p), (3, 2), (3, 2), True)
    dy = np.abs(normal(expected.shape, seed=1))
    expected.backward(to_torch(dy))
    move = to_channels_last if channels_last else np.copy
    with gl.use_backend(backend):
        y, saved = gl.ops.lp_pool_forward(move(x), p, (3, 2), ceil_mode=True, channels_last=channels_last)
        dx = gl.ops.lp_pool_backward(move(dy), saved)
    # As above: torch takes the mean, and multiplies by the count.
    expected, gradient = move(from_torch(expected)), move(from_torch(leaf.grad))
    assert_within(y, expected, 40 * 2.0**-53 * expected)
    assert_within(dx, gradient, 100 * 2.0**-53 * gradient)


@both_floors
@pytest.mark.parametrize("p", [1, 2, 3, np.inf], ids=str)
def test_what_is_left_of_a_window_stands_for_all_of_it(backend, p):
    with gl.use_backend(backend):
        y, saved = gl.ops.lp_pool_forward(np.array([[[3.0, -4.0, 5.0]]]), p, (2,), ceil_mode=True)
        dx = gl.ops.lp_pool_backward(np.ones_like(y), saved)
    share = 2 ** (1 / p)
    whole = np.linalg.norm([3, 4], p)
    assert_within(y, np.reshape([whole, 5 * share], (1, 1, 2)), 1e-14)
    front = [0, -1] if np.isinf(p) else [(3 / whole) ** (p - 1), -((4 / whole) ** (p - 1))]
    assert_within(dx, np.reshape([*front, share], (1, 1, 3)), 1e-14)


@both_floors
def test_padding_is_zeros_and_not_cut_off(backend):
    # Taps from -1 on: outside, 3, 4 | 4, 5, padding | padding, outside, outside: nothing but zeros | none more.
    x, options = np.array([[[3.0, 4.0, 5.0, 12.0]]]), {"padding": ((1, 2),), "ceil_mode": True}
    with gl.use_backend(backend):
        y, saved = gl.ops.lp_pool_forward(x, 2, (3,), 2, **options)
        cut, _ = gl.ops.lp_pool_forward(x, 2, (4,), 3, padding=((1, 0),), ceil_mode=True)
        dx = gl.ops.lp_pool_backward(np.ones_like(y), saved)
    np.testing.assert_array_equal(y, [[[5, np.sqrt(16 + 25 + 144), 12]]])
    # Taps 2, 3 of 2 .. 5 are inside: the sum 25 + 144 counts twice.
    assert_within(cut, np.array([[[np.sqrt(50.0), 13 * np.sqrt(2)]]]), 1e-14)
    middle = np.sqrt(16 + 25 + 144)
    assert_within(dx, np.array([[[3 / 5, 4 / 5 + 4 / middle, 5 / middle, 12 / middle + 1]]]), 1e-15)


# Of a window: sizes apart, alike, and one that hardly counts.
_WINDOWS = [[0.75, -0.71875, 0.5], [-1.25, 1.25, 1.2421875], [0.015625, 1.9921875, -0.625]]


def _exactly(x, dy, p):
    """Output and gradient of windows side by side, to 40 digits."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 40, 10**6, -(10**6)
        exponent = Decimal(p)
        y, dx = [], []
        for values, gradient in zip(x, dy, strict=True):
            sizes = [abs(Decimal(float(value))) for value in values]
            norm = sum(size**exponent for size in sizes) ** (1 / exponent)
            y.append(norm)
            terms = [Decimal(float(gradient)) * (size / norm) ** (exponent - 1) for size in sizes]
            dx.append([term.copy_sign(Decimal(float(value))) for term, value in zip(terms, values, strict=True)])
        return y, dx


def _half_units(actual, expected, dtype):
    """Largest relative error, in those of one rounding; below the normal numbers, in roundings of the smallest."""
    smallest_normal = Decimal(float(ml_dtypes.finfo(dtype).smallest_normal))
    with localcontext() as context:
        context.prec = 40
        unit = Decimal(UNIT_ROUNDOFF[dtype])
        pairs = zip(actual.ravel(), expected, strict=True)
        return max(abs(Decimal(float(a)) - e) / (unit * max(abs(e), smallest_normal)) for a, e in pairs)


@both_floors
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1, 1.25, 1.5, 2, 2.5, 3, 4, 7, 20, 32, 50.5, 99, 100], ids=str)
def test_within_four_half_units_in_the_last_place(backend, dtype, p):
    x = np.concatenate([_WINDOWS, np.abs(normal((40, 3))) + 0.01, normal((20, 3)) * 0.05 + 1]).astype(dtype)
    dy = (np.abs(normal((len(x),), seed=1)) + 0.1).astype(dtype)
    with gl.use_backend(backend):
        y, saved = gl.ops.lp_pool_forward(x.reshape(1, 1, -1), p, (3,))
        dx = gl.ops.lp_pool_backward(dy.reshape(1, 1, -1), saved)
    exact_y, exact_dx = _exactly(x, dy, p)
    # Half types are computed in float32, which leaves 13 bits for what p products round, and float32 in float64: one
    # rounding counts, and of a gradient that of the slope which is kept. A float64 has besides what the processor's
    # pow is off by, half a unit: of it the p-th part is left in y, and in a gradient all of it, twice.
    most_y = 1 + 1 / p if dtype == np.float64 else 1.001
    most_dx = {np.dtype(np.float32): 2.001, np.dtype(np.float64): 4}.get(dtype, 1 + p * 2.0**-11)
    assert _half_units(y, exact_y, dtype) <= most_y
    assert _half_units(dx, [term for terms in exact_dx for term in terms], dtype) <= most_dx


@both_floors
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 20, 100, 2000], ids=str)
def test_a_power_of_two_in_x_is_one_in_y_and_none_in_the_gradient(backend, dtype, p):
    """From one end of the range to the other: nothing overflows, vanishes or is rounded otherwise."""
    info = ml_dtypes.finfo(dtype)
    x = (normal((2, 3, 11)) * 0.25).clip(-1, 1).astype(dtype)
    x[np.abs(x) < 1 / 64] = 1 / 64
    # Of 11 values, none beyond 1, no norm is beyond 16; gradients too stay as they were.
    for exponent in (int(info.maxexp) - 5, int(info.minexp) + 8, 40 if dtype != np.float16 else 5):
        factor = dtype.type(2.0**exponent)
        with gl.use_backend(backend):
            y, saved = gl.ops.lp_pool_forward(x, p, (3,), 2, 1, ceil_mode=True)
            scaled, saved_scaled = gl.ops.lp_pool_forward(x * factor, p, (3,), 2, 1, ceil_mode=True)
            dy = normal(y.shape, dtype, seed=1)
            dx, dx_scaled = (gl.ops.lp_pool_backward(dy, needed) for needed in (saved, saved_scaled))
        assert np.isfinite(scaled).all()
        assert_same_bits(scaled, y * factor)
        assert_same_bits(dx_scaled, dx)


@both_floors
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1.5, 2, 3, 100, 2000, np.inf], ids=str)
def test_the_smallest_numbers_have_norms_and_gradients(backend, dtype, p):
    tiny = ml_dtypes.finfo(dtype).smallest_subnormal
    with gl.use_backend(backend):
        y, saved = gl.ops.lp_pool_forward(np.array([[[0, -tiny, 0, tiny, tiny, tiny]]], dtype), p, (3,))
        dx = gl.ops.lp_pool_backward(np.ones_like(y), saved)
    # The norm of three equal ones, rounded to whole ones.
    np.testing.assert_array_equal(y.astype(np.float64) / float(tiny), [[[1, np.round(3 ** (1 / p))]]])
    three = [1, 0, 0] if np.isinf(p) else [3 ** (1 / p - 1)] * 3
    expected = np.array([[[0, -1, 0, *three]]])
    assert_within(dx, expected, 4 * UNIT_ROUNDOFF[dtype] * np.abs(expected))


@both_floors
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1, 2, 2.5, 20], ids=str)
def test_infinity_and_nan_stay_in_their_windows(backend, dtype, p):
    x = np.array([[[1, -np.inf, 0, 1, np.nan, 2, 3, 0, -4]]], dtype)
    with gl.use_backend(backend):
        y, saved = gl.ops.lp_pool_forward(x, p, (3,))
        dx = gl.ops.lp_pool_backward(np.ones_like(y), saved).ravel()
    np.testing.assert_array_equal(y.ravel()[:2].astype(np.float64), [np.inf, np.nan])
    assert np.isfinite(y.ravel()[2])
    first = [1, -1, 0] if p == 1 else [0, np.nan, 0]
    np.testing.assert_array_equal(dx[:3].astype(np.float64), first)
    np.testing.assert_array_equal(np.isnan(dx[3:6]), [p != 1, True, p != 1])
    np.testing.assert_array_equal(np.sign(dx[6:].astype(np.float64)), [1, 0, -1])


@both_floors
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_many_taps_keep_their_bits(backend, dtype):
    # float32 sums of 0.1, one by one, are off by 1e-3 here; to the nearest multiple of the dtype, n * 0.1 is right.
    x = np.full((1, 1, 2**17), 0.1, dtype)
    if dtype == np.float16:
        x *= dtype.type(0.5)
    with gl.use_backend(backend):
        for p in (1, 2):
            y, _ = gl.ops.lp_pool_forward(x, p, (2**17,))
            exact = float(x[0, 0, 0]) * 2.0 ** (17 / p)
            assert_within(y.astype(np.float64), np.reshape(exact, (1, 1, 1)), 2 * UNIT_ROUNDOFF[dtype] * exact)


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


@both_floors
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_saved_is_x_itself_and_what_x_does_not_say(backend, dtype):
    x = normal((1, 2, 8), dtype)
    for p, kept in ((1, 0), (2, 0), (3, 0), (np.inf, 1)):
        with gl.use_backend(backend):
            y, saved = gl.ops.lp_pool_forward(x, p, (2,))
            dx = gl.ops.lp_pool_backward(np.ones_like(y), saved)
            assert (0 if saved.argmax is None else saved.argmax.nbytes) == y.size * kept
            assert np.shares_memory(saved.x, x)
            y[...] = 7
            assert_same_bits(gl.ops.lp_pool_backward(np.ones_like(y), saved), dx)


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
