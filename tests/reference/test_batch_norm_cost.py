"""What the reference of batch norm takes beside its input."""

import numpy as np
import pytest

import gpu_layers as gl
from tests.inputs import memory_of


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_at_most_three_times_the_memory_of_the_input(activation, channels_last):
    shape = (8, 28, 28, 64) if channels_last else (8, 64, 28, 28)
    x, dy, residual = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    gamma, beta = np.ones((2, 64), np.float32)
    kinds = {"activation": activation, "channels_last": channels_last}
    (_, saved), forward, _ = memory_of(gl.ops.batch_norm_forward, x, gamma, beta, residual=residual, **kinds)
    # The result is once the input; an eighth of the channels at a time is twice as large in float64. (GELU takes some
    # parts of a cache beside that.)
    assert forward <= (3 if activation == "gelu" else 2) * x.nbytes
    # Two results here.
    _, backward, _ = memory_of(gl.ops.batch_norm_backward, dy, saved)
    assert backward <= 4 * x.nbytes
    _, saved = gl.ops.batch_norm_forward(x, gamma, beta, **kinds)
    _, backward, _ = memory_of(gl.ops.batch_norm_backward, dy, saved)
    assert backward <= 3 * x.nbytes


@pytest.mark.parametrize("channels", [1, 3, 7, 9, 17])
def test_channels_are_alone(channels):
    """Those that are computed together make no difference: every channel as if it were the only one of its part."""
    x = np.random.default_rng(channels).standard_normal((5, channels, 3, 7)).astype(np.float32)
    y, saved = gl.ops.batch_norm_forward(x, None, None, activation="gelu")
    dx, dgamma, dbeta = gl.ops.batch_norm_backward(x, saved)
    wide = x.astype(np.float64)
    mean, var = wide.mean(axis=(0, 2, 3)), wide.var(axis=(0, 2, 3))
    np.testing.assert_allclose(saved.mean, mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(saved.statistics[1], var, rtol=1e-6)
    for channel in range(channels):
        one = slice(channel, channel + 1)
        alone, kept = gl.ops.batch_norm_forward(x[:, one], None, None, activation="gelu")
        found = gl.ops.batch_norm_backward(x[:, one], kept)
        # Sums of one channel are paired otherwise than those of several: an ulp of the result.
        np.testing.assert_allclose(y[:, one], alone, rtol=2e-7, atol=1e-8)
        np.testing.assert_allclose(dx[:, one], found[0], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(dgamma[one], found[1], rtol=1e-6)
        np.testing.assert_allclose(dbeta[one], found[2], rtol=1e-6)
