"""Arrays on a GPU that is not the current one, and at addresses that are no multiples of an element."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers import ops
from gpu_layers.core.cuda import import_cupy
from gpu_layers.runtime.copying import natural
from tests.inputs import BFLOAT16, assert_same_bits, normal

pytestmark = pytest.mark.gpu
X = normal((4, 3, 8, 8), np.float32)


@pytest.fixture
def other():
    """The second GPU, while the first one is current."""
    cupy = import_cupy()
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("GPU: there is one, and this needs two")
    return cupy.cuda.Device(1)


def on(device, make):
    with device:
        return make(import_cupy())


def _reset(layer, x):
    layer(x)
    layer.reset_running_stats()
    return layer.buffers


def _made_anew(layer, x):
    layer.buffers.clear()
    layer.reset_running_stats()
    return layer.buffers


def _loaded(layer, x):
    layer(x)
    layer.load_state_dict(layer.state_dict())
    return layer.state_dict()


def _recalibrated(layer, x):
    gl.recalibrate(layer, [x])
    return layer.buffers


def _deferred(layer, x):
    layer.deferred = True
    layer(x)
    assert bool(layer.pending_is_finite())
    layer.commit()
    return layer.buffers


def assert_close(found, expected):
    """Kernels add statistics and products in another order than NumPy; of the largest result that is 2**-16 at most."""
    found, expected = found.get().astype(np.float64), expected.astype(np.float64)
    np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() * 2**-16)


@pytest.mark.parametrize("use", [_reset, _made_anew, _loaded, _recalibrated, _deferred])
def test_the_state_of_a_layer_stays_on_its_device(other, use):
    x = on(other, lambda cupy: cupy.asarray(X))
    found = use(on(other, lambda cupy: gl.BatchNorm2d(3).to("cuda")), x)
    expected = use(gl.BatchNorm2d(3), X)
    for name, value in expected.items():
        assert found[name].data.device_id == 1
        assert_close(found[name], value)


def test_a_generator_stays_on_its_device(other):
    x = on(other, lambda cupy: cupy.asarray(X))
    layer = gl.Dropout(0.5, generator=on(other, lambda cupy: gl.CudaGraphGenerator(3)))
    expected = gl.Dropout(0.5, generator=gl.Generator(3))
    for _ in range(2):
        assert_same_bits(layer(x).get(), expected(X))
    assert layer.generator.offset == 2


def test_a_capture_refuses_arrays_of_another_device(other):
    x, layer = on(other, lambda cupy: (cupy.asarray(X), gl.BatchNorm2d(3).to("cuda")))
    with pytest.raises(RuntimeError, match=r"of one GPU, 0, .* got arrays on 1"):
        gl.capture(lambda: layer(x))
    assert int(layer.buffers["num_batches_tracked"]) == 0
    graph = on(other, lambda cupy: gl.capture(lambda: layer(x)))
    assert_close(graph.replay(), gl.BatchNorm2d(3)(X))


def off_by_a_byte(values):
    cupy = import_cupy()
    memory = cupy.zeros(values.nbytes + 1, np.uint8)
    memory[1:] = cupy.asarray(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
    return cupy.ndarray(values.shape, values.dtype, memory.data + 1)


IDS = np.array([7, 3, 2**40, 0])
HALF = X.astype(BFLOAT16)
POOLED, SAVED = ops.max_pool_forward(X, (2, 2))
INDICES = ops.max_pool_indices(SAVED)


def _batch_norm(weight, running_mean, running_var):
    layer = gl.BatchNorm2d(3)
    layer.parameters["weight"] = weight
    layer.buffers |= {"running_mean": running_mean, "running_var": running_var}
    if not isinstance(weight, np.ndarray):
        cupy = import_cupy()
        layer.parameters["bias"] = cupy.asarray(layer.parameters["bias"])
        layer.buffers["num_batches_tracked"] = cupy.asarray(layer.buffers["num_batches_tracked"])
    return layer


def _statistics(weight, running_mean, running_var, x):
    layer = _batch_norm(weight, running_mean, running_var)
    y = layer(x)
    results = [y, layer.backward(natural(x) ** 2), *(natural(one).copy() for one in (running_mean, running_var))]
    layer.reset_running_stats()
    return [*results, layer.eval()(x)]


def _state(x, **arrays):
    layer = gl.BatchNorm2d(3) if isinstance(x, np.ndarray) else gl.BatchNorm2d(3).to("cuda")
    layer.load_state_dict(arrays, strict=False)
    return [layer.eval()(x)]


OF_CHANNELS = {name: normal((3,), np.float32, seed) ** 2 for seed, name in enumerate(("running_mean", "running_var"))}
AT_ODD_ADDRESSES = {
    "sample_ids": (lambda x, ids: ops.dropout_forward(x, 0.5, 1, 2, sample_ids=ids)[:1], (X, IDS)),
    "bias": (lambda x, bias: ops.dropout_add_forward(x, x, 0.5, 1, 2, bias=bias)[:1], (HALF, HALF[0, 0, 0])),
    "unpool": (lambda y, at: ops.max_unpool_forward(y, at, (8, 8), check=False)[:1], (POOLED, INDICES)),
    "statistics": (_statistics, (np.ones(3, np.float32), *OF_CHANNELS.values(), X)),
    "state": (lambda x, mean, var: _state(x, running_mean=mean, running_var=var), (X, *OF_CHANNELS.values())),
    "Linear": (lambda x: [_multiplied(gl.Linear(8, 8, seed=0), x)], (X[0, 0],)),
    "Conv2d": (lambda x: [_multiplied(gl.Conv2d(3, 3, 3, padding=1, seed=0), x)], (X,)),
}


def _multiplied(layer, x):
    layer = layer if isinstance(x, np.ndarray) else layer.to("cuda")
    return layer.backward(layer(x))


@pytest.mark.parametrize("name", AT_ODD_ADDRESSES)
def test_arrays_at_odd_addresses_are_copied(name):
    call, inputs = AT_ODD_ADDRESSES[name]
    expected = call(*(values.copy() for values in inputs))
    found = call(*map(off_by_a_byte, inputs))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


def test_two_arguments_of_other_names_reach_a_placed_function():
    """A function that is run on the device of its first argument takes it by name too."""
    y, saved = ops.ghost_batch_norm_forward(X, None, None, bounds=(0, 2, 4))
    for one, two in zip(
        ops.ghost_batch_norm_backward(dy=y, saved=saved), ops.ghost_batch_norm_backward(y, saved), strict=True
    ):
        assert_same_bits(one, two)
