"""The polynomials that stand for curved activations of half types, at every number of the type."""

import math

import ml_dtypes
import numpy as np
import pytest

import gpu_layers as gl

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def _sigmoid_slope(x):
    e = np.exp(-np.abs(x))
    return e / (1 + e) ** 2


def _distribution(x):
    return _erfc(-x * math.sqrt(0.5)) / 2


FORWARD = {
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "gelu": lambda x: x * _distribution(x),
    "silu": lambda x: x * _sigmoid(x),
}
DERIVATIVE = {
    "sigmoid": _sigmoid_slope,
    "tanh": lambda x: 4 * _sigmoid_slope(2 * x),
    "gelu": lambda x: _distribution(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    # sigmoid (1 + x sigmoid(-x)): of the two factors the second alone is 0 somewhere.
    "silu": lambda x: _sigmoid(x) * (1 + x * _sigmoid(-x)),
}


def units(values, dtype):
    """The distance from each value to the next number of a dtype."""
    info = ml_dtypes.finfo(dtype)
    exponents = np.frexp(values)[1] - 1
    return np.maximum(np.ldexp(float(info.eps), exponents), float(info.smallest_subnormal))


def results(activation, x):
    """The activation, and its derivative, without dropout."""
    with gl.use_backend("emulated"):
        y, saved = gl.ops.activation_dropout_forward(x, activation, 0.0, 1, 2)
        return y, gl.ops.activation_dropout_backward(np.ones_like(x), saved)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)], ids=str)
@pytest.mark.parametrize("activation", FORWARD)
def test_error_is_below_a_tenth_of_a_unit_before_it_is_rounded(activation, dtype):
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        for function, actual in zip((FORWARD, DERIVATIVE), results(activation, x), strict=True):
            exact = function[activation](wide)
            finite = np.isfinite(wide)
            # A tenth of a unit, and half a unit for the rounding.
            error = np.abs(actual.astype(np.float64) - exact)[finite] / units(exact[finite], dtype)
            assert error.max() <= 0.6, wide[finite][error.argmax()]


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)], ids=str)
@pytest.mark.parametrize("activation", FORWARD)
def test_special_values_are_those_of_the_formula(activation, dtype):
    x = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0]).astype(dtype)
    y, dx = results(activation, x)
    expected, saved = gl.ops.activation_dropout_forward(x, activation, 0.0, 1, 2)
    slope = gl.ops.activation_dropout_backward(np.ones_like(x), saved)
    for actual, right in ((y, expected), (dx, slope)):
        np.testing.assert_array_equal(actual.astype(np.float64), right.astype(np.float64))
        numbers = ~np.isnan(right.astype(np.float64))
        np.testing.assert_array_equal(np.signbit(actual)[numbers], np.signbit(right)[numbers])
