"""What every layer can do."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.catalogue import LAYERS, LayerExample
from tests.inputs import assert_same_bits, normal

EXAMPLES = {name: example for name, example in LAYERS.items() if example.inputs == 1}
EXAMPLES["BatchNorm2d without averages"] = LayerExample(gl.BatchNorm2d, (4,), {"track_running_stats": False}, axes=4)
each_layer = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)


def made(example):
    return example.make(np.float32, gl.Generator(1))


def input_of(example):
    return normal((2, 4, 5, 4, 6)[: example.axes], np.float32)


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
@pytest.mark.parametrize("training", [True, False])
def test_backward_needs_a_forward(example, training):
    layer = made(example).train(training)
    with pytest.raises(RuntimeError, match=f"^{type(layer).__name__}.backward was called before forward$"):
        layer.backward(input_of(example))


@each_layer
@pytest.mark.parametrize("training", [True, False])
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
    for name, value in layer.state_dict().items():
        assert_same_bits(value, state[name])
    for name, value in gradients.items():
        assert_same_bits(layer.gradients[name], value)
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


def test_a_bare_layer_says_what_it_lacks():
    with pytest.raises(TypeError, match="Layer defines no forward"):
        gl.Layer()(np.ones(1))
    with pytest.raises(TypeError, match="Layer defines no backward"):
        gl.Layer().backward(np.ones(1))
