"""What the reference of the poolings costs: memory beside the input, and time."""

import time

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.catalogue import FAMILIES
from tests.inputs import BFLOAT16, memory_of, normal

SHAPE = (8, 32, 112, 112)  # the 16th part of 64 x 64 x 112 x 112
#: Windows that the catalogue does not have.
WINDOWS = {
    "max 2x2 s2": (lambda x: gl.ops.max_pool_forward(x, (2, 2)), gl.ops.max_pool_backward),
    "max 3x3 s1": (lambda x: gl.ops.max_pool_forward(x, (3, 3), 1, 1), gl.ops.max_pool_backward),
    "avg 3x3 s1": (lambda x: gl.ops.avg_pool_forward(x, (3, 3), 1, 1), gl.ops.avg_pool_backward),
    "lp inf 2x2 s2": (lambda x: gl.ops.lp_pool_forward(x, np.inf, (2, 2)), gl.ops.lp_pool_backward),
    "global max": (lambda x: gl.ops.adaptive_max_pool_forward(x, (1, 1)), gl.ops.max_pool_backward),
}


def of_catalogue(operation):
    return lambda x: operation.forward({"x": x}, False), operation.backward


#: Without max_unpool, whose call in the catalogue makes the indices too.
PASSES = {one.name: of_catalogue(one) for one in FAMILIES["pooling"] if one.backward and one.name != "max_unpool"}
PASSES |= WINDOWS


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("operation", PASSES)
def test_within_three_times_the_memory_of_the_input(operation, dtype):
    forward, backward = PASSES[operation]
    x = np.resize(normal((2**16 + 1,), dtype), SHAPE)
    y, saved = forward(x)
    dy = np.ones_like(y)
    assert memory_of(forward, x)[1] <= 3 * x.nbytes
    assert memory_of(backward, dy, saved)[1] <= 3 * x.nbytes


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)], ids=str)
def test_unpooling_within_three_times_the_memory_of_indices_and_output(dtype):
    x = np.resize(normal((2**16 + 1,), dtype), SHAPE)
    pooled, saved = gl.ops.max_pool_forward(x, (2, 2))
    indices = gl.ops.max_pool_indices(saved)
    y, saved = gl.ops.max_unpool_forward(pooled, indices, SHAPE[2:])
    moved = y.nbytes + indices.nbytes
    assert memory_of(lambda: gl.ops.max_unpool_forward(pooled, indices, SHAPE[2:]))[1] <= 3 * moved
    assert memory_of(lambda: gl.ops.max_unpool_backward(y, saved))[1] <= 3 * moved


@pytest.mark.parametrize("operation", ["max_pool", "avg_pool"])
def test_two_million_elements_a_second(operation):
    """64 x 64 x 112 x 112 in seconds: the processor's time, the best of a few runs."""
    forward, backward = PASSES[operation]
    x = np.resize(normal((2**16 + 1,), np.float32), (2, *SHAPE[1:]))
    seconds = []
    while len(seconds) < 10 and min(seconds, default=1) > x.size / 2e6:
        begin = time.process_time()
        y, saved = forward(x)
        backward(y, saved)
        seconds.append(time.process_time() - begin)
    assert min(seconds) <= x.size / 2e6


@pytest.mark.parametrize("operation", PASSES)
def test_a_batch_in_parts_is_its_samples(operation, monkeypatch):
    forward, backward = PASSES[operation]
    x = np.resize(normal((2**10 + 1,), np.float32), (3, 2, 52, 53))
    y, saved = forward(x)
    dx = backward(y, saved)
    monkeypatch.setattr("gpu_layers.reference.pool_taps._PART", 1)
    parts, _ = forward(x)
    assert parts.tobytes() == y.tobytes()
    assert backward(y, saved).tobytes() == dx.tobytes()
