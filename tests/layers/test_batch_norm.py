"""Batch norm layers: running statistics, modes, state and checks; their arithmetic is proved with the ops."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from gpu_layers.runtime.backend import use_executor
from tests.inputs import (
    BFLOAT16,
    UNIT_ROUNDOFF,
    NoLaunch,
    accumulation_dtype,
    assert_all_same_bits,
    assert_same_bits,
    assert_within,
    each_dtype,
    normal,
    to_channels_first,
    to_channels_last,
    unchanged,
)

each_shape = pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("BatchNorm1d", (7, 3)),
        ("BatchNorm1d", (4, 3, 5)),
        ("BatchNorm2d", (3, 3, 5, 2)),
        ("BatchNorm3d", (2, 3, 3, 1, 5)),
    ],
    ids=str,
)


def make(kind, dtype=np.float32, **arguments):
    """Ours, and torch's in float64."""
    ours = getattr(gl, kind)(3, **arguments, dtype=accumulation_dtype(np.dtype(dtype)))
    arguments = {name: value for name, value in arguments.items() if name != "channels_last"}
    return ours, getattr(torch.nn, kind)(3, **arguments, dtype=torch.float64)


def batches(shape, dtype):
    """Batches of other sizes, means and spreads; the third is empty."""
    for seed, samples in enumerate((shape[0], 2, 0, shape[0] + 1)):
        yield (normal((samples, *shape[1:]), seed=seed) * (seed + 1) + seed).astype(dtype)


@each_shape
@each_dtype
@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0, 0.37])
def test_running_statistics_are_torchs(kind, shape, dtype, momentum):
    ours, theirs = make(kind, dtype, momentum=momentum)
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    largest = 1.0
    for steps, x in enumerate(batches(shape, dtype), 1):
        largest = max(largest, np.abs(x.astype(np.float64)).max(initial=0))
        ours(x)
        theirs(torch.from_numpy(x.astype(np.float64)))
        assert ours.buffers["num_batches_tracked"] == theirs.num_batches_tracked.item() == steps
        # A step rounds both factors and both products, the sum, and the batch's value (twice): at most 7 u.
        for name, size in (("running_mean", largest), ("running_var", 2 * largest**2)):
            assert_within(ours.buffers[name], getattr(theirs, name).numpy(), 2 * 7 * steps * u * size, name)
    before = ours.state_dict()
    ours.eval()(x)
    assert_all_same_bits(ours.state_dict(), before)


@each_shape
@each_dtype
@pytest.mark.parametrize("channels_last", [False, True])
def test_each_mode_is_its_op(kind, shape, dtype, channels_last):
    layer, _ = make(kind, dtype, channels_last=channels_last, eps=0.01)
    for seed, values in enumerate(layer.parameters.values()):
        values[...] = normal((3,), seed=seed)
    weight, bias = layer.parameters.values()
    convert = to_channels_last if channels_last else np.copy
    x, dy = convert(normal(shape, dtype)), convert(normal(shape, dtype, seed=1))
    options = {"eps": 0.01, "channels_last": channels_last}
    for training in (True, False):
        layer.train(training)
        if training:
            y, saved = gl.ops.batch_norm_forward(x, weight, bias, **options)
            gradients = gl.ops.batch_norm_backward(dy, saved)
        else:
            statistics = (layer.buffers["running_mean"], layer.buffers["running_var"])
            y, saved = gl.ops.batch_norm_inference(x, *statistics, weight, bias, **options)
            gradients = gl.ops.batch_norm_inference_backward(dy, saved)
        with unchanged(x, dy, weight, bias):
            assert_same_bits(layer(x), y)
            dx = layer.backward(dy)
        actual = (dx, layer.gradients["weight"], layer.gradients["bias"])
        assert_all_same_bits(actual, gradients)
        assert layer.gradients.keys() == layer.parameters.keys()
        assert all(value.dtype == accumulation_dtype(dtype) for value in layer.gradients.values())


@each_shape
def test_a_whole_training_step_is_torchs(kind, shape):
    ours, theirs = make(kind, np.float64, eps=0.1)
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        x, dy = normal(shape) + 2, normal(shape, seed=1)
        leaf = torch.from_numpy(x).requires_grad_()
        theirs.zero_grad()
        y = theirs(leaf)
        y.backward(torch.from_numpy(dy))
        # Fewer than a hundred terms and values of order 1 in float64 on both sides.
        bound = 1e4 * 2.0**-53
        assert_within(ours(x), y.detach().numpy(), bound)
        assert_within(ours.backward(dy), leaf.grad.numpy(), bound)
        for name, parameter in theirs.named_parameters():
            assert_within(ours.gradients[name], parameter.grad.numpy(), bound)


@each_shape
def test_without_running_statistics_evaluation_uses_the_batch(kind, shape):
    layer, theirs = make(kind, np.float64, track_running_stats=False)
    x, dy = normal(shape) * 3 + 5, normal(shape, seed=1)
    expected = (layer(x), layer.backward(dy))
    layer.eval()
    assert_same_bits(layer(x), expected[0])
    assert_same_bits(layer.backward(dy), expected[1])
    assert_within(expected[0], theirs.eval()(torch.from_numpy(x)).detach().numpy(), 1e4 * 2.0**-53)
    with pytest.raises(
        ValueError, match=r"^Expected more than 1 value per channel when training, got input size \[1, 3"
    ):
        layer(np.ones((1, 3, *(1 for _ in shape[2:]))))


def test_one_value_a_channel_is_enough_in_evaluation():
    layer = gl.BatchNorm1d(3, eps=1.0).eval()
    np.testing.assert_array_equal(layer(np.full((1, 3), 2, np.float32)), np.full((1, 3), np.float32(2**0.5)))


@each_shape
@each_dtype
def test_an_empty_batch_is_counted_and_changes_no_average(kind, shape, dtype):
    layer, _ = make(kind, dtype)
    x = np.zeros((0, *shape[1:]), dtype)
    for training in (True, False):
        layer.train(training)
        assert_same_bits(layer(x), x)
        assert_same_bits(layer.backward(x), x)
        for gradient in layer.gradients.values():
            assert_same_bits(gradient, np.zeros(3, accumulation_dtype(dtype)))
    assert layer.buffers["num_batches_tracked"] == 1
    assert layer.buffers["running_mean"].tolist() == [0, 0, 0]
    assert layer.buffers["running_var"].tolist() == [1, 1, 1]


def test_channels_last_of_a_plain_matrix_is_the_same():
    x = normal((6, 3), np.float32)
    assert_same_bits(gl.BatchNorm1d(3, channels_last=True)(x), gl.BatchNorm1d(3)(x))


def test_channels_last_in_a_layer():
    x = normal((4, 3, 5, 2))
    first, last = (gl.BatchNorm2d(3, channels_last=side, dtype="float64") for side in (False, True))
    # 40 terms in two orders, in float64.
    assert_within(to_channels_first(last(to_channels_last(x))), first(x), 1e3 * 2.0**-53)
    assert_within(last.buffers["running_var"], first.buffers["running_var"], 1e3 * 2.0**-53)


def test_backward_repeats_and_assigns():
    layer = gl.BatchNorm1d(3, dtype="float64")
    layer(normal((7, 3)))
    dy = normal((7, 3), seed=1)
    first, gradients = layer.backward(dy), layer.gradients
    kept = {name: value.copy() for name, value in gradients.items()}
    assert_same_bits(layer.backward(dy), first)
    assert_all_same_bits(layer.gradients, kept)
    layer.backward(2 * dy)
    for name, value in kept.items():
        assert_same_bits(layer.gradients[name], 2 * value)
        assert_same_bits(gradients[name], value)


def test_backward_keeps_to_the_mode_of_its_forward():
    layer, other = gl.BatchNorm1d(3, dtype="float64"), gl.BatchNorm1d(3, dtype="float64")
    x, dy = normal((7, 3)), normal((7, 3), seed=1)
    layer(x)
    other(x)
    assert_same_bits(layer.eval().backward(dy), other.backward(dy))


# State.

CONFIGURATIONS = [
    {},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"momentum": None, "eps": 1e-3},
    {"affine": False, "track_running_stats": False},
]
each_configuration = pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)


@each_shape
@each_configuration
def test_state_has_torchs_names_values_and_repr(kind, shape, arguments):
    ours, theirs = make(kind, **arguments)
    assert repr(ours) == repr(theirs)
    expected = theirs.state_dict()
    actual = ours.state_dict()
    assert list(actual) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value.numpy())
        assert (actual[name].dtype == np.int64) == (value.dtype == torch.int64)
    assert list(ours.parameters) == [name for name, _ in theirs.named_parameters()]
    ours(normal(shape, np.float32))
    ours.backward(normal(shape, np.float32))
    assert list(ours.gradients) == list(ours.parameters)


def test_repr_shows_extras():
    layer = gl.BatchNorm2d(3, channels_last=True, dtype="float64")
    assert repr(layer).endswith("track_running_stats=True, channels_last=True, dtype='float64')")


def test_state_comes_from_torch_and_goes_back():
    theirs = torch.nn.BatchNorm1d(3)
    for seed in range(3):
        theirs(torch.from_numpy(normal((5, 3), np.float32, seed=seed)))
    torch.nn.init.normal_(theirs.weight)
    layer = gl.BatchNorm1d(3)
    layer.load_state_dict({name: value.numpy() for name, value in theirs.state_dict().items()})
    x = normal((5, 3), np.float32, seed=9)
    # Two float32 evaluations of one formula, a handful of roundings each, of values below 10.
    assert_within(layer.eval()(x), theirs.eval()(torch.from_numpy(x)).detach().numpy(), 10 * 10 * 2.0**-24)
    back = torch.nn.BatchNorm1d(3)
    back.load_state_dict({name: torch.from_numpy(value) for name, value in layer.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), back.state_dict().values(), strict=True))


def test_state_is_copied_both_ways():
    layer, other = gl.BatchNorm1d(3), gl.BatchNorm1d(3)
    x = normal((5, 3), np.float32)
    layer(x)
    state = layer.state_dict()
    before = {name: value.copy() for name, value in state.items()}
    other.load_state_dict(state)
    parameters = dict(other.parameters)
    layer(x)
    other(x)
    assert_all_same_bits(state, before)
    # Loading fills the arrays that an optimizer may hold.
    assert all(other.parameters[name] is value for name, value in parameters.items())
    assert_all_same_bits(other.state_dict(), layer.state_dict())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": None}, ValueError, r"missing keys \['weight'\]"),
        ({"more": np.ones(3)}, ValueError, r"unexpected keys \['more'\]"),
        ({"bias": np.ones(4, np.float32)}, ValueError, r"size mismatch for bias: .*\[4\].*\[3\]"),
        ({"bias": np.ones((3, 1), np.float32)}, ValueError, "size mismatch for bias"),
        (
            {"running_var": np.ones(3, int)},
            TypeError,
            "dtype mismatch for running_var: BatchNorm1d has float32, got int64",
        ),
        ({"running_mean": np.ones(4, np.float32)}, ValueError, r"size mismatch for running_mean: .*\[4\].*\[3\]"),
        ({"running_mean": None, "mean": np.ones(3)}, ValueError, r"\['running_mean'\], unexpected keys \['mean'\]"),
        ({"running_var": torch.ones(3) * 1j}, TypeError, "dtype mismatch for running_var: .* got complex64"),
        ({"running_var": "ones"}, (TypeError, ValueError), "running_var"),
        ({"num_batches_tracked": np.ones(1, np.int64)}, ValueError, "size mismatch for num_batches_tracked"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(change, error, message):
    layer = gl.BatchNorm1d(3)
    state = {name: value + 1 for name, value in layer.state_dict().items()} | change
    state = {name: value for name, value in state.items() if value is not None}
    with unchanged(*layer.parameters.values(), *layer.buffers.values()), pytest.raises(error, match=message):
        layer.load_state_dict(state)


# Bad input.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "x", "error", "message"),
    [
        ("BatchNorm2d", np.ones((2, 3, 4), np.float32), ValueError, r"^expected 4D input \(got 3D input\)$"),
        ("BatchNorm2d", np.ones((1, 2, 3, 4, 4), np.float32), ValueError, r"^expected 4D input \(got 5D input\)$"),
        ("BatchNorm3d", np.ones((2, 3, 4, 4), np.float32), ValueError, r"^expected 5D input \(got 4D input\)$"),
        ("BatchNorm1d", np.ones((2, 3, 4, 4), np.float32), ValueError, r"^expected 2D or 3D input \(got 4D input\)$"),
        ("BatchNorm1d", np.ones(3, np.float32), ValueError, r"^expected 2D or 3D input \(got 1D input\)$"),
        ("BatchNorm1d", np.array(3, np.float32), ValueError, r"^expected 2D or 3D input \(got 0D input\)$"),
        ("BatchNorm1d", np.ones((2, 4), np.float32), ValueError, r"^running_mean should contain 4 elements not 3$"),
        (
            "BatchNorm2d",
            np.ones((3, 2, 2, 2), np.float32),
            ValueError,
            r"^running_mean should contain 2 elements not 3$",
        ),
        (
            "BatchNorm1d",
            np.ones((2, 3)),
            TypeError,
            "^float64 input needs a layer of dtype='float64', got a layer of float32$",
        ),
        (
            "BatchNorm1d",
            np.ones((2, 3), int),
            TypeError,
            "^input must be float16, bfloat16, float32 or float64, got int64",
        ),
        ("BatchNorm2d", [[1.0]], TypeError, "^expected a numpy.ndarray or cupy.ndarray, got list$"),
        (
            "BatchNorm2d",
            torch.ones(2, 3, 4),
            TypeError,
            r"^expected a numpy.ndarray or cupy.ndarray, got torch\.Tensor$",
        ),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(training, kind, x, error, message):
    layer = getattr(gl, kind)(3).train(training)
    with unchanged(*layer.parameters.values(), *layer.buffers.values()), pytest.raises(error, match=message):
        layer(x)
    with pytest.raises(RuntimeError, match=f"{kind}.backward was called before forward"):
        layer.backward(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "buffer", "error", "message"),
    [
        ("running_mean", np.zeros(1, np.float32), ValueError, r"running_mean should have the shape \[3\], got \[1\]"),
        (
            "running_var",
            np.ones((3, 1), np.float32),
            ValueError,
            r"running_var should have the shape \[3\], got \[3, 1",
        ),
        ("running_var", np.ones(3), TypeError, "running_var must be float32, got float64"),
        ("running_mean", np.ones(3, np.float16), TypeError, "running_mean must be float32, got float16"),
        ("num_batches_tracked", np.zeros(1, np.int64), ValueError, r"num_batches_tracked should have the shape \[\]"),
        ("num_batches_tracked", np.zeros((), np.float32), TypeError, "num_batches_tracked must be int64, got float32"),
        ("running_mean", [0.0] * 3, TypeError, "expected a numpy.ndarray or cupy.ndarray, got list"),
    ],
)
@pytest.mark.parametrize(
    "make",
    [gl.BatchNorm1d, lambda channels: gl.GhostBatchNorm1d(channels, 2), gl.SyncBatchNorm],
    ids=["plain", "ghost", "sync"],
)
def test_running_statistics_that_do_not_fit_are_refused_and_nothing_is_updated(
    make, training, name, buffer, error, message
):
    layer = make(3).train(training)
    layer.buffers[name] = buffer
    arrays = [one for one in layer.buffers.values() if isinstance(one, np.ndarray)]
    for options in ({}, {"mask": np.ones(5, bool)}):
        with unchanged(*arrays), use_executor(NoLaunch()), pytest.raises(error, match=message):
            layer(normal((5, 3), np.float32), **options)


@pytest.mark.parametrize("padded", [{}, {"mask": np.ones((5, 4), bool)}], ids=["whole", "padded"])
@pytest.mark.parametrize("uses_batch", [True, False])
@pytest.mark.parametrize(
    "make",
    [gl.BatchNorm1d, lambda channels: gl.GhostBatchNorm1d(channels, 2), gl.SyncBatchNorm],
    ids=["plain", "ghost", "sync"],
)
def test_what_goes_with_x_is_checked_before_anything_is_launched(make, uses_batch, padded):
    for name, value, error, message in (
        ("residual", np.ones((5, 3, 3), np.float32), ValueError, "^residual must have the input's shape"),
        ("residual", np.ones((5, 3, 4)), TypeError, "^residual must have the input's dtype float32, got float64$"),
        ("residual", [1.0], TypeError, "^expected a numpy.ndarray or cupy.ndarray, got list$"),
        ("weight", np.ones(4, np.float32), ValueError, "^gamma should contain 3 elements not 4$"),
        ("bias", np.ones(3), TypeError, "^beta must be float32 for float32 input, got float64$"),
    ):
        layer = make(3)
        layer.use_batch_statistics = uses_batch
        options = {**padded, "residual": value} if name == "residual" else padded
        if name != "residual":
            layer.parameters[name] = value
        with use_executor(NoLaunch()), pytest.raises(error, match=message):
            layer(normal((5, 3, 4), np.float32), **options)
        assert layer.buffers["num_batches_tracked"] == 0


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32], ids=str)
def test_a_float64_layer_takes_float64_only(dtype):
    layer = gl.BatchNorm1d(3, dtype="float64")
    with pytest.raises(TypeError, match="input needs a layer of dtype='float32', got a layer of float64"):
        layer(np.ones((2, 3), dtype))
    assert layer.buffers["num_batches_tracked"] == 0


def test_the_words_for_a_wrong_channel_count_name_what_the_layer_has():
    for arguments, name in (
        ({"track_running_stats": False}, "weight"),
        ({"track_running_stats": False, "affine": False}, "num_features"),
    ):
        with pytest.raises(ValueError, match=f"^{name} should contain 4 elements not 3$"):
            gl.BatchNorm1d(3, **arguments)(np.ones((2, 4), np.float32))


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)])
def test_one_value_a_channel_is_refused_in_training_and_changes_nothing(shape):
    layer = gl.BatchNorm1d(3)
    with (
        unchanged(*layer.buffers.values()),
        pytest.raises(
            ValueError, match=r"^Expected more than 1 value per channel when training, got input size \[1, 3"
        ),
    ):
        layer(np.ones(shape, np.float32))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_features": -1}, ValueError, "num_features must be in 0"),
        ({"num_features": 3.0}, TypeError, "num_features must be an integer, got float"),
        ({"num_features": None}, TypeError, "num_features must be an integer, got NoneType"),
        ({"eps": 0}, ValueError, "^batch_norm eps must be positive, but got 0$"),
        ({"eps": -1}, ValueError, "^batch_norm eps must be positive, but got -1$"),
        ({"eps": float("nan")}, ValueError, "^batch_norm eps must be positive, but got nan$"),
        ({"eps": "1e-5"}, TypeError, "eps must be a number, got str"),
        ({"eps": 2.0**-151}, ValueError, r"^batch_norm eps must be a positive float32 number, .* becomes 0\.0$"),
        ({"eps": 1e39}, ValueError, "^batch_norm eps must be a positive float32 number, .* becomes inf$"),
        ({"eps": 1e-330, "dtype": "float64"}, ValueError, "^batch_norm eps must be positive, but got 0.0"),
        ({"momentum": float("-inf")}, ValueError, "^momentum must be finite, got -inf$"),
        ({"momentum": float("nan")}, ValueError, "^momentum must be finite, got nan$"),
        ({"momentum": "0.1"}, TypeError, "momentum must be a number, got str"),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be 'float32', or 'float64' for float64 input .*, got bfloat16"),
        ({"dtype": np.float16}, TypeError, "dtype must be 'float32'"),
        ({"dtype": None}, TypeError, "dtype must be 'float32', or .*, got None"),
        ({"dtype": "int32"}, TypeError, "dtype must be 'float32'"),
        ({"dtype": "float33"}, TypeError, "dtype must be 'float32', or .*, got float33$"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        gl.BatchNorm2d(**({"num_features": 3} | arguments))


@pytest.mark.parametrize("dtype", ["float64", np.float64, np.dtype("float64"), float])
def test_any_spelling_of_a_dtype_will_do(dtype):
    layer = gl.BatchNorm1d(3, dtype=dtype)
    assert {value.dtype for value in layer.parameters.values()} == {np.dtype(np.float64)}
    assert layer(np.array([[1.0, 2, 3], [3, 2, 1]])).dtype == np.float64
