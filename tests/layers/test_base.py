"""What every layer can do."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.catalogue import LAYERS, LayerExample
from tests.inputs import LAYOUTS, assert_all_same_bits, assert_same_bits, each_dtype, normal, unchanged

EXAMPLES = {name: example for name, example in LAYERS.items() if example.inputs == 1}
EXAMPLES["BatchNorm2d without averages"] = LayerExample(gl.BatchNorm2d, (4,), {"track_running_stats": False}, axes=4)
EXAMPLES |= {
    "Flatten": LayerExample(gl.Flatten, axes=4),
    "Linear": LayerExample(gl.Linear, (4, 4), {"seed": 1}),
    "Conv2d": LayerExample(gl.Conv2d, (4, 4, 3), {"padding": 1, "seed": 1}, axes=4),
}
each_layer = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)


each_mode = pytest.mark.parametrize("training", [True, False])


def made(example, dtype=np.float32):
    return example.make(dtype, gl.Generator(1))


def input_of(example, dtype=np.float32):
    return normal((2, 4, 5, 4, 6)[: example.axes], dtype)


@each_layer
def test_modes(example):
    layer = made(example)
    assert isinstance(layer, gl.Layer)
    assert layer.training is True
    assert layer.eval() is layer
    assert layer.training is False
    assert layer.train() is layer
    assert layer.training is True
    layer.train(np.False_)
    assert layer.training is False


@each_layer
@pytest.mark.parametrize("mode", [1, "train", None])
def test_a_mode_is_a_boolean(example, mode):
    layer = made(example).eval()
    with pytest.raises(TypeError, match="training mode is expected to be boolean"):
        layer.train(mode)
    assert layer.training is False


@each_layer
@each_mode
def test_backward_needs_a_forward(example, training):
    layer = made(example).train(training)
    with pytest.raises(RuntimeError, match=f"^{type(layer).__name__}.backward was called before forward$"):
        layer.backward(input_of(example))


@each_layer
@each_mode
def test_a_forward_that_raised_is_no_forward(example, training):
    layer = made(example).train(training)
    with pytest.raises(TypeError):
        layer(input_of(example).astype(complex))
    with pytest.raises(RuntimeError, match="backward was called before forward"):
        layer.backward(input_of(example))


@each_layer
def test_calling_is_forward(example):
    x = input_of(example)
    assert_same_bits(made(example)(x), made(example).forward(x))


@each_layer
def test_to_the_cpu_keeps_values_and_forgets_the_forward(example):
    layer = made(example)
    layer.backward(layer(input_of(example)))
    state, gradients = layer.state_dict(), dict(layer.gradients)
    assert layer.to("cpu") is layer
    assert_all_same_bits(layer.state_dict(), state)
    assert_all_same_bits(layer.gradients, gradients)
    with pytest.raises(RuntimeError, match="backward was called before forward"):
        layer.backward(input_of(example))


@each_layer
@pytest.mark.parametrize("device", ["gpu", "cuda:0", None, 0])
def test_there_are_two_devices(example, device):
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got "):
        made(example).to(device)


@each_layer
def test_gradients_have_the_keys_of_the_parameters(example):
    layer = made(example)
    layer.backward(layer(input_of(example)))
    assert layer.gradients.keys() == layer.parameters.keys()
    for name, value in layer.parameters.items():
        assert (layer.gradients[name].shape, layer.gradients[name].dtype) == (value.shape, value.dtype)


@each_layer
@each_mode
def test_a_gradient_that_does_not_fit_is_refused_and_changes_nothing(example, training):
    layer = made(example).train(training)
    y = layer(input_of(example))
    dx, gradients = layer.backward(y), dict(layer.gradients)
    for dy, error, message in (
        (y.astype(np.float64), TypeError, "dy must have the output's dtype float32, got float64"),
        (y[:1], ValueError, r"dy must have the output's shape \[2, .*\], got \[1, "),
        (y[None], ValueError, r"dy must have the output's shape \[2, .*\], got \[1, 2, "),
        (y.tolist(), TypeError, r"expected a numpy\.ndarray or cupy\.ndarray, got list"),
        (None, TypeError, r"expected a numpy\.ndarray or cupy\.ndarray, got NoneType"),
    ):
        with pytest.raises(error, match=message):
            layer.backward(dy)
    assert all(layer.gradients[name] is value for name, value in gradients.items())
    assert_same_bits(layer.backward(y), dx)


@each_layer
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_memory_layouts_do_not_change_a_bit(example, dtype, layout):
    layer, other = made(example, dtype), made(example, dtype)
    for one in (layer, other):
        for seed, values in enumerate(one.parameters.values()):
            values[...] = normal(values.shape, seed=seed)
    x = input_of(example, dtype)
    y = layer(x)
    dy = normal(y.shape, dtype, seed=9)
    dx = layer.backward(dy)
    x, dy = layout(x), layout(dy)
    with unchanged(x, dy):
        results = other(x), other.backward(dy)
    for actual, expected in zip(results, (y, dx), strict=True):
        assert_same_bits(actual, expected)
        assert actual.flags.c_contiguous or isinstance(layer, gl.Flatten)
    assert_all_same_bits(other.gradients, layer.gradients)


@each_layer
@each_mode
def test_an_empty_batch_gives_an_empty_result(example, training):
    layer, x = made(example).train(training), input_of(example)
    outputs = layer(x).shape[1:]
    y = layer(x[:0])
    assert_same_bits(y, np.zeros((0, *outputs), np.float32))
    assert_same_bits(layer.backward(y), x[:0])
    assert not any(gradient.any() for gradient in layer.gradients.values())


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("BatchNorm2d", (3, 1e-5, 0.1, True, True, True)),
        ("Dropout", (0.5, False, "inverted")),
        ("ActivationDropout", ("relu", 0.5, "after")),
        ("MaxPool2d", (2, 2, 0, 1, False, False, True)),
        ("AvgPool2d", (2, 2, 0, False, True, None, 1)),
    ],
)
def test_extras_are_keyword_only(kind, arguments):
    with pytest.raises(TypeError, match="positional arguments"):
        getattr(gl, kind)(*arguments)


def test_a_bare_layer_says_what_it_lacks():
    with pytest.raises(TypeError, match="Layer defines no forward"):
        gl.Layer()(np.ones(1))
    with pytest.raises(TypeError, match="Layer defines no backward"):
        gl.Layer().backward(np.ones(1))
