"""PyTorch's own samples of its functions, run on ours: values, strides, indices, gradients."""

from itertools import islice

import pytest
import torch
from torch.nn import functional as theirs

from gpu_layers.torch import functional as ours

definitions = pytest.importorskip("torch.testing._internal.common_methods_invocations", reason="needs expecttest")
PREFIX = "nn.functional."
OPS = [
    info
    for info in definitions.op_db
    # The masks of dropout are others.
    if info.name.startswith(PREFIX) and hasattr(ours, info.name.removeprefix(PREFIX)) and "dropout" not in info.name
]
# Of unpooling there are thousands.
MOST = 120


def run(function, sample):
    def own(value):
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    x = own(sample.input).requires_grad_()
    result = function(x, *map(own, sample.args), **{name: own(value) for name, value in sample.kwargs.items()})
    y, *others = result if isinstance(result, tuple) else (result,)
    (dx,) = torch.autograd.grad(y.sin().sum(), x)
    return y, dx, *others


@pytest.mark.parametrize("info", OPS, ids=lambda info: info.name + info.variant_test_name)
def test_pytorchs_samples(info):
    name = info.name.removeprefix(PREFIX)
    for sample in islice(info.sample_inputs("cpu", torch.float64, requires_grad=True), MOST):
        found, expected = (run(getattr(lib, name), sample) for lib in (ours, theirs))
        assert found[0].stride() == expected[0].stride()
        for a, b in zip(found, expected, strict=True):
            assert a.dtype is b.dtype
            # Sums of at most some thousand products in float64.
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, equal_nan=True)
