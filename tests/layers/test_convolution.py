"""Conv2d against PyTorch, and against the definition of a gradient."""

import numpy as np
import pytest
import torch

from gpu_layers.training import Conv2d
from tests.gradients import transposed
from tests.inputs import DTYPES, UNIT_ROUNDOFF, accumulation_dtype, assert_within, normal, unchanged

# (input shape, out_channels, kernel, stride, padding)
CASES = {
    "plain": ((2, 3, 6, 6), 4, 3, 1, 1),
    "odd_sizes": ((3, 1, 7, 5), 2, (3, 2), 1, 0),
    "stride_leaves_a_rest": ((2, 2, 8, 7), 3, 3, 3, 1),
    "stride_beyond_the_kernel": ((1, 2, 9, 9), 2, 2, 4, 0),
    "padding_beyond_the_kernel": ((1, 1, 3, 3), 2, 2, 1, 3),
    "one_pixel": ((5, 4, 1, 1), 3, 1, 1, 0),
    "kernel_is_the_image": ((2, 3, 4, 5), 2, (4, 5), 1, 0),
}


def _layer(case, dtype, bias=True):
    shape, filters, kernel, stride, padding = CASES[case]
    layer = Conv2d(shape[1], filters, kernel, stride, padding, bias, dtype=accumulation_dtype(dtype), seed=0)
    for number, parameter in enumerate(layer.parameters.values()):
        parameter[...] = normal(parameter.shape, seed=20 + number)
    return layer, shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_torch(case, dtype):
    layer, shape = _layer(case, dtype)
    x = normal(shape, dtype, seed=1)
    exact = torch.nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, dtype=torch.float64
    )
    exact.load_state_dict({name: torch.from_numpy(p.astype(np.float64)) for name, p in layer.state_dict().items()})
    xt = torch.from_numpy(x.astype(np.float64)).requires_grad_()
    yt = exact(xt)
    dy = normal(tuple(yt.shape), dtype, seed=2)
    yt.backward(torch.from_numpy(dy.astype(np.float64)))
    with unchanged(x, dy):
        y, dx = layer(x), layer.backward(dy)
    # A sum of k products below 16 errs by at most k roundings of the accumulation dtype of partial sums below 16 k; in
    # practice these errors go both ways and the sums stay small. k is at most 75 here: 2 * 36 outputs and the bias.
    sums = UNIT_ROUNDOFF[accumulation_dtype(dtype)] * 75 * 16
    for actual, expected in ((y, yt.detach().numpy()), (dx, xt.grad.numpy())):
        assert actual.dtype == dtype
        assert actual.flags.c_contiguous
        assert_within(actual, expected, sums + UNIT_ROUNDOFF[dtype] * 1.01 * np.abs(expected))
    for name, parameter in exact.named_parameters():
        assert layer.gradients[name].dtype == accumulation_dtype(dtype)
        assert_within(layer.gradients[name], parameter.grad.numpy(), sums, name)


@pytest.mark.parametrize("case", CASES)
def test_input_gradient_is_the_transposed_matrix(case):
    layer, shape = _layer(case, np.float64, bias=False)
    image = (1, *shape[1:])
    dy = normal(layer(normal(image)).shape, seed=3)
    # The definition: the convolution of every unit vector, times dy. Each entry sums at most 75 products below 16.
    np.testing.assert_allclose(layer.backward(dy)[0], transposed(layer, shape[1:], dy[0]), rtol=0, atol=2e-13)


def test_too_large_for_half_becomes_infinity():
    layer = Conv2d(1, 1, 1, seed=0)
    layer.parameters["weight"][...] = 2
    y = layer(np.array([60000, -60000, 1, 0], np.float16).reshape(1, 1, 2, 2))
    np.testing.assert_array_equal(y.reshape(-1), np.array([np.inf, -np.inf, 2, 0], np.float16))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((3, 6, 6), np.float32), ValueError, r"expected 4D input \(got 3D input\)"),
        (np.zeros((1, 2, 6, 6), np.float32), ValueError, "expected input with 3 channels, got 2"),
        (np.zeros((1, 3, 6, 6)), TypeError, "float64 input needs a layer of dtype='float64'"),
        (np.zeros((1, 3, 0, 6), np.float32), ValueError, "Kernel size can't be greater than actual input size"),
    ],
)
def test_bad_input(x, error, message):
    layer, _ = _layer("plain", np.float32)
    with pytest.raises(error, match=message):
        layer(x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1, 3), ValueError, "in_channels must be in 1"),
        ((1, 1.0, 3), TypeError, "out_channels must be an integer"),
        ((1, 1, 0), ValueError, "kernel size should be greater than zero"),
        ((1, 1, (3, 3, 3)), ValueError, "kernel_size must be an int, or 2 of them"),
        ((1, 1, 3, 0), ValueError, "stride should be greater than zero"),
        ((1, 1, 3, 1, -1), ValueError, "negative padding is not supported"),
    ],
)
def test_bad_configuration(arguments, error, message):
    with pytest.raises(error, match=message):
        Conv2d(*arguments)


def test_repr_is_like_torch():
    assert repr(Conv2d(1, 2, 3, padding=1)) == (
        "Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=True)"
    )
