"""The batch norms of a model become those of all processes, and back."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.distributed import SingleProcess
from gpu_layers.training import SGD
from tests.inputs import assert_all_same_bits, assert_same_bits, assert_within, normal

X = normal((6, 3, 4, 5), np.float64)


class Block(gl.Layer):
    """Layers wherever they may be, one of them twice."""

    def __init__(self):
        super().__init__()
        self.norm = gl.BatchNorm2d(3, dtype="float64", activation="relu")
        self.more = [gl.Sequential(gl.BatchNorm2d(3, dtype="float64"), gl.ReLU()), {"one": self.norm}]
        self.ghost = gl.GhostBatchNorm2d(3, 2, dtype="float64")

    def forward(self, x):
        return self.ghost(self.norm(self.more[0](self.norm(x))))

    def backward(self, dy):
        return self.norm.backward(self.more[0].backward(self.norm.backward(self.ghost.backward(dy))))


def test_there_and_back():
    plain, model = Block(), Block()
    engine = SingleProcess()
    norm, parameters = model.norm, dict(model.parameters)
    assert gl.convert_sync_batch_norm(model, engine) is model
    assert model.norm is norm
    assert type(model.norm) is type(model.more[0][0]) is gl.SyncBatchNorm
    assert type(model.ghost) is gl.GhostBatchNorm2d
    assert model.norm.communicator is engine
    assert all(model.parameters[name] is array for name, array in parameters.items())
    for net in (plain, model):
        y = net(X)
        net.backward(y)
        SGD(net.parameters, lr=0.1).step(net.gradients)
    assert_within(model(X), plain(X), 1e-11)
    for name, array in plain.state_dict().items():
        assert_within(model.state_dict()[name], array, 1e-11)
    state = model.state_dict()
    assert gl.revert_sync_batch_norm(model) is model
    assert type(model.norm) is gl.BatchNorm2d
    assert "communicator" not in vars(model.norm)
    assert_all_same_bits(model.state_dict(), state)
    plain.load_state_dict(state)
    assert_same_bits(model.eval()(X), plain.eval()(X))


def test_switches_modes_and_shapes_of_input_stay():
    norm = gl.BatchNorm1d(3, momentum=0.3).eval()
    norm.update_statistics, norm.train_affine = False, False
    gl.convert_sync_batch_norm(norm)
    assert (norm.training, norm.update_statistics, norm.train_affine, norm.momentum) == (False, False, False, 0.3)
    gl.revert_sync_batch_norm(norm)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        norm(X.astype(np.float32))


def test_what_a_forward_saved_is_gone():
    norm = gl.BatchNorm2d(3, dtype="float64")
    norm(X)
    gl.convert_sync_batch_norm(norm)
    with pytest.raises(RuntimeError, match="backward was called before forward"):
        norm.backward(X)


def test_a_converted_layer_is_folded():
    linear, norm = gl.Linear(3, 3, seed=0), gl.BatchNorm1d(3).eval()
    expected = gl.fold_batch_norm(linear, norm).parameters
    gl.convert_sync_batch_norm(norm)
    assert_all_same_bits(gl.fold_batch_norm(linear, norm).parameters, expected)


def test_one_that_was_made_as_such_needs_a_kind():
    model = gl.Sequential(gl.convert_sync_batch_norm(gl.BatchNorm2d(3)), gl.SyncBatchNorm(3))
    with pytest.raises(ValueError, match="was made as a SyncBatchNorm: say by kind="):
        gl.revert_sync_batch_norm(model)
    assert type(model[0]) is gl.SyncBatchNorm
    gl.revert_sync_batch_norm(model, gl.BatchNorm3d)
    assert [type(layer) for layer in model] == [gl.BatchNorm2d, gl.BatchNorm3d]
    with pytest.raises(TypeError, match="kind must be one of BatchNorm1d, BatchNorm2d, BatchNorm3d"):
        gl.revert_sync_batch_norm(model, gl.ReLU)


def test_what_cannot_be_converted_is_refused_and_nothing_is():
    class Own(gl.BatchNorm2d):
        pass

    replaced = gl.BatchNorm2d(3)
    replaced.forward = lambda x: x
    fused = gl.fuse(gl.Sequential(gl.BatchNorm2d(3), gl.MaxPool2d(2)))
    for bad, message in ((Own(3), "Own is a subclass"), (replaced, "forward was replaced"), (fused, "convert first")):
        model = gl.Sequential(gl.BatchNorm2d(3), bad)
        with pytest.raises(TypeError, match=message):
            gl.convert_sync_batch_norm(model)
        assert type(model[0]) is gl.BatchNorm2d
    with pytest.raises(TypeError, match="communicator"):
        gl.convert_sync_batch_norm(gl.BatchNorm2d(3), 1)
    with pytest.raises(ValueError, match="found no layer"):
        gl.convert_sync_batch_norm(object())
