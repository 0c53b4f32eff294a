"""What every layer can do."""

import numpy as np
import pytest

import gpu_layers as gl
from tests.inputs import assert_same_bits, normal

X = normal((2, 3, 4, 4), np.float32)
MAKERS = {
    "Dropout": lambda: gl.Dropout(generator=gl.Generator(1)),
    "Dropout2d": lambda: gl.Dropout2d(generator=gl.Generator(1)),
    "Dropout3d": lambda: gl.Dropout3d(generator=gl.Generator(1)),
    "AlphaDropout": lambda: gl.AlphaDropout(generator=gl.Generator(1)),
    "FeatureAlphaDropout": lambda: gl.FeatureAlphaDropout(generator=gl.Generator(1)),
    "DropPath": lambda: gl.DropPath(0.5, generator=gl.Generator(1)),
    "ActivationDropout": lambda: gl.ActivationDropout("tanh", generator=gl.Generator(1)),
    "ReLU": gl.ReLU,
    "BatchNorm2d": lambda: gl.BatchNorm2d(3),
    "BatchNorm2d without averages": lambda: gl.BatchNorm2d(3, track_running_stats=False),
    "MaxPool2d": lambda: gl.MaxPool2d(2),
    "AvgPool2d": lambda: gl.AvgPool2d(2),
    "AdaptiveMaxPool2d": lambda: gl.AdaptiveMaxPool2d(3),
    "AdaptiveAvgPool2d": lambda: gl.AdaptiveAvgPool2d(3),
    "LPPool2d": lambda: gl.LPPool2d(2, 2),
}
each_layer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@each_layer
def test_modes(make):
    layer = make()
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
def test_a_mode_is_a_boolean(make, mode):
    layer = make().eval()
    with pytest.raises(TypeError, match="training mode is expected to be boolean"):
        layer.train(mode)
    assert layer.training is False


@each_layer
@pytest.mark.parametrize("training", [True, False])
def test_backward_needs_a_forward(make, training):
    layer = make().train(training)
    with pytest.raises(RuntimeError, match=f"^{type(layer).__name__}.backward was called before forward$"):
        layer.backward(X)


@each_layer
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_raised_is_no_forward(make, training):
    layer = make().train(training)
    with pytest.raises(TypeError):
        layer(X.astype(complex))
    with pytest.raises(RuntimeError, match="backward was called before forward"):
        layer.backward(X)


@each_layer
def test_calling_is_forward(make):
    assert_same_bits(make()(X), make().forward(X))


@each_layer
def test_to_the_cpu_keeps_values_and_forgets_the_forward(make):
    layer = make()
    layer.backward(layer(X))
    state, gradients = layer.state_dict(), dict(layer.gradients)
    assert layer.to("cpu") is layer
    for name, value in layer.state_dict().items():
        assert_same_bits(value, state[name])
    for name, value in gradients.items():
        assert_same_bits(layer.gradients[name], value)
    with pytest.raises(RuntimeError, match="backward was called before forward"):
        layer.backward(X)


@each_layer
@pytest.mark.parametrize("device", ["gpu", "cuda:0", None, 0])
def test_there_are_two_devices(make, device):
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got "):
        make().to(device)


@each_layer
def test_gradients_have_the_keys_of_the_parameters(make):
    layer = make()
    layer.backward(layer(X))
    assert layer.gradients.keys() == layer.parameters.keys()
    for name, value in layer.parameters.items():
        assert (layer.gradients[name].shape, layer.gradients[name].dtype) == (value.shape, value.dtype)


def test_a_bare_layer_says_what_it_lacks():
    with pytest.raises(TypeError, match="Layer defines no forward"):
        gl.Layer()(X)
    with pytest.raises(TypeError, match="Layer defines no backward"):
        gl.Layer().backward(X)
