"""Pooling layers: PyTorch's arguments, checked when the layer is made; the arithmetic is proved with the ops."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests.inputs import (
    assert_same_bits,
    assert_same_values,
    assert_within,
    integers,
    normal,
    tie_free,
    to_channels_first,
    to_channels_last,
    unchanged,
)
from tests.ops.pool_cases import BAD_WINDOWS

_PLANE_ARGUMENTS = [(2,), ((3, 2),), (3, 2, 1), ((3, 2), (1, 2), (1, 0))]
_MAX_ARGUMENTS = [(2,), (3, 2, 1), (3, None, 1, 2), (2, 1, 0, 1, True, True)]
MAX_ARGUMENTS = {
    1: _MAX_ARGUMENTS,
    2: [*_PLANE_ARGUMENTS, (3, 1, 1, 2), (3, 2, 0, 1, True, True), (2, None, 1, (1, 2), True)],
    3: _MAX_ARGUMENTS,
}
_AVG_ARGUMENTS = [(2,), (3, 2, 1), (3, 2, 1, True, False), (2, 1, 0, True)]
AVG_ARGUMENTS = {
    1: _AVG_ARGUMENTS,
    2: [*_PLANE_ARGUMENTS, (3, 2, 1, True), (3, 2, 1, True, False), (3, 2, 1, False, True, 5)],
    3: _AVG_ARGUMENTS,
}


def each_call(arguments):
    calls = [(rank, one) for rank, of_rank in arguments.items() for one in of_rank]
    return pytest.mark.parametrize(("rank", "arguments"), calls, ids=str)


def check_like_torch(name, arguments, x, compare, gradient, compare_gradients):
    ours, theirs = getattr(gl, name)(*arguments), getattr(torch.nn, name)(*arguments)
    assert repr(ours) == repr(theirs)
    leaf = torch.from_numpy(x).requires_grad_()
    with unchanged(x):
        y = ours(x)
    expected = theirs(leaf)
    if isinstance(expected, tuple):
        (y, indices), (expected, expected_indices) = y, expected
        assert_same_bits(indices, expected_indices.numpy())
    compare(y, expected.detach().numpy())
    dy = gradient(y.shape)
    expected.backward(torch.from_numpy(dy))
    for _ in range(2):
        compare_gradients(ours.backward(dy), leaf.grad.numpy())


def shape_of(rank, batch):
    return ((2, 3) if batch else (3,)) + (7, 6, 8)[:rank]


@each_call(MAX_ARGUMENTS)
@pytest.mark.parametrize("batch", [True, False])
def test_max_pool_is_torchs(rank, arguments, batch):
    x = tie_free(shape_of(rank, batch))
    check_like_torch(f"MaxPool{rank}d", arguments, x, assert_same_bits, integers, assert_same_values)


@each_call(AVG_ARGUMENTS)
@pytest.mark.parametrize("batch", [True, False])
def test_avg_pool_is_torchs(rank, arguments, batch):
    def close(actual, expected):
        # At most 27 terms of at most 5, divided by 1 or more, with a rounding each, on both sides.
        assert_within(actual, expected, 2 * 28 * 27 * 5 * 2.0**-53)

    def gradient(shape):
        return normal(shape, seed=1)

    check_like_torch(f"AvgPool{rank}d", arguments, normal(shape_of(rank, batch)), close, gradient, close)


@pytest.mark.parametrize(
    "make",
    [lambda **side: gl.MaxPool2d((3, 2), 2, 1, **side), lambda **side: gl.AvgPool2d((3, 2), 2, 1, dilation=2, **side)],
    ids=["max", "avg"],
)
def test_channels_last_is_the_same_map(make):
    first, last = make(), make(channels_last=True)
    x = tie_free((2, 3, 8, 7))
    y = first(x)
    assert_same_bits(to_channels_first(last(to_channels_last(x))), y)
    dy = integers(y.shape)
    dx = first.backward(dy)
    assert_same_bits(to_channels_first(last.backward(to_channels_last(dy))), dx)
    one = last(to_channels_last(x)[1])
    assert_same_bits(np.moveaxis(one, -1, 0).copy(), y[1])
    assert_same_bits(np.moveaxis(last.backward(to_channels_last(dy)[1]), -1, 0).copy(), dx[1])


def test_indices_stay_flat_in_the_plane_with_channels_last():
    x = tie_free((2, 3, 6, 5))
    _, indices = gl.MaxPool2d(2, return_indices=True)(x)
    _, last = gl.MaxPool2d(2, return_indices=True, channels_last=True)(to_channels_last(x))
    assert_same_bits(to_channels_first(last), indices)


@pytest.mark.parametrize("layer", [gl.MaxPool2d(2), gl.AvgPool2d(2)], ids=repr)
def test_modes_make_no_difference(layer):
    x = normal((2, 3, 4, 6))
    assert_same_bits(layer.eval()(x), layer.train()(x))
    assert (layer.parameters, layer.gradients, layer.state_dict()) == ({}, {}, {})


def test_repr_shows_extras():
    assert repr(gl.MaxPool2d(2, channels_last=True)) == (
        "MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False, channels_last=True)"
    )
    assert repr(gl.AvgPool2d(2, dilation=3, channels_last=True)) == (
        "AvgPool2d(kernel_size=2, stride=2, padding=0, dilation=3, channels_last=True)"
    )


@pytest.mark.parametrize("make", [gl.MaxPool2d, gl.AvgPool2d])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        *BAD_WINDOWS,
        ({"kernel_size": 0}, ValueError, "^kernel size should be greater than zero, but got "),
        ({"kernel_size": 2.5}, TypeError, "kernel_size must be an integer, got float"),
        ({"kernel_size": (2, 2, 2)}, ValueError, "kernel_size must be an int, or 2 of them, one a spatial axis"),
        ({"kernel_size": ()}, ValueError, "kernel_size must be an int, or 2 of them, one a spatial axis"),
        ({"kernel_size": None}, TypeError, "kernel_size must be an integer, got NoneType"),
    ],
)
def test_bad_arguments_are_refused_when_the_layer_is_made(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(**({"kernel_size": 3} | arguments))


@pytest.mark.parametrize(
    ("divisor", "error", "message"),
    [(0, ValueError, "^divisor must be not zero$"), (1.5, TypeError, "divisor_override must be an integer, got float")],
)
def test_bad_divisors_are_refused_when_the_layer_is_made(divisor, error, message):
    with pytest.raises(error, match=message):
        gl.AvgPool2d(3, divisor_override=divisor)


@pytest.mark.parametrize("layer", [gl.MaxPool2d(3), gl.AvgPool2d(3)], ids=repr)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones((3, 3)), ValueError, r"^Expected 3D or 4D \(batch mode\) tensor .* input, but got:\[3, 3\]$"),
        (np.ones((1, 1, 1, 3, 3)), ValueError, r"^Expected 3D or 4D \(batch mode\) tensor"),
        (np.ones((1, 0, 3, 3)), ValueError, r"^Expected 3D or 4D \(batch mode\) tensor .* but got:\[1, 0, 3, 3\]$"),
        (np.ones((1, 1, 2, 3)), ValueError, r"Output size is too small$"),
        (np.ones((1, 1, 3, 3), complex), TypeError, "^input must be float16, .* or float64, got complex128$"),
    ],
)
def test_bad_input_is_refused(layer, x, error, message):
    with pytest.raises(error, match=message):
        layer(x)
