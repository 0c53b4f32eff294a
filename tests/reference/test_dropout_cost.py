"""What the reference of dropout costs: time, and memory beside the result."""

import time

import numpy as np
import pytest

import gpu_layers as gl
from tests.inputs import BFLOAT16, memory_of, normal

SIZE = 2**21


def test_15_million_elements_a_second():
    """The processor's time, not the clock's: other processes only share its caches. The best of a few runs."""
    x = normal((SIZE,), np.float32)
    gl.ops.dropout_forward(x, 0.5, 1, 2)
    seconds = []
    while len(seconds) < 20 and min(seconds, default=1) > SIZE / 15e6:
        begin = time.process_time()
        gl.ops.dropout_forward(x, 0.5, 1, 2)
        seconds.append(time.process_time() - begin)
    assert min(seconds) <= SIZE / 15e6, f"{SIZE / min(seconds) / 1e6:.1f} million elements/s"


def _sample_ids(x):
    return np.arange(x.shape[0])


OPERATIONS = {
    "elements": lambda x: gl.ops.dropout_forward(x, 0.3, 1, 2),
    "shard": lambda x: gl.ops.dropout_forward(x, 0.3, 1, 2, start=2**34 + 3),
    "channels": lambda x: gl.ops.dropout_forward(x, 0.3, 1, 2, mask_axes=2),
    "samples": lambda x: gl.ops.dropout_forward(x, 0.3, 1, 2, mask_axes=1),
    "by sample": lambda x: gl.ops.dropout_forward(x, 0.3, 1, 2, sample_ids=_sample_ids(x)),
    "alpha": lambda x: gl.ops.alpha_dropout_forward(x, 0.3, 1, 2),
    "transposed": lambda x: gl.ops.dropout_forward(x.T, 0.3, 1, 2),
    "sigmoid": lambda x: gl.ops.activation_dropout_forward(x, "sigmoid", 0.3, 1, 2),
    "relu": lambda x: gl.ops.activation_dropout_forward(x, "relu", 0.3, 1, 2),
    "moments": lambda x: gl.ops.dropout_moments(x, 0.3, 1, 2, passes=2),
    "moments by sample": lambda x: gl.ops.dropout_moments(x, 0.3, 1, 2, passes=2, sample_ids=_sample_ids(x)),
}
BACKWARD = {
    "elements": gl.ops.dropout_backward,
    "sigmoid": gl.ops.activation_dropout_backward,
    "relu": gl.ops.activation_dropout_backward,
}


def temporary_bytes(call, x):
    """The most bytes in use at a time, beyond what is returned, an element."""
    _, most, kept = memory_of(call, x)
    return (most - kept) / x.size


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(2, SIZE // 2), (SIZE // 8, 8, 1)], ids=str)
def test_at_most_8_bytes_of_temporary_memory_an_element(operation, dtype, shape):
    x = np.full(shape, 0.5, dtype)
    assert temporary_bytes(OPERATIONS[operation], x) <= 8
    if operation in BACKWARD:
        _, saved = OPERATIONS[operation](x)
        assert temporary_bytes(lambda dy: BACKWARD[operation](dy, saved), x) <= 8
