"""The ReLU layer."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests.inputs import DTYPES, WRITABLE_LAYOUTS, assert_same_bits, integers, normal, unchanged


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS.values(), ids=WRITABLE_LAYOUTS)
@pytest.mark.parametrize("inplace", [False, True])
def test_forward_and_backward(dtype, layout, inplace):
    values, dy = integers((5, 4, 3), dtype), layout(normal((5, 4, 3), dtype))
    layer = gl.ReLU(inplace)
    x = layout(values)
    y = layer(x)
    assert (y is x) == inplace
    assert_same_bits(y, np.where(values > 0, values, dtype.type(0)))
    if not inplace:
        assert_same_bits(x, values)
        assert not np.shares_memory(x, y)
    with unchanged(y, dy):
        for _ in range(2):
            assert_same_bits(layer.backward(dy), np.where(values > 0, dy, dtype.type(0)))


def test_repr_is_torchs():
    for inplace in (False, True):
        assert repr(gl.ReLU(inplace)) == repr(torch.nn.ReLU(inplace))
