"""The container: order, names, modes, states."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from gpu_layers.training import Flatten, Linear, Sequential
from gpu_layers.training.network import dropout_generators, image_classifier
from tests.inputs import normal


def _small(seed=0):
    return Sequential(
        Linear(4, 3, seed=seed), gl.BatchNorm1d(3), gl.ReLU(), gl.Dropout(0.5, generator=gl.Generator(1)), Linear(3, 2)
    )


def test_is_its_layers_one_after_the_other():
    network, x, dy = _small(), normal((5, 4), np.float32), normal((5, 2), np.float32, seed=1)
    network.layers[3].p = 0.0
    y = network(x)
    dx = network.backward(dy)
    exact = torch.nn.Sequential(
        torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU(), torch.nn.Identity(), torch.nn.Linear(3, 2)
    ).double()
    state = {name: torch.from_numpy(value) for name, value in network.state_dict().items()}
    # Training has moved the running averages; the outputs here do not depend on them.
    exact.load_state_dict({name: v.double() if v.is_floating_point() else v for name, v in state.items()})
    xt = torch.from_numpy(x.astype(np.float64)).requires_grad_()
    yt = exact(xt)
    yt.backward(torch.from_numpy(dy.astype(np.float64)))
    # float32 through four layers of a few operations each, values of about 1: some tens of roundings of 6e-8, which
    # batch norm of five samples may scale by 1 / std, about 10.
    np.testing.assert_allclose(y, yt.detach().numpy(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(dx, xt.grad.numpy(), rtol=0, atol=2e-5)
    for name, parameter in exact.named_parameters():
        np.testing.assert_allclose(network.gradients[name], parameter.grad.numpy(), rtol=0, atol=5e-5, err_msg=name)


def test_state_has_torch_names():
    assert list(_small().state_dict()) == [
        "0.weight", "0.bias", "1.weight", "1.bias",
        "1.running_mean", "1.running_var", "1.num_batches_tracked", "4.weight", "4.bias",
    ]  # fmt: skip


def test_parameters_are_the_layers_own_arrays():
    network = _small()
    network.parameters["0.bias"][...] = 7
    np.testing.assert_array_equal(network.layers[0].parameters["bias"], [7, 7, 7])
    network.state_dict()["0.bias"][...] = 8
    np.testing.assert_array_equal(network.layers[0].parameters["bias"], [7, 7, 7])


def test_loads_all_or_nothing():
    source, target = _small(seed=1), _small(seed=2)
    source(normal((5, 4), np.float32))
    state = source.state_dict()
    before = target.state_dict()
    for broken, error, message in (
        ({name: value for name, value in state.items() if name != "4.bias"}, ValueError, r"missing keys \['4.bias'\]"),
        ({**state, "9.weight": state["4.bias"]}, ValueError, r"unexpected keys \['9.weight'\]"),
        ({**state, "4.bias": np.zeros(5, np.float32)}, ValueError, "size mismatch for 4.bias"),
        ({**state, "4.bias": state["4.bias"].astype(np.int64)}, TypeError, "dtype mismatch for 4.bias"),
    ):
        with pytest.raises(error, match=message):
            target.load_state_dict(broken)
        for name, value in target.state_dict().items():
            np.testing.assert_array_equal(value, before[name])
    target.load_state_dict(state)
    for name, value in target.state_dict().items():
        np.testing.assert_array_equal(value, state[name])


def test_mode_reaches_every_layer():
    network = Sequential(_small(), gl.Dropout(0.5))
    network.eval()
    assert not network.training
    assert not any(layer.training for layer in (*network.layers, *network.layers[0].layers))
    network.train()
    assert all(layer.training for layer in (network, *network.layers, *network.layers[0].layers))


def test_nested_names():
    assert "1.0.weight" in Sequential(Flatten(), Sequential(Linear(2, 2))).parameters


def test_to():
    network = _small()
    assert network.to("cpu") is network
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda'"):
        network.to("tpu")


def test_refuses_what_is_no_layer():
    with pytest.raises(TypeError, match="expected a Layer, got int"):
        Sequential(Flatten(), 3)


def test_backward_before_forward():
    with pytest.raises(RuntimeError, match=r"Linear\.backward was called before forward"):
        _small().backward(np.zeros((5, 2), np.float32))


def test_repr_is_like_torch():
    assert repr(Sequential(Sequential(gl.ReLU()), Flatten())) == (
        "Sequential(\n  (0): Sequential(\n    (0): ReLU()\n  )\n  (1): Flatten()\n)"
    )
    assert repr(Sequential()) == "Sequential()"


@pytest.mark.parametrize("placement", ["after", "before"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 9), (2, 5, 4)])
def test_image_classifier_takes_any_image(shape, placement):
    dtype = np.dtype(np.float32)
    network = image_classifier(shape, 3, p=0.5, placement=placement, seed=4, dtype=dtype)
    names = [type(layer).__name__ for layer in network.layers]
    pair = ["ReLU", "Dropout"] if placement == "after" else ["Dropout", "ReLU"]
    assert names[:5] == names[5:10] == ["Conv2d", "BatchNorm2d", *pair, "MaxPool2d"]
    assert names[10:] == ["Flatten", "Linear", "BatchNorm1d", *pair, "Linear"]
    x = normal((4, *shape), np.float32)
    y = network(x)
    assert y.shape == (4, 3)
    assert network.backward(y).shape == x.shape


def test_each_dropout_layer_has_a_stream_of_its_own():
    network = image_classifier((1, 8, 8), 10, p=0.5, placement="after", seed=4, dtype=np.dtype(np.float32))
    generators = dropout_generators(network)
    assert len({generator.seed for generator in generators}) == 3
    network(normal((2, 1, 8, 8), np.float32))
    assert [generator.offset for generator in generators] == [1, 1, 1]
