"""PyTorch's own error samples of the functions: the same type, and the same words."""

import numpy as np
import pytest
import torch
from torch.nn import functional as theirs

from gpu_layers.torch import functional as ours
from tests.torch.layers import UNIT_ROUNDOFF

definitions = pytest.importorskip("torch.testing._internal.common_methods_invocations", reason="needs expecttest")
PREFIX = "nn.functional."
OPS = [
    info
    for info in definitions.op_db
    if info.name.startswith(PREFIX)
    and hasattr(ours, info.name.removeprefix(PREFIX))
    and info.error_inputs_func is not None
]


def raised(function, sample):
    try:
        function(sample.input, *sample.args, **sample.kwargs)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("info", OPS, ids=lambda info: info.name + info.variant_test_name)
def test_pytorchs_error_samples(info):
    name = info.name.removeprefix(PREFIX)
    for case in info.error_inputs("cpu"):
        sample = case.sample_input
        if not (isinstance(sample.input, torch.Tensor) and sample.input.is_floating_point()):
            continue  # another type's error is ours: test_modules.py
        expected = raised(getattr(theirs, name), sample)
        if expected is None:
            continue
        found = raised(getattr(ours, name), sample)
        assert type(found) is type(expected), (sample, found)
        assert str(found) == str(expected)


@pytest.mark.parametrize(
    ("name", "shape", "arguments"),
    [
        ("max_pool2d", (1, 2, 4, 4), (0,)),
        ("max_pool2d", (1, 2, 4, 4), (2, 0)),
        ("max_pool2d", (1, 2, 4, 4), (2, 2, -1)),
        ("max_pool2d", (1, 2, 4, 4), (2, 2, 2)),
        ("max_pool2d", (1, 2, 4, 4), (2, 2, 0, 0)),
        ("max_pool2d", (1, 2, 4, 4), (5,)),
        ("max_pool2d", (1, 2, 4, 4), ((2, 2, 2),)),
        ("max_pool2d", (1, 2, 4, 4), ("two",)),
        ("max_pool2d", (4, 4), (2,)),
        ("avg_pool2d", (1, 0, 4, 4), (2,)),
        ("avg_pool1d", (1, 2, 4), (5,)),
        ("avg_pool3d", (1, 2, 4, 4, 4), (2, 1, 2)),
        ("lp_pool2d", (1, 2, 4, 4), (2.0, 5)),
        ("adaptive_avg_pool2d", (1, 2, 4, 4), ((3, -1),)),
        ("adaptive_max_pool2d", (1, 2, 4, 0), (2,)),
        ("adaptive_avg_pool1d", (4,), (2,)),
        ("dropout1d", (4,), ()),
        ("batch_norm", (2, 3, 4), (None, None)),
        ("batch_norm", (1, 3, 1), (None, None, None, None, True)),
        ("batch_norm", (4, 3), (None, None, None, None, True, None)),
        ("batch_norm", (4, 3), (None, None, [1.0, 2.0, 3.0], None, True)),
        ("batch_norm", (4, 3), (3, 4)),
        ("max_pool2d", (1, 1, 14, 14), (3, 1, 2, 2)),
        ("max_pool1d", (1, 1, 14), (4, 1, 3, 4)),
        ("max_pool2d", (1, 1, 4, 4), (2, 2, 0, 1, 1)),
        ("avg_pool2d", (1, 1, 4, 4), (2, 2, 0, False, True, 2.5)),
        ("avg_pool2d", (1, 1, 4, 4), (2, 2, 0, False, True, "2")),
        ("avg_pool2d", (1, 1, 4, 4), (2, 2, 0, "yes")),
        ("avg_pool2d", (1, 1, 4, 4), (2, 2, 0, False, 1)),
        ("avg_pool3d", (1, 1, 3, 2, 2), (3, 3, 0, True)),
        ("lp_pool3d", (1, 1, 3, 2, 2), (2.0, 3, 3, True)),
        ("lp_pool2d", (1, 1, 4, 4), (0, 2)),
        ("lp_pool2d", (1, 1, 4, 4), ("a", 2)),
        ("adaptive_avg_pool1d", (1, 1, 4), (None,)),
        ("adaptive_avg_pool1d", (1, 1, 4), ((None,),)),
        ("avg_pool2d", (1, 1, 4, 4), (torch.tensor(2.0),)),
        ("max_pool2d", (1, 1, 4, 4), (torch.tensor([2, 2]),)),
        ("batch_norm", (4, 3), (None, None, None, None, 1)),
        ("dropout", (4,), (0.5, 1)),
        ("dropout", (4,), (torch.tensor([0.5]),)),
        ("adaptive_avg_pool2d", (1, 1, 4, 4), (None,)),
        ("adaptive_avg_pool2d", (1, 1, 4, 4), ((2,),)),
        ("adaptive_max_pool3d", (1, 1, 4, 4, 4), ((2,),)),
        ("dropout", (4,), (2,)),
    ],
)
def test_other_errors_are_torchs(name, shape, arguments):
    x = torch.ones(shape)
    with pytest.raises((RuntimeError, ValueError, TypeError, ZeroDivisionError)) as expected:
        getattr(theirs, name)(x, *arguments)
    with pytest.raises(expected.type) as found:
        getattr(ours, name)(x, *arguments)
    assert str(found.value) == str(expected.value)


_TWO = torch.tensor(2)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("max_pool1d", (torch.tensor([2]), _TWO, torch.tensor(1))),
        ("max_pool2d", (_TWO,)),
        ("max_pool2d", (2, _TWO, torch.tensor(True), (_TWO, 1))),
        ("max_pool3d", ([_TWO, 1, 2],)),
        ("avg_pool1d", (torch.tensor([2]),)),
        ("avg_pool2d", (_TWO, (1, _TWO), 0, False, True, torch.tensor(3))),
        ("avg_pool3d", (2, _TWO)),
        ("lp_pool2d", (_TWO, (_TWO, 1), _TWO)),
        ("adaptive_max_pool1d", (torch.tensor([3]),)),
        ("adaptive_max_pool2d", (np.array([3, 2]),)),
        ("adaptive_avg_pool2d", ((_TWO, None),)),
        ("adaptive_avg_pool3d", (range(1, 4),)),
        ("batch_norm", (None, None, None, None, True, torch.tensor(0.1), torch.tensor(1e-3))),
        ("dropout", (torch.tensor(1.0),)),
    ],
)
def test_numbers_of_the_types_that_torch_takes(name, arguments):
    rank = int(name[-2]) if name.endswith("d") else 1
    x = torch.arange(2.0 * 3 * 6**rank, dtype=torch.float64).reshape(2, 3, *(6,) * rank)
    expected, found = (getattr(lib, name)(x, *arguments) for lib in (theirs, ours))
    assert found.shape == expected.shape
    # Results are of at most 36 numbers, whose roundings add up.
    bound = 64 * UNIT_ROUNDOFF[torch.float64]
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


def test_strides_of_unpooling():
    x, indices = torch.ones(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2, dtype=torch.int64)
    for function in (ours.max_unpool3d, theirs.max_unpool3d):
        with pytest.raises(RuntimeError, match="strides should be greater than zero"):
            function(x, indices, 3, 0)


@pytest.mark.parametrize("training", [False, True])
def test_statistics_have_no_gradient(training):
    for name in ("running_mean", "running_var"):
        given = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
        given[name].requires_grad_()
        for function in (ours.batch_norm, theirs.batch_norm):
            with pytest.raises(RuntimeError, match=f"not differentiable with respect to argument '{name}'"):
                function(torch.ones(2, 3), **given, training=training)
            with torch.no_grad():
                function(torch.ones(2, 3), **given, training=training)


@pytest.mark.parametrize("index", [-1, 16, 99])
def test_indices_outside_the_plane(index):
    x, indices = torch.ones(1, 1, 2, 2), torch.tensor([[[[0, 1], [2, index]]]])
    with pytest.raises(RuntimeError, match=f"Found an invalid max index: {index}"):
        ours.max_unpool2d(x, indices, 2)
    # Under torch.func too, which makes no graph.
    transformed = (
        lambda: torch.func.grad(lambda x: ours.max_unpool2d(x, indices, 2).sum())(x),
        lambda: torch.vmap(lambda *one: ours.max_unpool2d(*one, 2))(x[None], indices[None]),
        lambda: torch.func.functionalize(lambda *both: ours.max_unpool2d(*both, 2))(x, indices),
    )
    for call in transformed:
        with pytest.raises(RuntimeError, match=f"Found an invalid max index: {index}"):
            call()


def test_a_good_call_does_not_make_its_like_good():
    x = torch.ones(1, 2, 4, 4)
    ours.max_pool2d(x, 2), ours.adaptive_avg_pool2d(x, 1)
    with pytest.raises(TypeError):
        ours.max_pool2d(x, 2.0)
    with pytest.raises(TypeError):
        ours.adaptive_avg_pool2d(x, 1.0)


def test_a_wrong_output_size():
    x, indices = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.int64)
    for size in ((9, 4), (4,)):
        with pytest.raises(ValueError, match="output_size"):
            ours.max_unpool2d(x, indices, 2, output_size=size)
