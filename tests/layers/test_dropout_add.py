"""The layer of a residual and what dropout leaves of a branch."""

import numpy as np
import pytest

import gpu_layers as gl
from tests.inputs import DTYPES, assert_same_bits, normal, unchanged


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("shared_axes", [(), (1,)])
def test_training(dtype, activation, shared_axes):
    layer = gl.DropoutAdd(
        0.3,
        activation,
        num_features=8,
        shared_axes=shared_axes,
        generator=gl.Generator(7, 5),
        dtype="float64" if dtype == np.float64 else "float32",
    )
    layer.parameters["bias"][:] = np.arange(8)
    x, residual, dy = (normal((4, 3, 8), dtype, seed=seed) for seed in range(3))
    options = {"activation": activation, "bias": layer.parameters["bias"], "shared_axes": shared_axes}
    for offset in (5, 6):
        with unchanged(x, residual, dy):
            y = layer(x, residual)
            dx, dresidual = layer.backward(dy)
        expected, saved = gl.ops.dropout_add_forward(x, residual, 0.3, 7, offset, **options)
        expected_dx, _, dbias = gl.ops.dropout_add_backward(dy, saved)
        assert_same_bits(y, expected)
        assert_same_bits(dx, expected_dx)
        assert dresidual is dy
        assert_same_bits(layer.gradients["bias"], dbias)
    assert layer.generator.offset == 7


def test_evaluation_drops_nothing():
    layer = gl.DropoutAdd(0.9, "relu", num_features=8, generator=gl.Generator(7)).eval()
    x, residual = normal((4, 8), np.float32), normal((4, 8), np.float32, seed=1)
    np.testing.assert_array_equal(layer(x, residual), residual + np.maximum(x, 0))
    dx, _ = layer.backward(np.ones_like(x))
    np.testing.assert_array_equal(dx, x > 0)
    assert layer.generator.offset == 0


def test_without_features_there_is_no_bias():
    layer = gl.DropoutAdd(0.5)
    x = normal((4, 8), np.float32)
    layer(x, x)
    layer.backward(x)
    assert layer.parameters == layer.gradients == {}


def test_a_block_of_a_transformer_trains_its_bias():
    class Block(gl.Layer):
        def __init__(self):
            super().__init__()
            self.linear = gl.Linear(8, 8, bias=False, seed=0)
            self.add = gl.DropoutAdd(0.5, num_features=8, generator=gl.Generator(3))

        def forward(self, x):
            return self.add(self.linear(x), x)

        def backward(self, dy):
            dx, dresidual = self.add.backward(dy)
            return self.linear.backward(dx) + dresidual

    block, x = Block(), normal((5, 8), np.float32)
    block.backward(np.ones_like(block(x)))
    assert list(block.parameters) == ["linear.weight", "add.bias"]
    assert block.gradients["add.bias"].shape == (8,)
    assert list(block.state_dict()) == ["linear.weight", "add.bias"]


def test_rows_and_parts_of_a_batch_have_the_masks_of_the_whole():
    x = normal((6, 3, 8), np.float32)
    whole = gl.DropoutAdd(0.5, generator=gl.Generator(3))(x, x)
    part = gl.DropoutAdd(0.5, generator=gl.Generator(3))
    part.first_sample = 2
    assert_same_bits(part(x[2:], x[2:]), whole[2:])
    ids = np.array([3, 1, 2, 9, 4, 0])
    by_ids = gl.DropoutAdd(0.5, generator=gl.Generator(3))(x, x, sample_ids=ids)
    again = gl.DropoutAdd(0.5, generator=gl.Generator(3))(x[::-1], x[::-1], sample_ids=ids[::-1].copy())
    assert_same_bits(np.ascontiguousarray(again[::-1]), by_ids)


def test_twice_in_a_network_is_like_two():
    class Twice(gl.Layer):
        def __init__(self, first, second):
            super().__init__()
            self.both = [first, second]

        def forward(self, x):
            y = self.both[0](x, x)
            return self.both[1](y, x)

        def backward(self, dy):
            dy, dx = self.both[1].backward(dy)
            return dx + sum(self.both[0].backward(dy))

    def made():
        return gl.DropoutAdd(0.5, "gelu", num_features=8, generator=gl.Generator(3))

    one, first, second = made(), made(), made()
    second.generator = first.generator
    shared, apart = Twice(one, one), Twice(first, second)
    x = normal((5, 8), np.float32)
    for _ in range(2):
        y = apart(x)
        assert_same_bits(shared(x), y)
        assert_same_bits(shared.backward(y), apart.backward(y))
        total = second.gradients["bias"] + first.gradients["bias"]
        assert_same_bits(one.gradients["bias"], total)


def test_uncertainty_finds_it():
    layer = gl.DropoutAdd(0.5, generator=gl.Generator(3)).eval()
    x = np.ones((2, 8), np.float32)
    _, variance = gl.mc_dropout(lambda x: layer(x, x), x, passes=20, layers=[layer])
    assert variance.max() > 0.5
    assert not layer.training


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"p": -1}, ValueError, "dropout probability has to be between 0 and 1, but got -1"),
        ({"activation": "elu"}, ValueError, "activation must be one of .* got 'elu'"),
        ({"order": "first"}, ValueError, "order must be one of"),
        ({"num_features": 0}, ValueError, "num_features must be in 1"),
        ({"shared_axes": (1, 1)}, ValueError, "shared_axes must be different axes"),
        ({"dtype": "float16"}, TypeError, "dtype must be 'float32', or .*, got float16$"),
        ({"generator": 1}, TypeError, r"generator must be a gpu_layers\.Generator, got int"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        gl.DropoutAdd(**arguments)


def test_a_forward_that_raises_leaves_the_generator():
    layer = gl.DropoutAdd(0.5, generator=gl.Generator(7))
    x = normal((4, 8), np.float32)
    with pytest.raises(ValueError, match="residual must have"):
        layer(x, x[:2])
    assert layer.generator.offset == 0


def test_repr():
    assert repr(gl.DropoutAdd(0.1)) == "DropoutAdd(p=0.1)"
    layer = gl.DropoutAdd(0.1, "gelu", num_features=8, order="before", shared_axes=(1, 2))
    assert repr(layer) == "DropoutAdd(p=0.1, 'gelu', num_features=8, order='before', shared_axes=(1, 2))"
