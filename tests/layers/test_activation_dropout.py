"""The layer of activation and dropout."""

import numpy as np
import pytest

import gpu_layers as gl
from tests.inputs import DTYPES, assert_same_bits, normal, unchanged

ACTIVATIONS = ("relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "identity")
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


@each_activation
@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training(activation, order, dtype):
    layer = gl.ActivationDropout(activation, 0.3, order=order, generator=gl.Generator(7, 5))
    x, dy = normal((4, 9), dtype), normal((4, 9), dtype, seed=1)
    for offset in (5, 6):
        with unchanged(x, dy):
            y, dx = layer(x), layer.backward(dy)
        expected, saved = gl.ops.activation_dropout_forward(x, activation, 0.3, 7, offset, order=order)
        assert_same_bits(y, expected)
        assert_same_bits(dx, gl.ops.activation_dropout_backward(dy, saved))
        assert_same_bits(layer.backward(dy), dx)
    assert layer.generator.offset == 7


@each_activation
@pytest.mark.parametrize("order", ["after", "before"])
def test_evaluation_is_the_activation_alone(activation, order):
    layer = gl.ActivationDropout(activation, 0.9, order=order, generator=gl.Generator(7)).eval()
    x, dy = normal((4, 9)), normal((4, 9), seed=1)
    expected, saved = gl.ops.activation_dropout_forward(x, activation, 0.0, 1, 2, order=order)
    assert_same_bits(layer(x), expected)
    assert_same_bits(layer.backward(dy), gl.ops.activation_dropout_backward(dy, saved))
    assert layer.generator.offset == 0


@each_activation
@pytest.mark.parametrize(
    ("bad", "change", "error"),
    [
        (np.ones(20, int), {}, TypeError),
        ([1.0] * 20, {}, TypeError),
        (np.ones(20), {"p": 1.5}, ValueError),
        (np.ones(20), {"activation": "swish"}, ValueError),
        (np.ones(20), {"order": "between"}, ValueError),
    ],
)
def test_a_forward_that_raises_leaves_everything_as_it_was(activation, bad, change, error):
    layer = gl.ActivationDropout(activation, generator=gl.Generator(7))
    x = normal((20,))
    layer(x)
    expected, before = layer.backward(x), np.array(bad)
    for name, value in change.items():
        setattr(layer, name, value)
    with pytest.raises(error):
        layer(bad)
    np.testing.assert_array_equal(np.array(bad), before)
    assert layer.generator.offset == 1
    assert_same_bits(layer.backward(x), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"activation": "elu"}, ValueError, "activation must be one of .* got 'elu'"),
        ({"order": "first"}, ValueError, "order must be one of 'after', 'before', got 'first'"),
        ({"p": -1}, ValueError, "dropout probability has to be between 0 and 1, but got -1"),
        ({"generator": 1}, TypeError, r"generator must be a gpu_layers\.Generator, got int"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        gl.ActivationDropout(**({"activation": "relu"} | arguments))


def test_repr():
    assert repr(gl.ActivationDropout("relu")) == "ActivationDropout('relu', p=0.5)"
    assert repr(gl.ActivationDropout("gelu", 0.1, order="before")) == "ActivationDropout('gelu', p=0.1, order='before')"
