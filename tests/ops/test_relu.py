"""ReLU against PyTorch, bit for bit."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests.inputs import LAYOUTS, assert_same_bits, assert_same_values, each_dtype, normal, unchanged, with_specials
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


def test_out_may_overlap_the_input():
    memory = normal((50,))
    x, out = memory[:-1], memory[1:]
    expected = np.where(x > 0, x, 0)
    gl.ops.relu_forward(x, out=out)
    assert_same_bits(out, expected)
