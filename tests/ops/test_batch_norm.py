"""Batch norm against PyTorch in float64, with bounds that follow from where the reference rounds."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests.inputs import (
    DTYPES,
    UNIT_ROUNDOFF,
    accumulation_dtype,
    assert_same_bits,
    assert_same_values,
    assert_within,
    each_dtype,
    integers,
    normal,
    to_channels_first,
    to_channels_last,
    unchanged,
)
from tests.torch_bridge import from_torch, to_torch

each_affine = pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "neither"])
SHAPES = [(5, 3), (2, 1), (4, 3, 7), (1, 2, 3), (3, 5, 4, 7), (1, 2, 1, 2), (2, 3, 2, 3, 5), (0, 3, 4), (67, 2, 31)]
EPS = 1e-5


def parameters(channels, dtype, affine):
    gamma = normal((channels,), accumulation_dtype(dtype), seed=10) if "weight" in affine else None
    beta = normal((channels,), accumulation_dtype(dtype), seed=11) if "bias" in affine else None
    return gamma, beta


def along_channels(values, x):
    return np.asarray(values, np.float64).reshape([-1 if axis == 1 else 1 for axis in range(x.ndim)])


def torch_batch_norm(x, dy, gamma, beta, statistics=None, eps=EPS):
    """Output and gradients in float64, of training or, with (mean, var) given, of inference."""
    leaf, weight, bias = (
        None if values is None else to_torch(values.astype(np.float64)).requires_grad_() for values in (x, gamma, beta)
    )
    mean, var = (None, None) if statistics is None else (to_torch(values.astype(np.float64)) for values in statistics)
    y = torch.nn.functional.batch_norm(leaf, mean, var, weight, bias, statistics is None, 0.0, eps)
    y.backward(to_torch(dy.astype(np.float64)))
    return from_torch(y), [None if part is None else from_torch(part.grad) for part in (leaf, weight, bias)]


class Bounds:
    """How far the reference may be from exact arithmetic on the same inputs.

    With u the unit roundoff of the accumulation dtype and m values a channel: the mean is rounded by u |mean| (and is
    off by at most 2 m 2**-53 of the largest deviation from adding up in float64), inv_std by u. So
    ``xhat = (x - mean) * inv_std`` is off by ``e = inv_std * u * |mean| + 3 u |xhat|`` and the like; u_out is the final
    rounding to the dtype. 1.01 covers the terms in u squared.
    """

    def __init__(self, x, gamma, beta, mean, var, dtype):
        self.axes = tuple(axis for axis in range(x.ndim) if axis != 1)
        u = self.u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
        self.u_out = UNIT_ROUNDOFF[dtype]
        self.m = max(x.size // x.shape[1], 1)
        exact = x.astype(np.float64)
        inv_std = along_channels(1 / np.sqrt(np.asarray(var, np.float64) + EPS), x)
        self.scale = np.abs((1 if gamma is None else along_channels(gamma, x)) * inv_std)
        self.gamma = self.scale / inv_std
        self.beta = 0 if beta is None else np.abs(along_channels(beta, x))
        self.xhat = np.abs((exact - along_channels(mean, x)) * inv_std)
        largest = self.xhat.max(axis=self.axes, keepdims=True, initial=0)
        sums = 2 * self.m * 2.0**-53 * (1 + largest + largest**2)
        self.xhat_error = inv_std * u * np.abs(along_channels(mean, x)) + 3 * u * self.xhat + sums

    def y(self, y):
        # The product and the sum each round once more.
        return 1.01 * (self.gamma * (self.xhat_error + 2 * self.u * self.xhat) + self.u * self.beta) + (
            self.u + self.u_out
        ) * np.abs(y)

    def sums(self, dy):
        """Bounds of dgamma and dbeta."""
        dy = np.abs(dy.astype(np.float64))
        adding_up = 2 * self.m * 2.0**-53
        dgamma = (dy * (self.xhat_error + adding_up * self.xhat)).sum(axis=self.axes)
        dgamma += self.u * (dy * self.xhat).sum(axis=self.axes)
        return 1.01 * dgamma, 1.01 * (adding_up + self.u) * dy.sum(axis=self.axes)

    def dx(self, dy, dx):
        """Of ``scale * (dy - mean(dy) - xhat * mean(dy * xhat))``; scale is rounded twice."""
        dy = np.abs(dy.astype(np.float64))
        mean_dy = dy.mean(axis=self.axes, keepdims=True)
        mean_dy_xhat = (dy * self.xhat).mean(axis=self.axes, keepdims=True)
        error_of_mean = (dy * self.xhat_error).mean(axis=self.axes, keepdims=True)
        terms = dy + mean_dy + self.xhat * mean_dy_xhat
        adding_up = 2 * self.m * 2.0**-53
        error = self.xhat_error * mean_dy_xhat + self.xhat * error_of_mean + adding_up * terms
        # Torch's own float64 sums and products are rounded too: the last term.
        return 1.01 * self.scale * (error + 8 * 2.0**-53 * terms) + (3 * self.u + self.u_out) * np.abs(dx)


@each_dtype
@each_affine
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_is_torchs(dtype, affine, shape):
    x = (normal(shape) * 3 + 5).astype(dtype)
    dy = normal(shape, dtype, seed=1)
    gamma, beta = parameters(shape[1], dtype, affine)
    with unchanged(*(array for array in (x, dy, gamma, beta) if array is not None)):
        y, saved = gl.ops.batch_norm_forward(x, gamma, beta)
        dx, dgamma, dbeta = gl.ops.batch_norm_backward(dy, saved)
    assert (y.dtype, y.shape, dx.dtype, dx.shape) == (dtype, shape, dtype, shape)
    assert y.flags.c_contiguous
    assert dx.flags.c_contiguous
    expected_y, (expected_dx, expected_dgamma, expected_dbeta) = torch_batch_norm(x, dy, gamma, beta)
    if x.size == 0:
        for zeros in (dgamma, dbeta):
            assert_same_bits(zeros, np.zeros(shape[1], accumulation_dtype(dtype)))
        return
    bounds = Bounds(x, gamma, beta, saved.mean, saved.var, dtype)
    assert_within(y, expected_y, bounds.y(expected_y))
    assert_within(dx, expected_dx, bounds.dx(dy, expected_dx))
    if gamma is None:
        xhat, _ = torch_batch_norm(x, dy, None, None)
        expected_dgamma = (dy.astype(np.float64) * xhat).sum(axis=bounds.axes)
    if beta is None:
        expected_dbeta = dy.astype(np.float64).sum(axis=bounds.axes)
    for actual, expected, bound in zip(
        (dgamma, dbeta), (expected_dgamma, expected_dbeta), bounds.sums(dy), strict=True
    ):
        assert actual.dtype == accumulation_dtype(dtype)
        assert_within(actual, expected, bound)


@each_dtype
@each_affine
@pytest.mark.parametrize("shape", [*SHAPES, (1, 3), (1, 3, 1, 1)], ids=str)
def test_inference_is_torchs(dtype, affine, shape):
    x = (normal(shape) * 3 + 5).astype(dtype)
    dy = normal(shape, dtype, seed=1)
    gamma, beta = parameters(shape[1], dtype, affine)
    mean = normal((shape[1],), accumulation_dtype(dtype), seed=2)
    var = np.exp(normal((shape[1],), seed=3)).astype(accumulation_dtype(dtype))
    with unchanged(*(array for array in (x, dy, mean, var, gamma, beta) if array is not None)):
        y, saved = gl.ops.batch_norm_inference(x, mean, var, gamma, beta)
        dx, dgamma, dbeta = gl.ops.batch_norm_inference_backward(dy, saved)
    assert (y.dtype, y.shape, dx.dtype, dx.shape) == (dtype, shape, dtype, shape)
    expected_y, (expected_dx, expected_dgamma, expected_dbeta) = torch_batch_norm(x, dy, gamma, beta, (mean, var))
    bounds = Bounds(x, gamma, beta, mean, var, dtype)
    assert_within(y, expected_y, bounds.y(expected_y))
    # The scale and the product with it: three roundings.
    assert_within(dx, expected_dx, 1.01 * (3 * bounds.u + bounds.u_out + 4 * 2.0**-53) * np.abs(expected_dx))
    for actual, expected, bound in zip(
        (dgamma, dbeta), (expected_dgamma, expected_dbeta), bounds.sums(dy), strict=True
    ):
        assert actual.dtype == accumulation_dtype(dtype)
        if expected is not None:
            assert_within(actual, expected, bound)


@each_dtype
def test_saved_statistics(dtype):
    x = (normal((6, 4, 5)) * 3 + 5).astype(dtype)
    _, saved = gl.ops.batch_norm_forward(x, None, None, eps=0.5)
    exact = np.moveaxis(x.astype(np.float64), 1, 0).reshape(4, -1)
    # Sums in float64 are off by 30 * 2**-53 at most, which for float64 is all there is; then one rounding.
    roundings = UNIT_ROUNDOFF[accumulation_dtype(dtype)] + 100 * 2.0**-53
    for actual, expected in (
        (saved.mean, exact.mean(axis=1)),
        (saved.var, exact.var(axis=1)),
        (saved.inv_std, 1 / np.sqrt(exact.var(axis=1) + 0.5)),
    ):
        assert actual.dtype == accumulation_dtype(dtype)
        assert_within(actual, expected, 2 * roundings * np.abs(expected))
    assert saved.count == 30


@each_dtype
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 7), (3, 5, 4, 7), (2, 3, 2, 3, 5), (0, 3, 4)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_is_the_same_map(dtype, shape, training):
    # Integers below 2**3 with an integer mean: every sum and deviation is exact, so the two orders agree to the bit.
    x, dy = integers(shape, dtype, -7, 7), integers(shape, dtype, seed=1)
    gamma, beta = parameters(shape[1], dtype, "weight and bias")
    mean, var = np.ones_like(gamma), np.full_like(gamma, 4)

    def run(x, dy, channels_last):
        if training:
            y, saved = gl.ops.batch_norm_forward(x, gamma, beta, channels_last=channels_last)
            return y, *gl.ops.batch_norm_backward(dy, saved)
        y, saved = gl.ops.batch_norm_inference(x, mean, var, gamma, beta, channels_last=channels_last)
        return y, *gl.ops.batch_norm_inference_backward(dy, saved)

    first = run(x, dy, False)
    last = run(to_channels_last(x), to_channels_last(dy), True)
    # Means are quotients, and not exact: two more roundings of float64 sums of at most 84 terms.
    slack = UNIT_ROUNDOFF[dtype] * 2 + UNIT_ROUNDOFF[accumulation_dtype(dtype)] * 16 + 400 * 2.0**-53
    for one, other in zip((to_channels_first(last[0]), to_channels_first(last[1]), *last[2:]), first, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert_within(one, other, slack * np.abs(first[1 if one.ndim > 1 else 2].astype(np.float64)).max(initial=8))


# Hard numbers.


@pytest.mark.parametrize("shape", [(8192, 2), (64, 3, 17, 19)], ids=str)
def test_a_huge_mean_costs_the_variance_nothing(shape):
    x = (1e6 + normal(shape)).astype(np.float32)
    _, saved = gl.ops.batch_norm_forward(x, None, None)
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    exact = x.astype(np.longdouble).var(axis=axes)
    relative = np.abs(saved.var - exact) / exact
    # One rounding of a float64 computation; the promise to users, 1e-4, is looser.
    assert (relative <= 1.01 * 2.0**-24).all()
    assert (np.abs(saved.mean - x.astype(np.longdouble).mean(axis=axes)) <= 2.0**-24 * 1.01e6).all()


def test_a_huge_mean_in_float64():
    x = 1e12 + integers((4096, 2)) + normal((4096, 2))
    _, saved = gl.ops.batch_norm_forward(x, None, None)
    exact = x.astype(np.longdouble).var(axis=0)
    # Deviations from the channel's first value are exact to their last bit or two: the mean's error is squared.
    assert (np.abs(saved.var - exact) / exact <= 2 * 4096 * 2.0**-53).all()


@each_dtype
@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -3e4, 1e-6])
@pytest.mark.parametrize("shape", [(7, 2), (3, 2, 5, 11)], ids=str)
def test_a_constant_channel_is_exactly_beta(dtype, constant, shape):
    x = np.full(shape, constant, dtype)
    gamma, beta = parameters(2, dtype, "weight and bias")
    y, saved = gl.ops.batch_norm_forward(x, gamma, beta)
    assert_same_bits(y, np.broadcast_to(along_channels(beta, x), shape).astype(dtype))
    assert_same_bits(saved.var, np.zeros(2, accumulation_dtype(dtype)))
    assert_same_values(saved.mean, x.ravel()[:2].astype(accumulation_dtype(dtype)))


@each_dtype
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 17])
def test_nan_and_infinity_spoil_their_own_channel_only(dtype, special, position):
    clean = normal((6, 3, 5), dtype)
    dy = normal((6, 3, 5), dtype, seed=1)
    gamma, beta = parameters(3, dtype, "weight and bias")
    x = clean.copy()
    x[position // 5, 1, position % 5] = special
    results = []
    for values in (clean, x):
        y, saved = gl.ops.batch_norm_forward(values, gamma, beta)
        results.append((y, *gl.ops.batch_norm_backward(dy, saved)))
    expected_y, (expected_dx, expected_dgamma, _) = torch_batch_norm(x, dy, gamma, beta)
    for spoilt, fine, expected in zip(results[1][:2], results[0][:2], (expected_y, expected_dx), strict=True):
        np.testing.assert_array_equal(np.isnan(spoilt.astype(np.float64)), np.isnan(expected))
        assert np.isnan(expected[:, 1]).all()
        for channel in (0, 2):
            assert_same_bits(spoilt[:, channel], fine[:, channel])
    np.testing.assert_array_equal(np.isnan(results[1][2]), np.isnan(expected_dgamma))
    assert_same_bits(results[1][3], results[0][3])  # dbeta is the sum of dy alone


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != np.float16], ids=str)
def test_values_of_any_size_are_normalised(dtype, channels_last, backend):
    """A power of two in x is one in mean and 1 / inv_std, to the last bit, while eps does not count."""
    x = normal((3, 5, 41, 43)) + np.arange(5).reshape(1, 5, 1, 1) * 100
    x[:, 3] = np.where(normal((3, 41, 43)) > 0, 1, -1)  # the spread is all there is
    move = to_channels_last if channels_last else np.copy
    with gl.use_backend(backend):
        y, saved = gl.ops.batch_norm_forward(move(x * 2.0**20).astype(dtype), None, None, channels_last=channels_last)
        # 2**57 is 1e17: sums of squares are beyond float32; 2**64, squares are; 2**116, nearly the values.
        for exponent in (57, 64, 116) if dtype != np.float64 else (500, 512, 1010):
            factor = accumulation_dtype(dtype).type(2.0 ** (exponent - 20))
            large = move(x * 2.0**exponent).astype(dtype)
            scaled, saved_large = gl.ops.batch_norm_forward(large, None, None, channels_last=channels_last)
            assert_same_bits(scaled, y)
            assert_same_bits(saved_large.mean, saved.mean * factor)
            assert_same_bits(saved_large.inv_std, saved.inv_std / factor)
            with np.errstate(over="ignore"):
                # Of what is added again because its squares left the range, the order may be another one: an ulp.
                exact = saved.var * factor * factor
                ulp = np.finfo(exact.dtype).eps if dtype == np.float64 else 0
                np.testing.assert_allclose(saved_large.var, exact, rtol=ulp)


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("shape", [(40000, 3), (2, 3, 100, 200)])
def test_forty_thousand_values_of_1e17(shape, backend):
    x = (normal(shape) * 10**16.5 + 1e17).astype(np.float32)
    exact = x.astype(np.float64).var(axis=tuple(axis for axis in range(len(shape)) if axis != 1))
    with gl.use_backend(backend):
        layer = (gl.BatchNorm1d if len(shape) == 2 else gl.BatchNorm2d)(3, momentum=1.0)
        y = layer(x)
    np.testing.assert_allclose(exact, 1e33, rtol=0.05)
    # A thread adds up to 157 squares relative to a value up to five deviations away: 26 variances each, in float32.
    assert_within(layer.state_dict()["running_var"], exact * 40000 / 39999, 157 * 26 * 2.0**-24 * exact)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_known_of_a_channel_with_an_infinity(dtype, position, backend):
    for channels in (3, 8):  # by themselves, and in a vector with others
        x = normal((2, channels), dtype)
        with gl.use_backend(backend):
            expected, others = gl.ops.batch_norm_forward(x, None, None)
            x[position, 1] = np.inf
            y, saved = gl.ops.batch_norm_forward(x, None, None)
        spoilt = np.arange(channels) == 1
        pairs = ((saved.mean, others.mean), (saved.var, others.var), (saved.inv_std, others.inv_std), (y, expected))
        for values, undisturbed in pairs:
            assert np.isnan(values[..., spoilt].astype(np.float64)).all()
            assert_same_bits(values[..., ~spoilt], undisturbed[..., ~spoilt])


@each_dtype
def test_overflow_becomes_infinity_without_a_warning(dtype):
    x = normal((8, 2), dtype)
    largest = np.finfo(accumulation_dtype(dtype)).max
    y, _ = gl.ops.batch_norm_forward(x, np.full(2, largest), None)
    sides = np.sign(x.astype(np.float64) - x.astype(np.float64).mean(axis=0))
    big = np.abs(y.astype(np.float64)) == np.inf
    assert big.any()
    np.testing.assert_array_equal(np.sign(y.astype(np.float64))[big], sides[big])


def test_eps_counts():
    x = np.array([[-1.0], [1.0]])
    y, _ = gl.ops.batch_norm_forward(x, None, None, eps=3.0)
    np.testing.assert_array_equal(y, x / 2)
    y, _ = gl.ops.batch_norm_inference(x, np.zeros(1), np.ones(1), None, None, eps=3)
    np.testing.assert_array_equal(y, x / 2)


def test_no_channels_at_all():
    y, saved = gl.ops.batch_norm_forward(np.zeros((4, 0, 3)), np.zeros(0), np.zeros(0))
    assert y.shape == (4, 0, 3)
    assert [part.shape for part in gl.ops.batch_norm_backward(y, saved)] == [(4, 0, 3), (0,), (0,)]


# Bad input.

X = normal((4, 3, 5), np.float32)
ONES = np.ones(3, np.float32)
FORWARDS = {
    "training": lambda x, gamma, beta, **options: gl.ops.batch_norm_forward(x, gamma, beta, **options),
    "inference": lambda x, gamma, beta, **options: gl.ops.batch_norm_inference(x, ONES, ONES, gamma, beta, **options),
}
each_forward = pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)


@each_forward
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gamma": np.ones(4, np.float32)}, ValueError, "^gamma should contain 3 elements not 4$"),
        ({"beta": np.ones(2, np.float32)}, ValueError, "^beta should contain 3 elements not 2$"),
        ({"gamma": np.ones((3, 1), np.float32)}, ValueError, r"^gamma should have one axis, got shape \[3, 1\]$"),
        ({"gamma": np.ones(3)}, TypeError, "^gamma must be float32 for float32 input, got float64$"),
        ({"beta": np.ones(3, np.float16)}, TypeError, "^beta must be float32 for float32 input, got float16$"),
        ({"gamma": [1.0] * 3}, TypeError, "expected a numpy.ndarray or cupy.ndarray, got list"),
        ({"x": np.ones(3, np.float32)}, ValueError, r"expected at least 2D input \(got 1D input\)"),
        ({"x": np.array(1, np.float32)}, ValueError, r"expected at least 2D input \(got 0D input\)"),
        ({"eps": 0}, ValueError, "^batch_norm eps must be positive, but got 0$"),
        ({"eps": -1e-5}, ValueError, "^batch_norm eps must be positive, but got -1e-05$"),
        ({"eps": float("nan")}, ValueError, "^batch_norm eps must be positive, but got nan$"),
        ({"eps": float("inf")}, ValueError, "^batch_norm eps must be positive, but got inf$"),
        ({"eps": "1"}, TypeError, "eps must be a number, got str"),
        ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
        ({"channels_last": True}, ValueError, "gamma should contain 5 elements not 3"),
    ],
)
def test_bad_arguments(forward, change, error, message):
    with pytest.raises(error, match=message):
        forward(**({"x": X, "gamma": ONES, "beta": ONES} | change))


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)])
def test_one_value_a_channel_has_no_variance(shape):
    for channels_last in (False, True):
        x = np.ones(shape if not channels_last else (1, *shape[2:], 3), np.float32)
        with pytest.raises(
            ValueError, match=r"^Expected more than 1 value per channel when training, got input size \[1, "
        ):
            gl.ops.batch_norm_forward(x, ONES, ONES, channels_last=channels_last)


@pytest.mark.parametrize(
    ("mean", "var", "error", "message"),
    [
        (np.ones(4, np.float32), ONES, ValueError, "mean should contain 3 elements not 4"),
        (ONES, np.ones(2, np.float32), ValueError, "var should contain 3 elements not 2"),
        (np.ones(3), ONES, TypeError, "mean must be float32 for float32 input, got float64"),
        (ONES, [1.0] * 3, TypeError, "expected a numpy.ndarray or cupy.ndarray, got list"),
        (None, ONES, TypeError, "expected a numpy.ndarray or cupy.ndarray, got NoneType"),
        (ONES, None, TypeError, "expected a numpy.ndarray or cupy.ndarray, got NoneType"),
    ],
)
def test_bad_statistics(mean, var, error, message):
    with pytest.raises(error, match=message):
        gl.ops.batch_norm_inference(X, mean, var, ONES, ONES)
