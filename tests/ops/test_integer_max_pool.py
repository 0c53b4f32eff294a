"""Max pooling of whole numbers and of bool: exact at any size, with indices, without a gradient."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from gpu_layers.runtime.kernel import INTEGER_DTYPES
from tests.inputs import LAYOUTS, assert_same_bits, each_backend, to_channels_first, to_channels_last, unchanged

each_dtype = pytest.mark.parametrize("dtype", INTEGER_DTYPES, ids=str)
WINDOWS = {
    "2x2": {"kernel_size": (2, 2)},
    "overlapping": {"kernel_size": (3, 3), "stride": 2, "padding": 1},
    "odd": {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 0), "dilation": (1, 2), "ceil_mode": True},
}


def extremes(shape, dtype):
    """The whole range of a dtype, with both ends, and neighbours that a float64 would take for equal."""
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(0)
    choices = np.array([limits.min, limits.min + 1, limits.max - 1, limits.max, limits.max // 2], dtype)
    return rng.choice(choices, shape)


def by_torch(x, window):
    """In the ranks of the values, which float64 holds."""
    values, ranks = np.unique(x, return_inverse=True)
    ranks = torch.from_numpy(ranks.reshape(x.shape).astype(np.float64))
    kernel, others = window["kernel_size"], {name: value for name, value in window.items() if name != "kernel_size"}
    y, indices = torch.nn.functional.max_pool2d(ranks, kernel, return_indices=True, **others)
    return values[y.numpy().astype(int)], indices.numpy()


@each_backend
@each_dtype
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_values_and_indices(dtype, window, channels_last, backend):
    x = extremes((2, 16, 7, 9), dtype)
    expected, indices = by_torch(x, window)
    given = to_channels_last(x) if channels_last else x
    with gl.use_backend(backend), unchanged(given):
        y, saved = gl.ops.max_pool_forward(given, **window, channels_last=channels_last)
        at = gl.ops.max_pool_indices(saved)
    if channels_last:
        y, at = to_channels_first(y), to_channels_first(at)
    assert_same_bits(y, expected)
    assert_same_bits(at, indices)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bool(layout, backend):
    x = np.random.default_rng(0).random((2, 3, 7, 9)) < 0.2
    with gl.use_backend(backend):
        y, saved = gl.ops.max_pool_forward(layout(x), (3, 3), 2, 1)
        wanted, as_bytes = gl.ops.max_pool_forward(x.view(np.uint8), (3, 3), 2, 1)
        assert_same_bits(gl.ops.max_pool_indices(saved), gl.ops.max_pool_indices(as_bytes))
        out = np.zeros(y.shape, bool)
        assert gl.ops.max_pool_forward(x, (3, 3), 2, 1, out=out)[0] is out
    assert y.dtype == saved.dtype == bool
    assert_same_bits(y, wanted.view(bool))
    assert_same_bits(out, y)


@each_backend
@each_dtype
def test_a_window_with_no_tap_inside_is_the_smallest_number(dtype, backend):
    # Taps at -2 and 3 of two elements.
    with gl.use_backend(backend):
        y, saved = gl.ops.max_pool_forward(np.full((1, 1, 2), 5, dtype), (2,), 1, 2, 5)
        indices = gl.ops.max_pool_indices(saved)
    assert y.tolist() == [[[np.iinfo(dtype).min]]]
    assert indices.tolist() == [[[-1]]]


@each_backend
def test_lengths_and_adaptive_windows_and_layers(backend):
    x = extremes((2, 3, 7, 9), np.dtype(np.int64))
    with gl.use_backend(backend):
        y, saved = gl.ops.max_pool_forward(x, (2, 2), lengths=[[7, 9], [0, 0]])
        assert not y[1].any()
        assert (gl.ops.max_pool_indices(saved)[1] == -1).all()
        assert_same_bits(gl.AdaptiveMaxPool2d(1)(x)[..., 0, 0], x.max(axis=(2, 3)))
        z, _ = gl.MaxPool2d(2, return_indices=True)(x.astype(np.uint8))
        assert z.dtype == np.uint8


def test_what_has_no_gradient_says_so():
    for dtype in (np.int32, bool):
        y, saved = gl.ops.max_pool_forward(np.ones((1, 2, 4, 4), dtype), (2, 2))
        with pytest.raises(TypeError, match=f"max pooling of {np.dtype(dtype)} has no gradient"):
            gl.ops.max_pool_backward(y, saved)


@pytest.mark.parametrize("dtype", [np.complex64, np.dtype(">i4"), "U1"])
def test_other_dtypes_are_refused(dtype):
    x = np.zeros((1, 2, 4, 4), dtype)
    with pytest.raises(TypeError, match="input must be float16, bfloat16, float32 or float64"):
        gl.ops.max_pool_forward(x, (2, 2))
    with pytest.raises(TypeError, match="input must be float16"):
        gl.ops.avg_pool_forward(np.zeros((1, 2, 4, 4), np.int32), (2, 2))
