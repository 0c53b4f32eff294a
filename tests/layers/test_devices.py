"""Arrays on a GPU that is not the current one, and at addresses that are no multiples of an element."""

import contextlib

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers import ops
from gpu_layers.core.cuda import array_module, import_cupy, place_of
from gpu_layers.distributed import SingleProcess
from gpu_layers.runtime.copying import natural
from gpu_layers.training import SGD, Flatten, softmax_cross_entropy
from gpu_layers.training.sums import added
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


def _like(x, values):
    """On the device of x, whichever is current."""
    with place_of(x):
        return array_module(x).asarray(values)


def _uncertain(made, x):
    model = made(gl.Dropout(0.5, inplace=True, generator=gl.Generator(3)), gl.BatchNorm2d(3))
    return dict(zip(("mean", "variance"), gl.mc_dropout(model, x, passes=3), strict=True))


def _transacted(made, x):
    model = made(gl.BatchNorm2d(3, activation="relu"), gl.BatchNorm2d(3))
    with gl.statistics_transaction(model, skip_nonfinite=True):
        model(x)
    return model.buffers


def _undone(made, x):
    model = made(gl.BatchNorm2d(3))
    with contextlib.suppress(ZeroDivisionError), gl.statistics_transaction(model):
        with gl.statistics_transaction(model):
            model(x)
        raise ZeroDivisionError
    return model.buffers


def _taken_over(made, x):
    model = made(gl.BatchNorm2d(3))
    names = ("gamma", "beta", "avg_mean", "avg_var")
    state = dict(zip(names, np.arange(1, 13, dtype=np.float32).reshape(4, 3), strict=True)) | {"N": 7}
    gl.load_foreign_batch_norm(model[0], state, "chainer")
    return model.state_dict()


def _trained(made, x):
    model = made(gl.BatchNorm2d(3), Flatten())
    optimizer = SGD(model.parameters, momentum=0.5)
    # Strided, so that Flatten copies it.
    y = model(x.transpose(0, 1, 3, 2))
    loss, dy = softmax_cross_entropy(y, _like(x, np.arange(4)))
    dx = model.backward(dy)
    loss, hits, gradients = added(SingleProcess(), loss, 1, dict(model.gradients))
    assert hits == 1
    optimizer.step(gradients)
    return {**optimizer.state_dict(), **model.state_dict(), "dx": dx, "loss": _like(x, loss)}


@pytest.mark.parametrize("use", [_uncertain, _transacted, _undone, _taken_over, _trained])
def test_what_models_do_is_done_on_their_device(other, use):
    x = on(other, lambda cupy: cupy.asarray(X))
    found = use(lambda *layers: on(other, lambda cupy: gl.Sequential(*layers).to("cuda")), x)
    expected = use(gl.Sequential, X.copy())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "steps":
            assert found[name] == value
            continue
        assert found[name].data.device_id == 1, name
        assert_close(found[name], value)


def test_children_of_a_generator_are_on_its_device(other):
    parent = on(other, lambda cupy: gl.CudaGraphGenerator(3))
    assert [child.rng_state.data.device_id for child in parent.spawn(2)] == [1, 1]


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
    layer.buffers |= arrays
    return [layer.eval()(x), *(one for name, one in layer.state_dict().items() if name in arrays)]


def _on_place_of(x):
    return lambda *layers: gl.Sequential(*layers).to("cpu" if isinstance(x, np.ndarray) else "cuda")


def _through(layer, x):
    y = layer(x)
    return y, layer.backward(y)


def _stepped(parameter, gradient):
    optimizer = SGD({"one": parameter}, lr=0.1, momentum=0.5, weight_decay=0.1)
    for _ in range(2):
        optimizer.step({"one": gradient})
    return [natural(parameter)]


OF_CHANNELS = {name: normal((3,), np.float32, seed) ** 2 for seed, name in enumerate(("running_mean", "running_var"))}
AT_ODD_ADDRESSES = {
    "sample_ids": (lambda x, ids: ops.dropout_forward(x, 0.5, 1, 2, sample_ids=ids)[:1], (X, IDS)),
    "bias": (lambda x, bias: ops.dropout_add_forward(x, x, 0.5, 1, 2, bias=bias)[:1], (HALF, HALF[0, 0, 0])),
    "unpool": (lambda y, at: ops.max_unpool_forward(y, at, (8, 8), check=False)[:1], (POOLED, INDICES)),
    "statistics": (_statistics, (np.ones(3, np.float32), *OF_CHANNELS.values(), X)),
    "state": (lambda x, mean, var: _state(x, running_mean=mean, running_var=var), (X, *OF_CHANNELS.values())),
    "Flatten": (lambda x: _through(Flatten(), x.transpose(0, 1, 3, 2)), (X,)),
    "in place": (lambda x: _uncertain(_on_place_of(x), x).values(), (X,)),
    "loss": (lambda y, labels: softmax_cross_entropy(y, labels)[1:], (X[0, 0], np.arange(8))),
    "SGD": (_stepped, (X, X[::-1])),
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
