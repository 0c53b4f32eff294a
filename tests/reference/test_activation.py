"""The curves of GELU: the fast one against the exact one."""

import math

import numpy as np
import pytest

from gpu_layers.reference.activation import ACTIVATIONS

GELU = ACTIVATIONS["gelu"]


@pytest.fixture(scope="module")
def values():
    rng = np.random.default_rng(0)
    # Everywhere, beside the nodes of the table and between them, and where the distribution leaves float64.
    nodes = np.arange(-39 * 256, 9 * 256) / 256
    return np.concatenate([np.linspace(-39, 9, 20001), rng.standard_normal(5000), nodes, nodes + 1 / 512])


def test_the_distribution_of_float64_is_exact(values):
    small = values[np.abs(values) < 5]
    expected = [x * math.erfc(-x * math.sqrt(0.5)) / 2 for x in small]
    np.testing.assert_allclose(GELU.forward_of(small, np.dtype(np.float64)), expected, rtol=1e-14)


def test_what_is_rounded_to_float32_has_an_error_of_2_to_the_minus_40(values):
    with np.errstate(under="ignore"):
        exact, fast = (GELU.forward_of(values, np.dtype(one)) for one in (np.float64, np.float32))
        slope, fast_slope = (GELU.derivative_of(values, np.dtype(one)) for one in (np.float64, np.float32))
    # Numbers that are subnormal in float64 have no relative error.
    np.testing.assert_allclose(fast, exact, rtol=2.0**-40, atol=1e-300)
    # The slope is a sum of two that cancel at -0.75.
    np.testing.assert_allclose(fast_slope, slope, rtol=2.0**-40, atol=1e-15)
    tail = values < -1
    np.testing.assert_allclose(fast_slope[tail], slope[tail], rtol=2.0**-40, atol=1e-300)


def test_ends():
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e300, -1e300, 5e-324])
    with np.errstate(all="ignore"):
        for method in (GELU.forward_of, GELU.derivative_of):
            np.testing.assert_array_equal(method(x, np.dtype(np.float32)), method(x, np.dtype(np.float64)))


def test_many_values_in_an_array_of_any_layout():
    x = np.random.default_rng(1).standard_normal((3, 101, 97)).transpose(2, 0, 1)[:, ::-1]
    found = GELU.forward_of(x, np.dtype(np.float32))
    expected = [GELU.forward_of(np.array([one]), np.dtype(np.float32))[0] for one in x.reshape(-1)[::101]]
    np.testing.assert_array_equal(found.reshape(-1)[::101], expected)
