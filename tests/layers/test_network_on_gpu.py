"""A network that is built, then moved to a GPU: its optimizer follows, states come from wherever, statistics stay."""

import copy
import io
from functools import partial

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.core.cuda import import_cupy
from gpu_layers.training import SGD
from tests.inputs import assert_same_bits, normal

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # CuPy's warnings are not ours


def network():
    return gl.Sequential(gl.Linear(3, 4, seed=1), gl.BatchNorm1d(4), gl.ReLU())


def test_a_network_on_a_gpu():
    cupy = import_cupy()
    layer = network()
    optimizer = SGD(layer.parameters, 0.1, momentum=0.9)
    layer[1].parameters["weight"] = layer[0].parameters["bias"]
    layer.to("cuda")
    assert layer[1].parameters["weight"] is layer[0].parameters["bias"]
    gradients = {name: cupy.ones_like(value) for name, value in layer.parameters.items()}
    start = layer.state_dict()
    optimizer.step(gradients)
    for name, value in optimizer.state_dict().items():
        assert name == "steps" or isinstance(value, cupy.ndarray)
    for name, value in layer.parameters.items():
        assert_same_bits(value.get(), start[name].get() - np.float32(0.1))
    with pytest.raises(TypeError, match="make it after the move"):
        SGD(network().parameters, 0.1).step(gradients | {"1.weight": gradients["0.bias"]})
    state = {name: normal(value.shape, value.dtype, seed=9) for name, value in layer.state_dict().items()}
    state["1.num_batches_tracked"] = np.array(12)
    state["1.weight"] = state["0.bias"]
    buffer = io.BytesIO()
    np.savez(buffer, **state)
    for given in (
        state,
        {name: cupy.asarray(value) for name, value in state.items()},
        {name: cupy.asarray(value.astype(np.float16)) for name, value in state.items()},
        cupy.load(io.BytesIO(buffer.getvalue())),
    ):
        for target in (layer, gl.Sequential(*network())):
            target.load_state_dict(given)
            for name, value in target.state_dict().items():
                expected = np.asarray(given[name].get() if isinstance(given[name], cupy.ndarray) else given[name])
                assert_same_bits(
                    value.get() if isinstance(value, cupy.ndarray) else value, expected.astype(value.dtype)
                )
    for make in (gl.BatchNorm1d, partial(gl.GhostBatchNorm1d, group_size=2), gl.SyncBatchNorm):
        norm = make(3).to("cuda")
        buffers = dict(norm.buffers)
        for value in buffers.values():
            value.fill(5)
        norm.reset_running_stats()
        for name, value in make(3).buffers.items():
            assert norm.buffers[name] is buffers[name]
            assert_same_bits(norm.buffers[name].get(), value)
        late = make(3, track_running_stats=False).to("cuda")
        late.track_running_stats = True
        late.reset_running_stats()
        assert all(isinstance(value, cupy.ndarray) for value in late.buffers.values())


def test_repeated_calls_on_a_gpu():
    cupy = import_cupy()
    linear, dropout = gl.Linear(3, 3, seed=1), gl.Dropout(0.5, generator=gl.CudaGraphGenerator(4))
    tied = gl.Linear(3, 3, bias=False)
    tied.parameters["weight"] = linear.parameters["weight"].T
    network = gl.Sequential(linear, dropout, linear, dropout, tied)
    plain = copy.deepcopy(gl.Sequential(linear, gl.ReLU(), linear, gl.ReLU(), tied))
    for place, offset in ((1, 0), (3, 1)):
        plain[place] = gl.Dropout(0.5, generator=gl.Generator(4, offset))
    plain[4].parameters["weight"] = plain[0].parameters["weight"].T
    network.to("cuda")
    optimizers = SGD(network.parameters, 0.1), SGD(plain.parameters, 0.1)
    x = normal((5, 3), np.float32)
    for step in range(2):
        for place in (1, 3):
            plain[place].generator.set_state({"seed": 4, "offset": 2 * step + place // 2})
        y, expected = network(cupy.asarray(x)), plain(x)
        dx, expected_dx = network.backward(cupy.asarray(x)), plain.backward(x)
        # Products of 3 and sums over 5, taken in another order: some tens of roundings of 6e-8, of values below 10.
        np.testing.assert_allclose(y.get(), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(dx.get(), expected_dx, rtol=0, atol=1e-5)
        for one, optimizer in zip((network, plain), optimizers, strict=True):
            optimizer.step(one.gradients)
        assert list(network.gradients) == ["0.weight", "0.bias"]
        for name, value in plain.parameters.items():
            np.testing.assert_allclose(network.parameters[name].get(), value, rtol=0, atol=1e-5)
    assert_same_bits(tied.parameters["weight"].get(), linear.parameters["weight"].get().T)
