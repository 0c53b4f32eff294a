"""How many Python-level calls an operation makes once its plan is known: what the host's time is made of.

Time depends on the machine; the number of calls does not. It is counted on NumPy arrays whose launches go nowhere, on
the way that CuPy arrays take too, up to the steps of a program. Of these it is counted on arrays of a stand-in for
CuPy, whose own calls do not count: CuPy's are none of Python's functions.
"""

import sys
from functools import partial

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers import ops
from gpu_layers.catalogue.inputs import NoLaunches
from gpu_layers.distributed import Communicator
from gpu_layers.ops.batch_norm import checked_forward
from gpu_layers.ops.padding import valid_positions
from gpu_layers.runtime.backend import backend_for, use_executor
from profiling.overhead import python_calls
from tests.inputs import normal
from tests.runtime import fake_cupy, idle_cupy

X = normal((2, 8, 8, 8), np.float32)
IDS = np.arange(2)
OF_CHANNELS = [np.ones(8, np.float32) for _ in range(4)]


def _backward(forward, backward):
    y, saved = forward()
    return lambda: backward(y, saved)


def _layer_backward(layer):
    y = layer(X)
    return lambda: layer.backward(y)


def _of(forward, *arguments, **options):
    """A forward of x as a function of no arguments."""
    return lambda: forward(X, *arguments, **options)


def dropout():
    return ops.dropout_forward(X, 0.5, 1, 2)


def dropout_of_samples():
    return ops.dropout_forward(X, 0.5, 1, 2, sample_ids=IDS)


def relu():
    return ops.relu_forward(X)


def gelu_dropout():
    return ops.activation_dropout_forward(X, "gelu", 0.5, 1, 2)


def batch_norm():
    return ops.batch_norm_forward(X, OF_CHANNELS[0], OF_CHANNELS[1])


def inference():
    return ops.batch_norm_inference(X, *OF_CHANNELS)


def max_pool():
    return ops.max_pool_forward(X, (3, 3), 2, 1)


def avg_pool():
    return ops.avg_pool_forward(X, (2, 2), 2)


def lp_pool():
    return ops.lp_pool_forward(X, 2.0, (2, 2), 2)


def dropout_add():
    return ops.dropout_add_forward(X, X, 0.5, 1, 2)


def batch_norm_max_pool():
    return ops.batch_norm_max_pool_forward(X, OF_CHANNELS[0], OF_CHANNELS[1], (3, 3), 2, 1, activation="relu")


def unpool():
    return ops.max_unpool_forward(*UNPOOLED, (16, 16), check=False)


def padded_batch_norm():
    valid = valid_positions(X, next(OTHER_LENGTHS), None, False)
    given = X, OF_CHANNELS[0], OF_CHANNELS[1], 1e-5, None, "identity", False, None, None, valid
    return checked_forward(backend_for(X), *given)


OTHER_LENGTHS = ([(rows, columns)] * 2 for rows in range(1, 9) for columns in range(2, 9))


def padded_backward():
    y, saved = padded_batch_norm()
    return lambda: ops.batch_norm_backward(y, saved)


def gathered():
    saved = max_pool()[1]
    return lambda: ops.max_pool_gather(X, saved)


def second_derivatives():
    saved = batch_norm()[1]
    return lambda: ops.batch_norm_double_backward(X, OF_CHANNELS[0], OF_CHANNELS[1], X, saved)


class TwoProcesses(Communicator):
    rank, size = 0, 2

    def gather(self, values):
        return np.empty((2, *values.shape), values.dtype)


def sync_batch_norm():
    return ops.sync_batch_norm_forward(X, OF_CHANNELS[0], OF_CHANNELS[1], TwoProcesses())


channel_dropout = _of(ops.dropout_forward, 0.5, 1, 2, mask_axes=2)
drop_path = _of(ops.dropout_forward, 0.5, 1, 2, mask_axes=1)
shared_dropout = _of(ops.dropout_forward, 0.5, 1, 2, shared_axes=(1,))
alpha_dropout = _of(ops.alpha_dropout_forward, 0.5, 1, 2)
feature_alpha_dropout = _of(ops.alpha_dropout_forward, 0.5, 1, 2, mask_axes=2)
relu_dropout = _of(ops.activation_dropout_forward, "relu", 0.5, 1, 2)
dropout_moments = _of(ops.dropout_moments, 0.5, 1, 2, passes=3)
adaptive_max_pool = _of(ops.adaptive_max_pool_forward, (3, 3))
adaptive_avg_pool = _of(ops.adaptive_avg_pool_forward, (3, 3))
global_max_pool = _of(ops.adaptive_max_pool_forward, (1, 1))
global_avg_pool = _of(ops.adaptive_avg_pool_forward, (1, 1))
fractional_max_pool = _of(ops.fractional_max_pool_forward, (2, 2), (4, 4), samples=normal((2, 8, 2), np.float32) % 1)

UNPOOLED = X, np.arange(0, 2 * X.size, 2).reshape(X.shape) % 256


# The most calls of Python functions: counted, with none to spare. Who adds one says here what it is for. (On the host
# each argument of a kernel takes one; two of them say how statistics are folded in once all are there.)
CASES = {
    "dropout": (lambda: dropout, 34),
    "dropout backward": (lambda: _backward(dropout, ops.dropout_backward), 32),
    "dropout of samples": (lambda: dropout_of_samples, 42),
    "relu": (lambda: relu, 26),
    "relu backward": (lambda: _backward(relu, ops.relu_backward), 27),
    "gelu dropout": (lambda: gelu_dropout, 38),
    "gelu dropout backward": (lambda: _backward(gelu_dropout, ops.activation_dropout_backward), 38),
    "batch norm": (lambda: batch_norm, 45),
    "batch norm backward": (lambda: _backward(batch_norm, ops.batch_norm_backward), 44),
    "batch norm inference": (lambda: inference, 43),
    "max pool": (lambda: max_pool, 31),
    "max pool backward": (lambda: _backward(max_pool, ops.max_pool_backward), 29),
    "avg pool": (lambda: avg_pool, 31),
    "avg pool backward": (lambda: _backward(avg_pool, ops.avg_pool_backward), 27),
    "lp pool": (lambda: lp_pool, 29),
    "lp pool backward": (lambda: _backward(lp_pool, ops.lp_pool_backward), 31),
    "dropout_add": (lambda: dropout_add, 45),
    "batch norm, max pool": (lambda: batch_norm_max_pool, 51),
    "batch norm, max pool backward": (lambda: _backward(batch_norm_max_pool, ops.batch_norm_max_pool_backward), 47),
    "unpool": (lambda: unpool, 35),
    "unpool backward": (lambda: _backward(unpool, ops.max_unpool_backward), 31),
    "BatchNorm2d in evaluation": (lambda: partial(gl.BatchNorm2d(8).eval(), X), 45),
    "BatchNorm2d": (lambda: partial(gl.BatchNorm2d(8), X), 51),
    "BatchNorm2d backward": (lambda: _layer_backward(gl.BatchNorm2d(8)), 48),
    "GhostBatchNorm2d": (lambda: partial(gl.GhostBatchNorm2d(8, 1), X), 97),
    "GhostBatchNorm2d backward": (lambda: _layer_backward(gl.GhostBatchNorm2d(8, 1)), 78),
    "padded batch norm, of other lengths": (lambda: padded_batch_norm, 83),
    "second derivatives": (second_derivatives, 65),
    "sync batch norm of two": (lambda: sync_batch_norm, 111),
    "sync batch norm of two, backward": (lambda: _backward(sync_batch_norm, ops.sync_batch_norm_backward), 80),
    "SyncBatchNorm": (lambda: partial(gl.SyncBatchNorm(8), X), 64),
    "SyncBatchNorm backward": (lambda: _layer_backward(gl.SyncBatchNorm(8)), 52),
    "Dropout": (lambda: partial(gl.Dropout(0.5), X), 41),
    "MaxPool2d": (lambda: partial(gl.MaxPool2d(2), X), 35),
    "channel dropout": (lambda: channel_dropout, 36),
    "channel dropout backward": (lambda: _backward(channel_dropout, ops.dropout_backward), 34),
    "drop path": (lambda: drop_path, 36),
    "drop path backward": (lambda: _backward(drop_path, ops.dropout_backward), 34),
    "shared dropout": (lambda: shared_dropout, 38),
    "shared dropout backward": (lambda: _backward(shared_dropout, ops.dropout_backward), 36),
    "alpha dropout": (lambda: alpha_dropout, 34),
    "alpha dropout backward": (lambda: _backward(alpha_dropout, ops.alpha_dropout_backward), 32),
    "feature alpha dropout": (lambda: feature_alpha_dropout, 36),
    "feature alpha dropout backward": (lambda: _backward(feature_alpha_dropout, ops.alpha_dropout_backward), 34),
    "relu dropout": (lambda: relu_dropout, 38),
    "relu dropout backward": (lambda: _backward(relu_dropout, ops.activation_dropout_backward), 28),
    "dropout of samples, backward": (lambda: _backward(dropout_of_samples, ops.dropout_backward), 38),
    "dropout_add backward": (lambda: _backward(dropout_add, ops.dropout_add_backward), 34),
    "dropout moments": (lambda: dropout_moments, 38),
    "batch norm inference backward": (lambda: _backward(inference, ops.batch_norm_inference_backward), 53),
    "padded batch norm backward": (padded_backward, 47),
    "adaptive max pool": (lambda: adaptive_max_pool, 30),
    "adaptive max pool backward": (lambda: _backward(adaptive_max_pool, ops.max_pool_backward), 29),
    "adaptive avg pool": (lambda: adaptive_avg_pool, 29),
    "adaptive avg pool backward": (lambda: _backward(adaptive_avg_pool, ops.avg_pool_backward), 26),
    "global max pool": (lambda: global_max_pool, 30),
    "global max pool backward": (lambda: _backward(global_max_pool, ops.max_pool_backward), 31),
    "global avg pool": (lambda: global_avg_pool, 29),
    "global avg pool backward": (lambda: _backward(global_avg_pool, ops.avg_pool_backward), 29),
    "fractional max pool": (lambda: fractional_max_pool, 36),
    "fractional max pool backward": (lambda: _backward(fractional_max_pool, ops.fractional_max_pool_backward), 29),
    "max pool, gathered": (gathered, 29),
    "Dropout backward": (lambda: _layer_backward(gl.Dropout(0.5)), 35),
    "MaxPool2d backward": (lambda: _layer_backward(gl.MaxPool2d(2)), 32),
}


def test_a_layer_is_as_quick_after_a_method_was_replaced_for_a_while():
    """As ``recalibrate`` does: the kernel that has the statistics folds them in again."""
    layer = gl.BatchNorm2d(8)
    with use_executor(NoLaunches()):
        layer(X)
        before = python_calls(partial(layer, X))
        layer._take_batch = lambda batch: None
        layer(X)
        del layer._take_batch
        layer(X)
        assert python_calls(partial(layer, X)) == before


@pytest.mark.parametrize("name", CASES)
def test_calls_of_an_operation_whose_plan_is_known(name):
    prepare, most = CASES[name]
    with use_executor(NoLaunches()):
        function = prepare()
        first = python_calls(function) - 1
        second, third = python_calls(function) - 1, python_calls(function) - 1
    assert second == third <= most
    # What is worked out is worked out once; some of it by the forward before.
    assert first >= second


# ---- The way that CuPy arrays take -----------------------------------------------------------------------------------


def calls_outside_the_stand_in(call):
    """As ``python_calls``, without those of the stand-in for CuPy and what they call themselves."""
    inside, entered = 0, 0

    def counted(frame, event, argument):
        nonlocal inside, entered
        if event == "call":
            inside += inside > 0 or frame.f_code.co_filename in (idle_cupy.__file__, fake_cupy.__file__)
            entered += not inside
        elif event == "return":
            inside -= inside > 0

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        call()
    finally:
        sys.setprofile(before)
    return entered


# A forward of x and of four arrays of numbers of channels, its backward, and the most calls of each.
ON_A_GPU = {
    "dropout": (lambda x, *_: ops.dropout_forward(x, 0.5, 1, 2), ops.dropout_backward, 14, 12),
    "dropout of samples": (
        lambda x, *_: ops.dropout_forward(x, 0.5, 1, 2, sample_ids=x.cupy.ids),
        ops.dropout_backward,
        16,
        12,
    ),
    "relu": (lambda x, *_: ops.relu_forward(x), ops.relu_backward, 10, 9),
    "gelu dropout": (
        lambda x, *_: ops.activation_dropout_forward(x, "gelu", 0.5, 1, 2),
        ops.activation_dropout_backward,
        15,
        13,
    ),
    "batch norm": (lambda x, *of: ops.batch_norm_forward(x, *of[:2]), ops.batch_norm_backward, 13, 13),
    "batch norm inference": (
        lambda x, *of: ops.batch_norm_inference(x, *of),
        ops.batch_norm_inference_backward,
        12,
        13,
    ),
    "max pool": (lambda x, *_: ops.max_pool_forward(x, (3, 3), 2, 1), ops.max_pool_backward, 14, 10),
    "avg pool": (lambda x, *_: ops.avg_pool_forward(x, (2, 2), 2), ops.avg_pool_backward, 14, 10),
    "lp pool": (lambda x, *_: ops.lp_pool_forward(x, 2.0, (2, 2), 2), ops.lp_pool_backward, 12, 11),
}
LAYERS_ON_A_GPU = {
    "Dropout": (lambda: gl.Dropout(0.5), 22, 15),
    "BatchNorm2d": (lambda: gl.BatchNorm2d(8), 19, 17),
    "MaxPool2d": (lambda: gl.MaxPool2d(2), 19, 13),
}


@pytest.fixture
def cupy(monkeypatch):
    with idle_cupy.idle_cupy(monkeypatch) as stand_in:
        yield stand_in


def assert_calls(call, most):
    first, second, third = (calls_outside_the_stand_in(call) - 1 for _ in range(3))
    assert second == third <= most
    assert first >= second


@pytest.mark.parametrize("name", ON_A_GPU)
def test_calls_of_a_known_operation_on_a_gpu(cupy, name):
    forward, backward, most, most_of_backward = ON_A_GPU[name]
    x, cupy.ids = cupy.asarray(X), cupy.asarray(IDS)
    given = [x, *[cupy.asarray(values) for values in OF_CHANNELS]]
    assert_calls(partial(forward, *given), most)
    y, saved = forward(*given)
    assert_calls(lambda: backward(y, saved), most_of_backward)


@pytest.mark.parametrize("name", LAYERS_ON_A_GPU)
def test_calls_of_a_known_layer_on_a_gpu(cupy, name):
    make, most, most_of_backward = LAYERS_ON_A_GPU[name]
    layer, x = make().to("cuda"), cupy.asarray(X)
    assert_calls(lambda: layer(x), most)
    y = layer(x)
    assert_calls(lambda: layer.backward(y), most_of_backward)


def test_calls_of_the_stand_in_do_not_count(cupy):
    x = cupy.asarray(X)
    assert calls_outside_the_stand_in(lambda: (x.copy(), x + x, x.data.ptr, cupy.concatenate([x, x]))) == 1
    assert calls_outside_the_stand_in(lambda: (x.copy(), (lambda: x.copy())(), x.copy())) == 2
