"""Adaptive pooling: values, indices and gradients against PyTorch."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests.inputs import (
    assert_same_bits,
    assert_same_values,
    assert_within,
    each_dtype,
    integers,
    normal,
    tie_free,
    to_channels_first,
    to_channels_last,
    with_specials,
)
from tests.torch_bridge import from_torch, to_torch

F = torch.nn.functional
TORCH_MAX = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
TORCH_AVG = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
#: Divisible and not, the whole plane, more outputs than inputs, every size kept.
CASES = [
    ((2, 3, 10), (4,)),
    ((2, 3, 10), (5,)),
    ((2, 3, 10), (1,)),
    ((2, 3, 3), (7,)),
    ((2, 3, 8, 9), (3, 4)),
    ((2, 3, 8, 9), (4, 3)),
    ((2, 3, 8, 9), (1, 1)),
    ((2, 3, 8, 9), (None, 2)),
    ((2, 3, 2, 5), (5, 3)),
    ((2, 3, 5, 6, 4), (2, 4, 3)),
    ((1, 2, 5, 6, 4), (1, 1, 1)),
    ((1, 2, 3, 4, 2), (None, 3, 5)),
]
each_case = pytest.mark.parametrize(("shape", "outputs"), CASES, ids=str)


@each_case
@each_dtype
def test_max_is_torchs(shape, outputs, dtype):
    rank = len(outputs)
    x = integers(shape, dtype)
    kept = tuple(size if output is None else output for size, output in zip(shape[2:], outputs, strict=True))
    leaf = to_torch(x).requires_grad_()
    expected, indices = TORCH_MAX[rank](leaf, kept, return_indices=True)
    y, saved = gl.ops.adaptive_max_pool_forward(x, outputs)
    assert_same_bits(y, from_torch(expected))
    assert_same_bits(gl.ops.max_pool_indices(saved), indices.numpy())
    dy = integers(y.shape, dtype, seed=1)
    expected.backward(to_torch(dy))
    assert_same_values(gl.ops.max_pool_backward(dy, saved), from_torch(leaf.grad))


@each_case
def test_avg_is_torchs(shape, outputs):
    rank = len(outputs)
    x = normal(shape)
    kept = tuple(size if output is None else output for size, output in zip(shape[2:], outputs, strict=True))
    leaf = to_torch(x).requires_grad_()
    expected = TORCH_AVG[rank](leaf, kept)
    y, saved = gl.ops.adaptive_avg_pool_forward(x, outputs)
    # Means of at most 120 values below 4, with a rounding for each addition, on both sides.
    bound = 2 * 120 * 4 * 2.0**-53
    assert_within(y, from_torch(expected), bound)
    dy = normal(y.shape, seed=1)
    expected.backward(to_torch(dy))
    dx = gl.ops.avg_pool_backward(dy, saved)
    # At most 27 windows meet, with gradients below 4.
    assert_within(dx, from_torch(leaf.grad), 2 * 28 * 27 * 4 * 2.0**-53)
    # Every divisor is the number of taps: the sum of gradients is preserved, to the rounding of as many terms.
    assert abs(dx.sum() - dy.sum()) <= (dx.size + 30) * 2.0**-53 * np.abs(dy).sum()


@each_case
@each_dtype
def test_layouts_do_not_change_a_bit(shape, outputs, dtype):
    x = with_specials(shape, dtype)
    # Which NaN a sum of two of them is, IEEE 754 leaves open: it may be another in a vector of the processor's.
    for forward, backward, assert_same in (
        (gl.ops.adaptive_max_pool_forward, gl.ops.max_pool_backward, assert_same_bits),
        (gl.ops.adaptive_avg_pool_forward, gl.ops.avg_pool_backward, assert_same_values),
    ):
        y, saved = forward(x, outputs)
        last, saved_last = forward(to_channels_last(x), outputs, channels_last=True)
        assert_same(to_channels_first(last), y)
        dy = normal(y.shape, dtype, seed=1)
        dx = backward(to_channels_last(dy), saved_last)
        assert_same_bits(to_channels_first(dx), backward(dy, saved))


def test_what_is_saved_is_the_tap_within_its_window():
    x = tie_free((1, 1, 300, 300))
    _, saved = gl.ops.adaptive_max_pool_forward(x, (100, 100))
    assert saved.argmax.dtype == np.uint8
    _, saved = gl.ops.adaptive_max_pool_forward(x, (1, 1))
    assert saved.argmax.dtype == np.uint32
    assert gl.ops.max_pool_indices(saved).item() == x.argmax()


@pytest.mark.parametrize("name", ["Avg", "Max"])
@pytest.mark.parametrize(("rank", "size"), [(1, 3), (2, (None, 2)), (2, 3), (3, (2, None, 1))])
@pytest.mark.parametrize("batch", [True, False])
def test_layers_are_torchs(name, rank, size, batch):
    make = f"Adaptive{name}Pool{rank}d"
    ours, theirs = getattr(gl, make)(size), getattr(torch.nn, make)(size)
    assert repr(ours) == repr(theirs)
    x = integers((2, 3, 6, 5, 4)[: rank + 2] if batch else (3, 6, 5, 4)[: rank + 1]) * 60
    leaf = to_torch(x).requires_grad_()
    expected = theirs(leaf)
    y = ours(x)
    assert_within(y, from_torch(expected), 1e-12)  # of values up to 180
    dy = integers(y.shape)
    expected.backward(to_torch(dy))
    for _ in range(2):
        assert_within(ours.backward(dy), from_torch(leaf.grad), 1e-12)


def test_max_layers_return_indices():
    x = tie_free((2, 3, 6, 5))
    y, indices = gl.AdaptiveMaxPool2d((4, 3), return_indices=True)(x)
    flat = np.take_along_axis(x.reshape(2, 3, -1), indices.reshape(2, 3, -1), 2)
    assert_same_bits(flat.reshape(y.shape), y)
    assert indices.dtype == np.int64


def test_no_outputs_are_legal():
    x = integers((2, 3, 4))
    for forward, backward in (
        (gl.ops.adaptive_max_pool_forward, gl.ops.max_pool_backward),
        (gl.ops.adaptive_avg_pool_forward, gl.ops.avg_pool_backward),
    ):
        y, saved = forward(x, (0,))
        assert y.shape == (2, 3, 0)
        assert_same_bits(backward(y, saved), np.zeros_like(x))


@pytest.mark.parametrize("forward", [gl.ops.adaptive_max_pool_forward, gl.ops.adaptive_avg_pool_forward])
@pytest.mark.parametrize(
    ("shape", "size", "error", "message"),
    [
        ((2, 3, 4), 3, TypeError, "^output_size must be a tuple, one int a spatial axis, got int$"),
        ((2, 3, 4), (), ValueError, "^output_size must have 1 to 3 elements"),
        (
            (2, 3, 4),
            (-1,),
            ValueError,
            r"^elements of output_size must be greater than or equal to 0 but received \[-1",
        ),
        ((2, 3, 4), (1.5,), TypeError, "^output_size must be an integer, got float$"),
        ((2, 3, 4), (2, 2, 2), ValueError, r"^Expected 4D or 5D \(batch mode\) tensor"),
        ((2, 0, 4), (2,), ValueError, r"^Expected 2D or 3D \(batch mode\) tensor .* but got:\[2, 0, 4\]$"),
        ((2, 3, 0), (2,), ValueError, r"^Expected 2D or 3D \(batch mode\) tensor"),
    ],
)
def test_bad_arguments(forward, shape, size, error, message):
    with pytest.raises(error, match=message):
        forward(np.ones(shape), size)


@pytest.mark.parametrize("make", [gl.AdaptiveAvgPool2d, gl.AdaptiveMaxPool2d])
@pytest.mark.parametrize(("size", "error"), [((1, 2, 3), ValueError), (-1, ValueError), ("2", TypeError)])
def test_bad_sizes_are_refused_when_the_layer_is_made(make, size, error):
    with pytest.raises(error, match="output_size"):
        make(size)
