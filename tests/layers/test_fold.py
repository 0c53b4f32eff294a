"""A batch norm folded into the layer before it: against both, in float64 and float32."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.layers.convolution import Conv2d
from gpu_layers.layers.linear import Linear
from tests.inputs import BFLOAT16, assert_within, normal, unchanged

pytestmark = pytest.mark.filterwarnings("error")


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


@pytest.mark.parametrize("make", [conv, linear])
@pytest.mark.parametrize("kind", ["SyncBatchNorm", "Ghost"])
def test_relatives_of_batch_norm_evaluate_alike(make, kind):
    layer = make()
    plain = norm_after(layer)
    options = {"eps": 0.01, "dtype": "float64"}
    if kind == "Ghost":
        norm = getattr(gl, f"Ghost{type(plain).__name__}")(4, 2, **options)
    else:
        norm = gl.SyncBatchNorm(4, **options)
    norm.load_state_dict(plain.state_dict())
    for name, value in gl.fold_batch_norm(layer, norm).parameters.items():
        np.testing.assert_array_equal(value, gl.fold_batch_norm(layer, plain).parameters[name])


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
