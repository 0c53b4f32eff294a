"""Linear and Flatten against PyTorch and against finite differences."""

import numpy as np
import pytest
import torch

from gpu_layers.training import Flatten, Linear
from tests.inputs import DTYPES, UNIT_ROUNDOFF, accumulation_dtype, assert_within, normal, unchanged


def _layer(dtype, bias=True):
    layer = Linear(5, 3, bias=bias, dtype=accumulation_dtype(dtype), seed=1)
    for number, parameter in enumerate(layer.parameters.values()):
        parameter[...] = normal(parameter.shape, seed=10 + number)
    return layer


def _expected(layer, x, dy):
    """Output and gradients by PyTorch in float64."""
    exact = torch.nn.Linear(5, 3, bias="bias" in layer.parameters, dtype=torch.float64)
    exact.load_state_dict({name: torch.from_numpy(p.astype(np.float64)) for name, p in layer.state_dict().items()})
    xt = torch.from_numpy(x.astype(np.float64)).requires_grad_()
    yt = exact(xt)
    yt.backward(torch.from_numpy(dy.astype(np.float64)))
    gradients = {name: p.grad.numpy() for name, p in exact.named_parameters()}
    return yt.detach().numpy(), xt.grad.numpy(), gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_torch(dtype):
    layer = _layer(dtype)
    x, dy = normal((7, 5), dtype, seed=2), normal((7, 3), dtype, seed=3)
    with unchanged(x, dy):
        y = layer(x)
        dx = layer.backward(dy)
    expected_y, expected_dx, expected_gradients = _expected(layer, x, dy)
    # A sum of k products, each below 16 here, errs by at most k roundings of the accumulation dtype, of a partial sum
    # of at most 16 k; then one rounding to the dtype of the activations.
    sums = UNIT_ROUNDOFF[accumulation_dtype(dtype)] * 8 * 16 * 8
    assert y.dtype == dx.dtype == dtype
    assert_within(y, expected_y, sums + UNIT_ROUNDOFF[dtype] * 1.01 * np.abs(expected_y))
    assert_within(dx, expected_dx, sums + UNIT_ROUNDOFF[dtype] * 1.01 * np.abs(expected_dx))
    for name, expected in expected_gradients.items():
        assert layer.gradients[name].dtype == accumulation_dtype(dtype)
        assert_within(layer.gradients[name], expected, sums, name)


def test_no_bias():
    layer = _layer(np.float32, bias=False)
    layer(normal((2, 5), np.float32))
    layer.backward(normal((2, 3), np.float32))
    assert list(layer.parameters) == list(layer.gradients) == ["weight"]


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, "expected a numpy.ndarray or cupy.ndarray, got list"),
        (np.zeros((2, 5)), TypeError, "float64 input needs a layer of dtype='float64'"),
        (np.zeros((2, 5), np.int64), TypeError, "input must be float16"),
        (np.zeros((5,), np.float32), ValueError, r"expected 2D input \(got 1D input\)"),
        (np.zeros((2, 4), np.float32), ValueError, "expected input with 5 channels, got 4"),
    ],
)
def test_bad_input(x, error, message):
    with pytest.raises(error, match=message):
        _layer(np.float32)(x)


@pytest.mark.parametrize(
    ("arguments", "error"), [((0, 3), ValueError), ((3, 0), ValueError), ((2.5, 3), TypeError), ((True, 3), TypeError)]
)
def test_bad_size(arguments, error):
    with pytest.raises(error):
        Linear(*arguments)


@pytest.mark.parametrize("dtype", ["float16", None, "float33"])
def test_parameters_are_single_or_double(dtype):
    with pytest.raises(TypeError, match=f"dtype must be 'float32', or .*, got {dtype}$"):
        Linear(2, 3, dtype=dtype)


def test_flatten():
    x = normal((3, 2, 4, 5), np.float32)
    layer = Flatten()
    y = layer(x)
    np.testing.assert_array_equal(y, torch.flatten(torch.from_numpy(x.copy()), 1).numpy())
    np.testing.assert_array_equal(layer.backward(y), x)
