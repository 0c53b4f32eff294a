"""Batch norm with a residual and an activation, against PyTorch's autograd of the same expression."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests.inputs import DTYPES, assert_all_same_bits, assert_same_bits, assert_within, normal, to_channels_last
from tests.torch_bridge import ACTIVATIONS, from_torch, to_torch

each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_residual = pytest.mark.parametrize("with_residual", [False, True])


def expected(x, gamma, beta, residual, activation, dy, statistics=None):
    """y and the gradients of x, gamma, beta and, if there is one, residual, in float64."""
    leaves = [
        None if a is None else to_torch(a.astype(np.float64)).requires_grad_() for a in (x, gamma, beta, residual)
    ]
    leaf, weight, bias, added = leaves
    mean, var = (None, None) if statistics is None else map(to_torch, statistics)
    z = torch.nn.functional.batch_norm(leaf, mean, var, weight, bias, statistics is None, 0.0, 1e-5)
    y = ACTIVATIONS[activation](z if added is None else z + added)
    y.backward(to_torch(dy.astype(np.float64)))
    return from_torch(y), [from_torch(a.grad) for a in leaves if a is not None]


def inputs(shape, dtype):
    x, dy, residual = (normal((*shape[:-1], 2 * shape[-1]), dtype, seed=s)[..., ::2] for s in (1, 2, 3))
    parameter = np.float64 if dtype == np.float64 else np.float32
    gamma, beta = (normal((shape[1],), parameter, seed=s) for s in (4, 5))
    return x, dy, residual, gamma, beta


@each_activation
@each_residual
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
def test_is_the_composition(activation, with_residual, training, channels_last):
    x, dy, residual, gamma, beta = inputs((3, 5, 4, 7), np.float64)
    residual = residual if with_residual else None
    statistics = None if training else (normal((5,), seed=6), np.exp(normal((5,), seed=7)))
    y, gradients = expected(x, gamma, beta, residual, activation, dy, statistics)

    def laid_out(array):
        return to_channels_last(array) if channels_last and array is not None and array.ndim == 4 else array

    x, dy, residual = map(laid_out, (x, dy, residual))
    options = {"residual": residual, "activation": activation, "channels_last": channels_last}
    if training:
        actual, saved = gl.ops.batch_norm_forward(x, gamma, beta, **options)
        actual_gradients = gl.ops.batch_norm_backward(dy, saved)
    else:
        actual, saved = gl.ops.batch_norm_inference(x, *statistics, gamma, beta, **options)
        actual_gradients = gl.ops.batch_norm_inference_backward(dy, saved)
    # Sums of 84 values below 10, in float64 on both sides: some 100 roundings of 1e-16 of 1e3.
    assert_within(actual, laid_out(y), 1e-11)
    assert len(actual_gradients) == len(gradients)
    for got, wanted in zip(actual_gradients, gradients, strict=True):
        assert_within(got, laid_out(wanted), 1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_fused_changes_no_bit(dtype):
    x, dy, _, gamma, beta = inputs((3, 5, 4, 7), dtype)
    plain, saved = gl.ops.batch_norm_forward(x, gamma, beta)
    fused, fused_saved = gl.ops.batch_norm_forward(x, gamma, beta, activation="identity")
    assert_same_bits(plain, fused)
    for one, other in zip(
        gl.ops.batch_norm_backward(dy, saved), gl.ops.batch_norm_backward(dy, fused_saved), strict=True
    ):
        assert_same_bits(one, other)


@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_the_gradient_of_relu_at_and_below_zero(backend):
    # x = -1, 1 normalises to -1, 1; a residual of -1, 1 and an infinite gradient where nothing passes.
    x = np.array([[-1.0], [1.0], [-1.0], [1.0]], np.float32)
    residual = np.array([[-1.0], [-1.0], [3.0], [3.0]], np.float32)
    dy = np.array([[np.inf], [np.inf], [2.0], [5.0]], np.float32)
    with gl.use_backend(backend):
        y, saved = gl.ops.batch_norm_forward(x, None, None, eps=1e-30, residual=residual, activation="relu")
        *_, dbeta, dresidual = gl.ops.batch_norm_backward(dy, saved)
    # z = -2, 0, 2, 4: as in PyTorch, no gradient passes at 0.
    assert_same_bits(y, np.array([[0], [0], [2], [4]], np.float32))
    assert_same_bits(dresidual, np.array([[0], [0], [2], [5]], np.float32))
    assert_same_bits(dbeta, np.array([7], np.float32))


@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_infinite_input_of_given_statistics(backend):
    x = np.array([[np.inf], [-np.inf], [1.0]], np.float32)
    one = np.ones(1, np.float32)
    with gl.use_backend(backend):
        y, saved = gl.ops.batch_norm_inference(x, 0 * one, one, None, None, eps=1e-30, activation="leaky_relu")
        dx, _, _ = gl.ops.batch_norm_inference_backward(np.full_like(x, 2), saved)
    assert_same_bits(y, np.array([[np.inf], [-np.inf], [1]], np.float32))
    assert_same_bits(dx, np.array([[2], [np.float32(2) * np.float32(0.01)], [2]], np.float32))


@pytest.mark.parametrize("training", [True, False])
def test_layer(training):
    x, dy, residual, _, _ = inputs((3, 5, 4, 7), np.float32)
    layer = gl.BatchNorm2d(5, activation="relu").train(training)
    y = layer(x, residual)
    forward = gl.ops.batch_norm_forward if training else gl.ops.batch_norm_inference
    statistics = () if training else (np.zeros(5, np.float32), np.ones(5, np.float32))
    affine = (np.ones(5, np.float32), np.zeros(5, np.float32))
    wanted, saved = forward(x, *statistics, *affine, residual=residual, activation="relu")
    assert_same_bits(y, wanted)
    backward = gl.ops.batch_norm_backward if training else gl.ops.batch_norm_inference_backward
    dx, dgamma, dbeta, dresidual = backward(dy, saved)
    pair = layer.backward(dy)
    assert isinstance(pair, tuple)
    assert_same_bits(pair[0], dx)
    assert_same_bits(pair[1], dresidual)
    assert_same_bits(layer.gradients["weight"], dgamma)
    assert_same_bits(layer.gradients["bias"], dbeta)
    assert "activation='relu'" in repr(layer)
    # Without a residual there is one gradient.
    layer(x)
    assert layer.backward(dy).shape == x.shape


def test_an_empty_batch_has_empty_gradients():
    x = np.empty((0, 3, 2), np.float32)
    y, saved = gl.ops.batch_norm_forward(x, None, None, residual=x, activation="gelu")
    dx, dgamma, dbeta, dresidual = gl.ops.batch_norm_backward(y, saved)
    assert dx.shape == dresidual.shape == x.shape
    assert not dgamma.any()
    assert not dbeta.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"residual": np.zeros((3, 5, 4, 6), np.float32)},
            ValueError,
            "residual should|residual must have the input's shape",
        ),
        ({"residual": np.zeros((3, 5, 4, 7), np.float64)}, TypeError, "residual must have the input's dtype float32"),
        ({"residual": [1.0]}, TypeError, "expected a numpy.ndarray"),
        ({"activation": "relu6"}, ValueError, "activation must be one of 'relu'"),
        ({"activation": 3}, ValueError, "activation must be one of 'relu'"),
    ],
)
def test_bad_input(change, error, message):
    x = normal((3, 5, 4, 7), np.float32)
    with pytest.raises(error, match=message):
        gl.ops.batch_norm_forward(x, None, None, **change)


def test_a_bad_residual_leaves_the_layer_as_it_was():
    layer = gl.BatchNorm2d(5)
    before = layer.state_dict()
    x = normal((3, 5, 4, 7), np.float32)
    with pytest.raises(ValueError, match="residual must have the input's shape"):
        layer(x, x[:2])
    assert_all_same_bits(layer.state_dict(), before)


def test_a_layer_knows_its_activations():
    with pytest.raises(ValueError, match="activation must be one of 'relu'"):
        gl.BatchNorm2d(5, activation="relu6")
