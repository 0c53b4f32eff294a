"""Values, gradients and buffers, against torch.nn."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import gpu_layers as gl
import gpu_layers.torch as glt
from tests.torch.layers import CALLS, UNIT_ROUNDOFF, channels_last, compare, every_other, first, pair, values

IDS = [f"{name}{arguments}" for name, arguments, _ in CALLS]


def input_for(name, shape, dtype=torch.float64):
    # torch's LPPool takes powers of x, ours of abs(x).
    return values(shape, dtype).abs() + 0.5 if "LPPool" in name else values(shape, dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "arguments", "shape"), CALLS, ids=IDS)
def test_float64_agrees_to_rounding(name, arguments, shape, training):
    ours, theirs = pair(name, arguments)
    ours.train(training), theirs.train(training)
    # Sums of at most some hundred products, each relative to the largest: 1000 roundings of 2**-53 are 1e-13.
    compare(ours, theirs, input_for(name, shape), 1e-12, 1e-12)


@pytest.mark.parametrize(
    "layout", [every_other, channels_last, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)]
)
@pytest.mark.parametrize(("name", "arguments", "shape"), [one for one in CALLS if len(one[2]) == 4])
def test_values_do_not_depend_on_strides(name, arguments, shape, layout):
    module, _ = pair(name, arguments)
    other, _ = pair(name, arguments)
    x = input_for(name, shape)
    results = []
    for one, given in ((module, x), (other, layout(x))):
        given = given.detach().requires_grad_()
        y = first(one(given))
        y.backward(values(tuple(y.shape), y.dtype, 1))
        results.append((y, given.grad, *(p.grad for p in one.parameters()), *one.buffers()))
    for a, b in zip(*results, strict=True):
        if layout is channels_last and "Max" not in name:
            # Other kernels, which add in another order.
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
        else:
            # Bits, not only values: the order of every sum is that of the logical shape.
            assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "arguments", "shape"), [one for one in CALLS if len(one[2]) in (4, 5)])
def test_channels_last_in_gives_channels_last_out(name, arguments, shape):
    ours, _ = pair(name, arguments)
    x = channels_last(input_for(name, shape)).requires_grad_()
    result = ours(x)
    y = first(result)
    (dx,) = torch.autograd.grad(y.sum(), x)
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    results = [y, dx, *(result[1:] if isinstance(result, tuple) else ())]
    assert all(one.is_contiguous(memory_format=memory_format) for one in results)
    assert not any(one._is_view() for one in (y, dx))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "arguments", "shape", "parameters"),
    [(*one, "float32") for one in CALLS] + [(*one, "input") for one in CALLS if "BatchNorm" in one[0]],
)
def test_half_types_are_rounded_once(name, arguments, shape, dtype, parameters):
    ours, theirs = pair(name, arguments, torch.float32)
    if parameters == "input":
        ours.to(dtype), theirs.to(dtype)
    x = (input_for(name, shape, torch.float32) / 8).to(dtype)
    y = first(ours(x))
    wide = theirs.float()
    exact = first(wide(x.float()))
    assert y.dtype is dtype
    # One rounding to the half type, beside those of float32 that both take; parameters of a half type are exact in
    # float32.
    bound = UNIT_ROUNDOFF[dtype] * exact.abs() + 100 * UNIT_ROUNDOFF[torch.float32] * (1 + exact.abs())
    assert ((y.float() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("name", "arguments", "shape"), CALLS, ids=IDS)
def test_emulated_kernels_agree_with_the_reference(name, arguments, shape):
    x = input_for(name, shape, torch.float32)
    results = []
    for backend in ("reference", "emulated"):
        module, _ = pair(name, arguments, torch.float32)
        given = x.clone().requires_grad_()
        with gl.use_backend(backend):
            y = first(module(given))
            y.backward(values(tuple(y.shape), y.dtype, 1))
        results.append((y.detach(), given.grad, *(p.grad for p in module.parameters()), *module.buffers()))
    for a, b in zip(*results, strict=True):
        # Two orders of the same sums in float32, of fewer than 1000 terms.
        largest = float(a.abs().max()) if a.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(largest, 1.0))


OTHERS = [
    glt.BatchNormAct2d(6, activation="gelu"),
    glt.BatchNormAct2d(6).eval(),
    glt.ActivationDropout("relu", 0.4),
    glt.ActivationDropout("silu", 0.4, order="before"),
    glt.DropoutAdd(0.4),
    glt.DropPath(0.4),
    glt.AlphaDropout(0.4),
    glt.FeatureAlphaDropout(0.4),
    nn.Sequential(glt.MaxPool2d(2, return_indices=True)),
]


@pytest.mark.parametrize("layout", [torch.clone, channels_last, every_other])
@pytest.mark.parametrize("module", OTHERS, ids=repr)
def test_emulated_kernels_of_what_torch_has_none_of(module, layout):
    inputs = [layout(values((4, 6, 4, 6), torch.float32, seed)) / 16 for seed in range(2)]
    if not isinstance(module, (glt.BatchNormAct2d, glt.DropoutAdd)):
        inputs.pop()
    results = []
    for backend in ("reference", "emulated"):
        given, own = [one.detach().requires_grad_() for one in inputs], copy.deepcopy(module)
        torch.manual_seed(8)
        with gl.use_backend(backend):
            y = own(*given)
            if isinstance(y, tuple):
                y = glt.MaxUnpool2d(2)(*y)
            found = torch.autograd.grad(y, [*given, *own.parameters()], values(tuple(y.shape), y.dtype, 3) / 16)
        results.append((y.detach(), *found, *own.buffers()))
    for a, b in zip(*results, strict=True):
        assert a.stride() == b.stride()
        # Two orders of sums of 96 terms in float32, and activations to a few units in the last place.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_act_is_its_three_steps(activation, training):
    ours = glt.BatchNormAct2d(5, activation=activation).double().train(training)
    theirs = nn.BatchNorm2d(5).double().train(training)
    theirs.weight.data.copy_(torch.tensor([0.5, -1.5, 1.0, 2.0, 0.25]))
    theirs.bias.data.copy_(torch.tensor([0.5, -1.5, 0.0, 2.0, 0.25]))
    theirs.running_var.copy_(torch.tensor([0.5, 1.5, 1.0, 2.0, 0.25]))
    ours.load_state_dict(theirs.state_dict())
    functions = {None: lambda z: z, "leaky_relu": lambda z: nn.functional.leaky_relu(z, 0.01)}
    phi = functions.get(activation) or getattr(nn.functional, activation)
    inputs = [(values((3, 5, 4, 7), seed=seed) / 16).requires_grad_() for seed in (0, 1)]
    others = [one.detach().clone().requires_grad_() for one in inputs]
    y, z = ours(*inputs), phi(theirs(others[0]) + others[1])
    dy = values((3, 5, 4, 7), seed=2) / 16
    found = torch.autograd.grad(y, [*inputs, *ours.parameters()], dy)
    expected = torch.autograd.grad(z, [*others, *theirs.parameters()], dy)
    for a, b in zip((y, *found), (z, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_large_mean_does_not_cost_the_variance():
    x = 1e6 + torch.randn(64, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    layer = glt.BatchNorm2d(3, momentum=1.0)
    layer(x)
    expected = x.double().var((0, 2, 3))
    # float32 keeps 1e6 to 1/32; what is left of the variance, about 1, is right to 1e-4 as the core promises.
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "layer",
    [
        glt.BatchNorm2d(3),
        glt.MaxPool2d(2),
        glt.AvgPool2d(2),
        glt.Dropout(),
        glt.LPPool2d(2, 2),
        glt.AdaptiveMaxPool2d(2),
        glt.AdaptiveAvgPool2d(2),
        glt.BatchNormAct2d(3),
    ],
)
def test_an_empty_batch(layer):
    x = torch.empty(0, 3, 4, 6, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape[0] == 0
    assert x.grad.shape == x.shape
    if isinstance(layer, (glt.BatchNorm2d, glt.BatchNormAct2d)):
        # As torch: the statistics stay, the batch counts.
        assert layer.running_mean.tolist() == [0, 0, 0]
        assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.uint8])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_counter_of_another_dtype(dtype, momentum):
    memory = torch.full((9,), 200, dtype=dtype)
    layer = glt.BatchNorm2d(3, momentum=momentum)
    layer.num_batches_tracked = memory[0]
    layer(torch.randn(2, 3, 4, 4))
    assert memory.tolist() == [201] + [200] * 8


def test_an_eps_that_is_no_number():
    x = torch.randn(4, 3)
    for lib in (glt.functional, nn.functional):
        assert lib.batch_norm(x, None, None, training=True, eps=math.nan).isnan().all()


def test_nothing_at_all_is_normalised_as_torch_does():
    x, none = torch.empty(0), torch.empty(0)
    for lib in (glt.functional, nn.functional):
        assert lib.batch_norm(x, none, none, training=True).shape == (0,)


@pytest.mark.parametrize("layer", [glt.AdaptiveAvgPool2d((0, 2)), glt.AdaptiveMaxPool2d((0, 2))])
def test_an_empty_output_has_no_gradient(layer):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 3, 0, 2)
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_unpooling_inverts_pooling_in_every_format():
    for x in (values((2, 3, 6, 8)), channels_last(values((2, 3, 6, 8)))):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours, theirs = (
            lib.MaxUnpool2d(2)(*lib.MaxPool2d(2, return_indices=True)(one)) for lib, one in ((glt, a), (nn, b))
        )
        assert torch.equal(ours, theirs)
        dy = values((2, 3, 6, 8), seed=4)
        ours.backward(dy), theirs.backward(dy)
        assert torch.equal(a.grad, b.grad)
        assert ours.is_contiguous(memory_format=torch.channels_last) == (x.stride(1) == 1)


def test_lp_pool_takes_the_size_of_negative_numbers():
    x = torch.tensor([[[3.0, -4.0, 5.0]]])
    assert glt.LPPool1d(2, 2, 1)(x).tolist() == [[[5.0, pytest.approx(41**0.5)]]]
    # A window that is cut off counts as if it were whole: 5 * (2 / 1) ** 0.5, as torch has it.
    assert glt.LPPool1d(2, 2, ceil_mode=True)(x)[0, 0, 1].item() == pytest.approx(5 * 2**0.5)
    assert glt.LPPool1d(float("inf"), 2, 1)(x).tolist() == [[[4.0, 5.0]]]


def test_a_lazily_negated_input_is_read_as_its_values():
    x = torch.tensor([[[3.0 + 1j, -4.0 + 2j, 5.0 - 7j, 1.0]]]).conj().imag
    assert x.is_neg()
    assert glt.MaxPool1d(2)(x).tolist() == [[[-1.0, 7.0]]]


@pytest.mark.parametrize(
    ("name", "shape", "arguments"),
    [
        ("max_pool2d", (1, 2, 4, 4), (np.int64(2),)),
        ("max_pool2d", (1, 2, 4, 4), ((np.int64(2), 1), np.int32(2))),
        ("avg_pool2d", (1, 2, 4, 4), (np.int64(2), 2, 0, False, True, np.int64(3))),
        ("lp_pool2d", (1, 2, 4, 4), (2.0, np.int64(2))),
        ("adaptive_avg_pool2d", (1, 2, 4, 4), ((np.int64(2), None),)),
        ("adaptive_avg_pool2d", (4, 5), (1,)),
        ("lp_pool2d", (1, 2, 4, 4), (-1, 2)),
        ("lp_pool3d", (1, 2, 4, 4, 4), (-2.5, 2, 1, True)),
        ("batch_norm", (3, 2, 6, 0), (torch.zeros(2), torch.ones(2))),
        ("dropout", (3,), (False,)),
        ("dropout", (3,), (torch.tensor(0.0),)),
    ],
)
def test_what_torch_takes_too(name, shape, arguments):
    x = values(shape).abs() + 0.5
    found, expected = (getattr(lib, name)(x, *arguments) for lib in (glt.functional, nn.functional))
    torch.testing.assert_close(found, expected)


def test_without_a_counter_nothing_is_averaged_cumulatively():
    for lib in (glt, nn):
        layer = lib.BatchNorm1d(3, momentum=None)
        layer.num_batches_tracked = None
        layer(torch.randn(4, 3))
        assert torch.equal(layer.running_mean, torch.zeros(3))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, r: glt.functional.dropout_add(x, r, 0.5),
        lambda x, r: glt.functional.dropout_add(x, r, 0.5, False),
        lambda x, r: glt.functional.batch_norm(x, None, None, None, None, True, residual=r),
        lambda x, r: glt.functional.batch_norm(x, None, None, None, None, True, residual=r, activation="relu"),
    ],
)
def test_a_sum_and_its_gradients_have_the_inputs_format(call):
    x = channels_last(torch.randn(2, 3, 4, 5)).requires_grad_()
    residual = torch.randn(2, 3, 4, 5, requires_grad=True)
    y = call(x, residual)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for dy in (torch.randn(2, 3, 4, 5), torch.ones(()).expand(2, 3, 4, 5)):
        for gradient in torch.autograd.grad(y, (x, residual), dy, retain_graph=True):
            assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(glt.functional.dropout_add(x, residual, 0.5, False), x + residual)


def test_operations_of_batch_norm_on_what_is_absent():
    statistics = torch.ops.gpu_layers.batch_norm_inference(
        torch.ones(0, 2, 3), torch.zeros(2), torch.ones(2), torch.tensor([3.0, 4.0]), None, None, 0.0, "relu", False
    )[1]
    assert torch.equal(statistics, torch.tensor([[0.0, 0], [1, 1], [1, 1], [3, 4], [0, 0]]))
    x, dy = values((2, 2, 3), torch.float32), values((2, 2, 3), torch.float32, 1)
    statistics = torch.tensor([[0.0, 0], [1, 1], [1, 1], [1, 1], [0, 0]])
    for training in (False, True):
        *_, found = torch.ops.gpu_layers.batch_norm_backward(
            dy, x, None, None, None, statistics, "relu", training, [True] * 4, False
        )
        assert torch.equal(found, torch.where(x > 0, dy, 0.0))


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("layout", [torch.clone, channels_last])
def test_a_clipped_unit_passes_no_gradient_were_it_infinite(layout, backend, order):
    infinity, nan = float("inf"), float("nan")
    x = layout(torch.tensor([-1.0, -2.0, 3.0, nan, 0.0, -1.0]).reshape(1, 6, 1, 1)).requires_grad_()
    dy = torch.tensor([-1.0, infinity, 2.0, 3.0, -5.0, nan]).reshape(1, 6, 1, 1)
    (expected,) = torch.autograd.grad(torch.relu(x), x, dy)
    for create_graph in (False, True):
        with gl.use_backend(backend):
            y = glt.functional.activation_dropout(x, "relu", 0.0, order=order)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=create_graph)
        assert torch.equal(dx, expected)
        assert not dx.signbit().any()
