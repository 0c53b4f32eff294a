"""ReLU against PyTorch, bit for bit."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests.inputs import (
    LAYOUTS,
    WRITABLE_LAYOUTS,
    assert_same_bits,
    assert_same_values,
    each_dtype,
    normal,
    unchanged,
    with_specials,
)
from tests.torch_bridge import from_torch, to_torch


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_values_are_torchs(dtype, layout):
    x, dy = layout(with_specials((9, 7, 5), dtype)), layout(normal((9, 7, 5), dtype))
    with unchanged(x, dy):
        y, saved = gl.ops.relu_forward(x)
        dx = gl.ops.relu_backward(dy, saved)
    leaf = to_torch(x).requires_grad_()
    torch.relu(leaf).backward(to_torch(dy))
    # Torch leaves open which zero max(-0, 0) is; here a result of 0 is always +0.
    assert_same_values(y, np.where(y == 0, dtype.type(0), from_torch(torch.relu(leaf))))
    assert_same_values(dx, from_torch(leaf.grad))


@each_dtype
def test_a_zero_is_a_plus_zero(dtype):
    y, _ = gl.ops.relu_forward(np.array([-1, -0.0, 0.0, -np.inf], dtype))
    assert_same_bits(y, np.zeros(4, dtype))


@each_dtype
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,), (17,)])
def test_any_shape(dtype, shape):
    x = np.array(np.broadcast_to(np.array(-2, dtype), shape))
    for values in (x, np.negative(x, out=x.copy())):
        y, saved = gl.ops.relu_forward(values)
        assert_same_bits(y, np.array(np.maximum(values, dtype.type(0))))
        assert_same_bits(gl.ops.relu_backward(values, saved), y)


@each_dtype
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS.values(), ids=WRITABLE_LAYOUTS)
def test_out_may_be_another_array_or_the_input(dtype, layout):
    values, dy = with_specials((4, 5), dtype), normal((4, 5), dtype)
    expected, saved = gl.ops.relu_forward(values)
    for x, out in ((values, layout(np.ones((4, 5), dtype))), (in_place := layout(values), in_place)):
        y, saved_of_out = gl.ops.relu_forward(x, out=out)
        assert y is out
        assert_same_values(y, expected)
        assert_same_bits(gl.ops.relu_backward(dy, saved_of_out), gl.ops.relu_backward(dy, saved))


def test_out_may_overlap_the_input():
    memory = normal((50,))
    x, out = memory[:-1], memory[1:]
    expected = np.where(x > 0, x, 0)
    gl.ops.relu_forward(x, out=out)
    assert_same_bits(out, expected)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.ones(3), TypeError, "out must have the result's dtype float32"),
        (np.ones(2, np.float32), ValueError, r"out must have the result's shape \[3\], got \[2\]"),
        (LAYOUTS["read_only"](np.ones(3, np.float32)), ValueError, "out is read-only"),
        ([0.0] * 3, TypeError, "expected a numpy.ndarray"),
    ],
)
def test_out_that_does_not_fit_is_refused(out, error, message):
    x = np.ones(3, np.float32)
    with unchanged(x), pytest.raises(error, match=message):
        gl.ops.relu_forward(x, out=out)
