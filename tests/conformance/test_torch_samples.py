"""PyTorch's own sample inputs for its pooling operators: values, indices, gradients, and what it refuses."""

import numpy as np
import pytest
import torch
from torch.testing._internal import common_methods_invocations as operators

import gpu_layers as gl
from tests.inputs import assert_within
from tests.torch_bridge import from_torch, to_torch

NAMES = [
    f"nn.functional.{kind}{rank}d"
    for kind in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "max_unpool")
    for rank in (1, 2, 3)
]
OPERATORS = {f"{op.name} {op.variant_test_name}".strip(): op for op in operators.op_db if op.name in NAMES}
each_operator = pytest.mark.parametrize("name", OPERATORS)


def layer_for(name, args, kwargs):
    """Our layer for a call of torch.nn.functional, and what its forward takes besides x."""
    kind, rank = name.split(".")[-1].split(" ")[0][:-2], int(name.split(" ")[0][-2])
    if kind == "max_pool":
        return getattr(gl, f"MaxPool{rank}d")(*args, **kwargs), ()
    if kind == "avg_pool":
        # In torch.nn.functional an empty stride is no stride.
        kwargs = {key: value for key, value in kwargs.items() if (key, value) != ("stride", ())}
        args = [None if value == () else value for value in args]
        return getattr(gl, f"AvgPool{rank}d")(*args, **kwargs), ()
    if kind == "max_unpool":
        indices, *args = args
        kwargs = dict(kwargs)
        size = kwargs.pop("output_size", None)
        return getattr(gl, f"MaxUnpool{rank}d")(*args, **kwargs), (indices.numpy(), size)
    names = {"adaptive_max_pool": "AdaptiveMaxPool", "adaptive_avg_pool": "AdaptiveAvgPool"}
    return getattr(gl, f"{names[kind]}{rank}d")(*args, **kwargs), ()


def test_every_operator_is_there():
    assert {op.name for op in OPERATORS.values()} == set(NAMES)


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@each_operator
def test_samples(name, backend):
    op = OPERATORS[name]
    samples = list(op.sample_inputs("cpu", torch.float64, requires_grad=True))
    assert samples
    for sample in samples:
        message = f"{tuple(sample.input.shape)} {sample.args} {sample.kwargs}"
        leaf = sample.input.detach().requires_grad_()
        expected = op.op(leaf, *sample.args, **sample.kwargs)
        layer, others = layer_for(name, sample.args, sample.kwargs)
        x = sample.input.detach().numpy()
        with gl.use_backend(backend):
            y = layer(x, *others)
        if isinstance(y, tuple):
            y, indices = y
            expected, expected_indices = expected
            np.testing.assert_array_equal(indices, expected_indices.numpy(), err_msg=message)
        # Sums of at most 512 values in another order, divided: of values below 10.
        bound = 512 * 10 * 2.0**-52 if "avg" in name else 0.0
        assert_within(y, from_torch(expected), bound, message)
        dy = np.random.default_rng(0).standard_normal(y.shape)
        expected.backward(to_torch(dy))
        with gl.use_backend(backend):
            dx = layer.backward(dy)
        # At most 27 gradients below 5 meet, added in another order.
        assert_within(dx, from_torch(leaf.grad), 27 * 5 * 2.0**-52, message)


def pool(name, sample):
    layer, others = layer_for(name, sample.args, sample.kwargs)
    return layer(sample.input.detach().numpy(), *others)


#: PyTorch has no samples of errors for the others.
WITH_ERRORS = [name for name, op in OPERATORS.items() if op.error_inputs_func is not None]


def test_there_are_samples_of_errors():
    assert len(WITH_ERRORS) >= 6


@pytest.mark.parametrize("name", WITH_ERRORS)
def test_what_torch_refuses_is_refused(name):
    op = OPERATORS[name]
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises((ValueError, TypeError)):
            pool(name, sample)
