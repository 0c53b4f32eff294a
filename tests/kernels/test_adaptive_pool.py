"""Adaptive pooling: the bits of the general kernels, at every edge."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.runtime.limits import force_limits
from tests.inputs import DTYPES, assert_same_bits, emulated, normal, to_channels_last

# Spatial sizes of the input and of the output: uneven windows, one and three axes, windows of more than 256 taps, more
# outputs than inputs, a single row of vectors, windows narrower than a vector; rows of halves, quarters and single
# values of vectors.
SHAPES = [
    ((9, 16), (5, 5)),
    ((31,), (4,)),
    ((32,), (5,)),
    ((5, 4, 24), (3, 3, 7)),
    ((37, 40), (2, 3)),
    ((3, 8), (7, 11)),
    ((7, 48), (7, 31)),
    ((1, 8), (1, 3)),
    ((5, 28), (2, 5)),
    ((6, 14), (3, 4)),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_general_kernel(dtype, inputs, outputs, channels_last):
    x = normal((2, 8, *inputs), dtype)
    x[0, 1, ..., ::3], x[1, 2, ..., 1] = 0.5, np.nan
    # A plane of nothing but -inf; and several NaN: the last counts.
    x[1, 3], x[0, 5, ..., -1:] = -np.inf, np.nan
    x = to_channels_last(x) if channels_last else x
    launched = []
    for name in ("max", "avg"):
        forward = getattr(gl.ops, f"adaptive_{name}_pool_forward")
        y, saved = forward(x, outputs, channels_last=channels_last)
        with gl.use_backend("emulated", check=True):
            own_y, own_saved = forward(x, outputs, channels_last=channels_last)
        if name == "max":
            assert_same_bits(own_y, y)
            assert_same_bits(own_saved.argmax, saved.argmax)
        dy = np.repeat(normal(y.shape, dtype, seed=5), 2, axis=0)[::2]
        dy[..., 0], dy[0, 0, ..., -1] = -0.0, np.inf
        with gl.use_backend("emulated"), force_limits(index64=True):
            expected = getattr(gl.ops, f"{name}_pool_backward")(dy, saved)
        if name == "max":
            assert_same_bits(gl.ops.max_pool_backward(dy, saved), expected)
        with emulated(launched):
            ours = getattr(gl.ops, f"{name}_pool_backward")(dy, saved)
        assert_same_bits(ours, expected, name)
    assert ["_adaptive<" in name for name in launched] == [True, True]


@pytest.mark.parametrize(
    ("inputs", "outputs", "channels_last"),
    [
        ((140_001, 8), (2, 1), False),
        ((300, 250, 8), (1, 1, 3), False),
        ((300, 591), (1, 2), True),
        ((2, 3, 50_000), (1, 2, 1), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize == 2], ids=str)
def test_more_taps_than_a_half_word_counts(dtype, inputs, outputs, channels_last):
    """Half values are compared in pairs, whose taps have 16 bits each."""
    x, launched = normal((8, *inputs), dtype), []
    # The largest comes last, and twice; nothing but equal values, and nothing but -inf, of which the first counts.
    x[0][(-1,) * (len(inputs) - 1)][-2:] = 100
    x[1], x[2] = 0.5, -np.inf
    values = np.moveaxis(x, 0, -1) if channels_last else x
    with emulated(launched):
        y, saved = gl.ops.adaptive_max_pool_forward(values[np.newaxis], outputs, channels_last=channels_last)
    assert ["_forward_adaptive<" in name for name in launched] == [True]
    own_y, argmax = (np.moveaxis(a[0], -1, 0) if channels_last else a[0] for a in (y, saved.argmax))
    for output in np.ndindex(*outputs):
        bounds = zip(output, inputs, outputs, strict=True)
        window = x[(..., *(slice(at * size // count, -(-(at + 1) * size // count)) for at, size, count in bounds))]
        taps = window.reshape(8, -1)
        first = taps.astype(np.float32).argmax(axis=1)
        # Taps are counted as those of the largest window.
        found = np.unravel_index(argmax[(..., *output)], saved.window.kernel[-len(inputs) :])
        np.testing.assert_array_equal(found, np.unravel_index(first, window.shape[1:]))
        assert_same_bits(own_y[(..., *output)], taps[np.arange(8), first])
    assert first.max() > 0xFFFF


def test_many_windows_over_an_element_are_for_the_general_kernel():
    """It adds the shares with compensation."""
    x, launched = normal((1, 1, 2, 2, 4), np.float32), []
    y, saved = gl.ops.adaptive_avg_pool_forward(x, (9, 9, 9))
    dy = normal(y.shape, np.float32, seed=2)
    with emulated(launched):
        assert_same_bits(gl.ops.avg_pool_backward(dy, saved), gl.ops.avg_pool_backward(dy, saved))
    assert all(name.startswith("avg_pool_backward") for name in launched)
