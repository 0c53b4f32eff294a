"""A batch norm folded into the layer before it: against both, in float64 and float32."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from gpu_layers.layers.convolution import Conv2d
from gpu_layers.layers.linear import Linear
from tests.inputs import BFLOAT16, assert_within, normal, unchanged


def conv(dtype="float64", **options):
    return Conv2d(3, 4, 3, stride=2, padding=1, dtype=dtype, seed=1, **options)


def linear(dtype="float64", **options):
    return Linear(3, 4, dtype=dtype, seed=1, **options)


def norm_after(layer, dtype="float64", **options):
    """In evaluation mode, with everything that can be set away from its default."""
    kind = gl.BatchNorm2d if isinstance(layer, Conv2d) else gl.BatchNorm1d
    norm = kind(4, eps=0.01, dtype=dtype, **options)
    for seed, values in enumerate((*layer.parameters.values(), *norm.parameters.values())):
        values[...] = normal(values.shape, seed=seed)
    norm.buffers["running_mean"][...] = normal((4,), seed=9)
    norm.buffers["running_var"][...] = normal((4,), seed=10) ** 2
    return norm.eval()


def shape_for(layer):
    return (5, 3, 7, 6) if isinstance(layer, Conv2d) else (5, 3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"activation": "identity"}], ids=str)
@pytest.mark.parametrize("make", [conv, linear])
def test_one_layer_does_the_work_of_both(make, options, bias):
    layer = make(bias=bias)
    norm = norm_after(layer, **options)
    x = normal(shape_for(layer))
    kept = [*layer.parameters.values(), *norm.parameters.values(), *norm.buffers.values()]
    with unchanged(x, *kept):
        folded = gl.fold_batch_norm(layer, norm)
        expected = norm(layer(x))
        y = folded(x)
    assert type(folded) is type(layer)
    # At most 28 products of numbers below 10, times a scale of at most 10.
    assert_within(y, expected, 30 * 1000 * 2.0**-53)
    dy = normal(y.shape, seed=3)
    assert_within(folded.backward(dy), layer.backward(norm.backward(dy)), 30 * 1000 * 2.0**-53)
    assert list(folded.parameters) == ["weight", "bias"]
    # After passes too.
    again = gl.fold_batch_norm(layer, norm)
    assert (again.parameters["weight"] == folded.parameters["weight"]).all()


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32], ids=str)
@pytest.mark.parametrize("make", [conv, linear])
def test_parameters_are_rounded_once(make, dtype):
    layer = make("float32")
    norm = norm_after(layer, "float32")
    folded = gl.fold_batch_norm(layer, norm)
    exact = make()
    exact_norm = norm_after(exact)
    for ours, theirs in ((exact, layer), (exact_norm, norm)):
        for kind in ("parameters", "buffers"):
            for name, value in getattr(theirs, kind).items():
                getattr(ours, kind)[name][...] = value
    expected = gl.fold_batch_norm(exact, exact_norm)
    for name, value in folded.parameters.items():
        assert value.dtype == np.float32
        assert_within(value, expected.parameters[name], np.abs(expected.parameters[name]) * 2.0**-23)
    x = normal(shape_for(layer), dtype)
    y = folded(x)
    assert y.dtype == dtype
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}[y.dtype.name]
    size = np.abs(expected(x.astype(np.float64)))
    # The result's rounding, and 30 float32 roundings of products below 100.
    assert_within(y, expected(x.astype(np.float64)), size * unit + 30 * 100 * 2.0**-24)


def test_what_is_folded_is_independent():
    layer = linear()
    norm = norm_after(layer)
    folded = gl.fold_batch_norm(layer, norm)
    before = folded.state_dict()
    layer.parameters["weight"][...] = 0
    norm.buffers["running_var"][...] = 0
    for name, value in folded.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    with pytest.raises(RuntimeError, match="backward was called before forward"):
        folded.backward(normal((5, 4)))


@pytest.mark.parametrize(
    ("layer", "norm", "error", "message"),
    [
        (gl.ReLU(), gl.BatchNorm2d(4), TypeError, "^expected a Conv2d or a Linear, got ReLU$"),
        (conv(), gl.BatchNorm1d(4), TypeError, "^expected a BatchNorm2d after a Conv2d, got BatchNorm1d$"),
        (linear(), gl.ReLU(), TypeError, "^expected a BatchNorm1d after a Linear, got ReLU$"),
        (linear(), gl.BatchNorm1d(4), TypeError, "the Linear has dtype float64, the batch norm float32"),
        (linear(), gl.BatchNorm1d(5, dtype="float64"), ValueError, "batch norm takes 5 channels, the layer gives 4"),
        (conv(), gl.BatchNorm2d(4, dtype="float64", channels_last=True), ValueError, "channels on the last axis"),
        (linear(), gl.BatchNorm1d(4, dtype="float64", track_running_stats=False), ValueError, "nothing to fold"),
        (linear(), gl.BatchNorm1d(4, dtype="float64", activation="relu"), ValueError, "applies relu, which cannot"),
    ],
)
def test_what_cannot_be_folded_is_refused(layer, norm, error, message):
    with pytest.raises(error, match=message):
        gl.fold_batch_norm(layer, norm)


CONVOLUTIONS = {
    "linear": (torch.nn.functional.linear, (6, 4), (5, 4), {}),
    "1-D": (torch.nn.functional.conv1d, (6, 4, 3), (2, 4, 9), {}),
    "grouped": (torch.nn.functional.conv2d, (6, 2, 3, 3), (2, 4, 7, 8), {"groups": 2}),
    "depthwise": (torch.nn.functional.conv2d, (4, 1, 3, 3), (2, 4, 7, 8), {"groups": 4}),
    "transposed": (torch.nn.functional.conv_transpose2d, (4, 6, 3, 3), (2, 4, 7, 8), {}),
    "transposed 3-D": (torch.nn.functional.conv_transpose3d, (4, 6, 2, 2, 2), (2, 4, 3, 4, 3), {}),
    "transposed grouped": (torch.nn.functional.conv_transpose1d, (4, 3, 3), (2, 4, 9), {"groups": 2}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_arrays_of_any_convolution(name, has_bias, affine):
    function, shape, input_shape, options = CONVOLUTIONS[name]
    transposed = "transposed" in name
    channels = shape[1] * options.get("groups", 1) if transposed else shape[0]
    weight, x = normal(shape), torch.from_numpy(normal(input_shape, seed=1))
    bias, mean, gamma, beta = (normal((channels,), seed=seed) for seed in range(2, 6))
    var = normal((channels,), seed=6) ** 2 + 0.1
    bias = bias if has_bias else None
    gamma, beta = (gamma, beta) if affine else (None, None)
    folded, shift = gl.fold_batch_norm_arrays(
        weight, bias, mean, var, gamma, beta, eps=0.01, transposed=transposed, groups=options.get("groups", 1)
    )

    def run(weight, bias):
        return function(x, torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias), **options)

    tensors = [None if one is None else torch.from_numpy(one) for one in (mean, var, gamma, beta)]
    expected = torch.nn.functional.batch_norm(run(weight, bias), *tensors, eps=0.01).numpy()
    # Sums of up to 40 products of up to 10, times a scale of up to 10.
    assert_within(run(folded, shift).numpy(), expected, 40 * 100 * 2.0**-52)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32], ids=str)
def test_arrays_are_rounded_once_to_the_dtype_of_the_weight(dtype):
    weight, var = normal((4, 3), dtype), np.array([0.5, 1, 2, 3], np.float32)
    mean = normal((4,), np.float32, seed=1)
    folded, bias = gl.fold_batch_norm_arrays(weight, None, mean, var, eps=0.25)
    scale = 1 / np.sqrt(var.astype(np.float64) + 0.25)
    np.testing.assert_array_equal(folded, (weight.astype(np.float64) * scale[:, None]).astype(dtype))
    np.testing.assert_array_equal(bias, (-mean.astype(np.float64) * scale).astype(dtype))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": np.ones((4, 3), int)}, TypeError, "weight must be float16, .* float64, got int64"),
        ({"weight": [[1.0]]}, TypeError, "expected a numpy.ndarray"),
        ({"weight": np.ones(4)}, ValueError, r"weight does not fit a layer with 1 groups, got shape \[4\]"),
        ({"groups": 3}, ValueError, r"weight does not fit a layer with 3 groups, got shape \[4, 3\]"),
        ({"bias": np.ones(3)}, ValueError, r"bias must have the shape \[4\], got \[3\]"),
        ({"transposed": True}, ValueError, r"running_mean must have the shape \[3\], got \[4\]"),
        ({"gamma": np.ones((4, 1))}, ValueError, r"gamma must have the shape \[4\], got \[4, 1\]"),
        ({"eps": 0}, ValueError, "eps must be positive"),
        ({"groups": 0}, ValueError, "groups must be in 1"),
    ],
)
def test_arrays_that_cannot_be_folded_are_refused(change, error, message):
    arguments = {"weight": np.ones((4, 3)), "bias": None, "running_mean": np.ones(4), "running_var": np.ones(4)}
    with pytest.raises(error, match=message):
        gl.fold_batch_norm_arrays(**(arguments | change))
