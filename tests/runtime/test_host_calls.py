"""How many Python-level calls an operation makes once its plan is known: what the host's time is made of.

Time depends on the machine; the number of calls does not. It is counted on NumPy arrays whose launches go nowhere, on
the way that CuPy arrays take too, up to the steps of a program.
"""

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

X = normal((2, 8, 8, 8), np.float32)
IDS = np.arange(2)
OF_CHANNELS = [np.ones(8, np.float32) for _ in range(4)]


def _backward(forward, backward):
    y, saved = forward()
    return lambda: backward(y, saved)


def _layer_backward(layer):
    y = layer(X)
    return lambda: layer.backward(y)


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


def second_derivatives():
    saved = batch_norm()[1]
    return lambda: ops.batch_norm_double_backward(X, OF_CHANNELS[0], OF_CHANNELS[1], X, saved)


class TwoProcesses(Communicator):
    rank, size = 0, 2

    def gather(self, values):
        return np.empty((2, *values.shape), values.dtype)


def sync_batch_norm():
    return ops.sync_batch_norm_forward(X, OF_CHANNELS[0], OF_CHANNELS[1], TwoProcesses())


UNPOOLED = X, np.arange(0, 2 * X.size, 2).reshape(X.shape) % 256


# The most calls of Python functions: counted, with none to spare. Who adds one says here what it is for. (On the host
# each argument of a kernel takes one; two of them say how statistics are folded in once all are there.)
CASES = {
    "dropout": (lambda: dropout, 34),
    "dropout backward": (lambda: _backward(dropout, ops.dropout_backward), 32),
    "dropout of samples": (lambda: dropout_of_samples, 42),
    "relu": (lambda: relu, 26),
    "relu backward": (lambda: _backward(relu, ops.relu_backward), 27),
    "gelu dropout": (lambda: gelu_dropout, 39),
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
    "SyncBatchNorm": (lambda: partial(gl.SyncBatchNorm(8), X), 66),
    "SyncBatchNorm backward": (lambda: _layer_backward(gl.SyncBatchNorm(8)), 52),
    "Dropout": (lambda: partial(gl.Dropout(0.5), X), 41),
    "MaxPool2d": (lambda: partial(gl.MaxPool2d(2), X), 35),
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
