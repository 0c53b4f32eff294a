"""Gradients: first, second, only those needed; what is kept for them; torch.func; forward mode."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import gpu_layers as gl
import gpu_layers.torch as glt
from gpu_layers.torch import functional as F  # noqa: N812
from gpu_layers.torch.modules import sync_batch_norm
from gpu_layers.torch.modules.sync_batch_norm import _Synchronized
from tests.torch.layers import channels_last, first, values

X = values((2, 2, 3, 4)) / 4
R = values((2, 2, 3, 4), seed=1) / 4
W, B = torch.tensor([0.75, -1.25], dtype=torch.float64), torch.tensor([0.5, -0.25], dtype=torch.float64)
MEAN, VAR = torch.tensor([0.25, -0.5], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
ACTIVATIONS = ("relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu")


def seeded(function):
    def call(*inputs):
        torch.manual_seed(1)
        return function(*inputs)

    return call


def leaves(inputs):
    """The same values, with gradients of their own."""
    return [one.detach().clone().requires_grad_() for one in inputs]


def batch_norm(training, activation):
    def call(x, w, b, r):
        return F.batch_norm(x, MEAN.clone(), VAR.clone(), w, b, training, residual=r, activation=activation)

    return call


INDICES = torch.tensor([[[[0, 3]], [[2, 1]]]])
FUNCTIONS = {
    "dropout": (seeded(lambda x: F.dropout(x, 0.4)), X),
    "dropout2d": (seeded(lambda x: F.dropout2d(x, 0.4)), X),
    "alpha_dropout": (seeded(lambda x: F.alpha_dropout(x, 0.4, True)), X),
    "drop_path": (seeded(lambda x: F.drop_path(x, 0.4)), X),
    "dropout_add": (seeded(lambda x, r: F.dropout_add(x, r, 0.4)), X, R),
    "dropout_add, channels last": (seeded(lambda x, r: F.dropout_add(x, r, 0.4)), channels_last(X), R),
    **{
        f"{name} dropout, channels last": (seeded(lambda x, a=name: F.activation_dropout(x, a, 0.4)), channels_last(X))
        for name in ("relu", "gelu")
    },
    "batch_norm, channels last": (batch_norm(True, None), channels_last(X), W, B, R),
    **{
        f"{name} {order} dropout": (seeded(lambda x, a=name, o=order: F.activation_dropout(x, a, 0.4, order=o)), X)
        for name in ACTIVATIONS
        for order in ("after", "before")
    },
    **{
        f"batch_norm {name} {training}": (batch_norm(training, name), X, W, B, R)
        for name in (None, *ACTIVATIONS)
        for training in (True, False)
    },
    "batch_norm without parameters": (lambda x: F.batch_norm(x, None, None, training=True), X),
    "batch_norm without bias": (lambda x, w: F.batch_norm(x, None, None, w, training=True), X, W),
    "max_pool2d": (lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 1), 1, True), X),
    "max_pool2d, dilated": (lambda x: F.max_pool2d(x, 2, 1, 0, (2, 1)), X),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, (2, 3)), X),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, (3, 2), (2, 1), (1, 1), True, False), X),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), X),
    "lp_pool2d 1": (lambda x: F.lp_pool2d(x, 1, 2), X),
    "lp_pool2d 2": (lambda x: F.lp_pool2d(x, 2, 2, 1), X),
    "lp_pool2d 3.5, cut off": (lambda x: F.lp_pool2d(x, 3.5, 2, 2, True), X),
    "lp_pool2d inf": (lambda x: F.lp_pool2d(x, float("inf"), 2, 1), X),
    "max_unpool2d": (lambda x: F.max_unpool2d(x, INDICES, (2, 2), (2, 2), output_size=(3, 4)), X[:1, :, :1, :2]),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_first_and_second_derivatives(name):
    function, *inputs = FUNCTIONS[name]
    inputs = leaves(inputs)
    # Batched gradients are those of is_grads_batched=True and of jacobian(vectorize=True).
    assert gradcheck(function, inputs, fast_mode=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, fast_mode=True, check_batched_grad=True)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_a_gradient_that_has_a_graph_is_that_without_one(name):
    # Of other operations, which round in another order: sums of some dozen products of float64.
    function, *inputs = FUNCTIONS[name]
    given = leaves(inputs)
    for a, b in zip(
        *(torch.autograd.grad(function(*given).sum(), given, create_graph=g) for g in (False, True)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["batch_norm gelu True", "lp_pool2d 3.5, cut off", "max_pool2d", "gelu after dropout"])
def test_every_element_of_both_derivatives(name):
    function, *inputs = FUNCTIONS[name]
    inputs = leaves(one[..., :3] if one.dim() > 1 else one for one in inputs)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_two_backwards_have_the_same_bits(name):
    function, *inputs = FUNCTIONS[name]
    found = []
    for _ in range(2):
        given = leaves(one if "batch_norm" in name else one.float() for one in inputs)
        y = function(*given)
        found.append(torch.autograd.grad(y, given, values(tuple(y.shape), y.dtype, 3)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


KEPT = [
    # Layer, inputs, and bytes an element of the output that are kept beside the module's own inputs.
    (glt.Dropout(), 1, 0),
    (glt.Dropout2d(), 1, 0),
    (glt.AlphaDropout(), 1, 0),
    (glt.DropPath(0.25), 1, 0),
    (glt.ActivationDropout("relu"), 1, 0),
    (glt.ActivationDropout("gelu"), 1, 0),
    (glt.DropoutAdd(), 2, 0),
    (glt.AvgPool2d(2), 1, 0),
    (glt.AdaptiveAvgPool2d(2), 1, 0),
    (glt.BatchNorm2d(8), 1, 0),
    (glt.BatchNormAct2d(8), 2, 0),
    (glt.BatchNormAct2d(8).eval(), 2, 0),
    (glt.MaxPool2d(2), 1, 1),
    (glt.AdaptiveMaxPool2d(4), 1, 1),
    (glt.MaxPool2d(17, 1), 1, 2),
]


@pytest.mark.parametrize(("layer", "inputs", "bytes_an_output"), KEPT, ids=[repr(one[0]) for one in KEPT])
def test_what_is_kept_for_backward(layer, inputs, bytes_an_output):
    given = [torch.randn(3, 8, 20, 20, requires_grad=True) for _ in range(inputs)]
    own = {one.data_ptr() for one in (*given, *layer.parameters())}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(*given)
    # 8 bytes are a seed; 5 x 4 bytes a channel are mean, variance, 1 / deviation, weight and bias.
    assert sum(kept) <= bytes_an_output * y.numel() + max(8, 5 * 4 * 8)
    y.sum().backward()


def test_a_residual_that_autocast_casts_is_kept_as_it_is():
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    residual = torch.randn(2, 3, 4, 4, requires_grad=True)
    layer, kept = glt.BatchNormAct2d(3, activation="gelu"), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one)
    with torch.autocast("cpu"), hooks:
        y = layer(x, residual)
    assert any(one is residual or one.data_ptr() == residual.data_ptr() for one in kept)
    assert sum(one.dtype is torch.bfloat16 for one in kept) == 1
    cast = residual.detach().bfloat16().requires_grad_()
    z = layer(x, cast)
    dy = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, residual, dy)
    (expected,) = torch.autograd.grad(z, cast, dy)
    assert torch.equal(y, z)
    assert found.dtype is torch.float32
    assert torch.equal(found, expected.float())


def test_nothing_outlives_its_graph():
    layer = glt.BatchNormAct2d(3)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    h = x * 1
    alive = weakref.ref(h)
    y = glt.MaxPool2d(2)(layer(h))
    del h
    y.sum().backward()
    del y
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("layer", [glt.BatchNorm2d(3), glt.MaxPool2d(2)])
def test_what_only_the_backward_needs_goes_with_the_saved_tensors(layer):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    assert y.grad_fn.kept is not None
    (second,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(first, second)
    assert y.grad_fn.kept is None
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(dy)


@pytest.mark.parametrize("layer", [glt.BatchNorm2d(3), glt.LPPool2d(2, 2), glt.ActivationDropout("gelu")])
def test_an_input_changed_in_place_is_noticed(layer):
    h = torch.randn(2, 3, 4, 4, requires_grad=True) * 1
    y = layer(h)
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_running_statistics_may_change_before_backward():
    layer = glt.BatchNorm2d(3).eval()
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    y = layer(x)
    layer.train()(torch.randn(4, 3, 2, 2) * 9)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.full_like(x, 1 / (1 + 1e-5) ** 0.5))
    assert layer.running_mean._version == nn.BatchNorm2d(3).running_mean._version


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", range(1, 16))
def test_only_the_gradients_that_are_needed_are_computed(wanted, training, monkeypatch):
    flags = [bool(wanted >> bit & 1) for bit in range(4)]
    given = [one.detach().clone().requires_grad_(flag) for one, flag in zip((X, W, B, R), flags, strict=True)]
    full = leaves((X, W, B, R))
    dy = values(tuple(X.shape), seed=5)
    expected = torch.autograd.grad(batch_norm(training, "silu")(*full), full, dy)
    called = []
    for name in (
        "batch_norm_backward",
        "batch_norm_input_gradient",
        "batch_norm_gradient_sums",
        "batch_norm_inference_backward",
    ):
        function = getattr(gl.reference, name)
        monkeypatch.setattr(gl.reference, name, lambda *a, f=function, n=name, **k: called.append(n) or f(*a, **k))
    batch_norm(training, "silu")(*given).backward(dy)
    for one, flag, other in zip(given, flags, expected, strict=True):
        assert (one.grad is not None) == flag
        if flag:
            torch.testing.assert_close(one.grad, other, rtol=1e-12, atol=1e-12)
    inputs, parameters = flags[0] or flags[3], flags[1] or flags[2]
    if not inputs:
        assert called == ["batch_norm_gradient_sums"]
    elif not training:
        assert called == ["batch_norm_inference_backward" if parameters else "batch_norm_input_gradient"]


def test_results_are_no_views_which_a_later_layer_could_not_change():
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 3, 8, 8, dtype=dtype).to(memory_format=memory_format).requires_grad_()
            for layer in (
                glt.BatchNorm2d(3),
                glt.BatchNorm2d(3).eval(),
                glt.MaxPool2d(2),
                glt.AvgPool2d(2),
                glt.Dropout(),
                glt.AdaptiveAvgPool2d(2),
                glt.BatchNormAct2d(3),
            ):
                y = layer(x)
                assert not y._is_view()
                nn.ReLU(inplace=True)(y).sum().backward()
    y = glt.MaxPool2d(2)(torch.randn(3, 8, 8, requires_grad=True))
    assert not y._is_view()


def test_backward_runs_where_its_forward_ran(monkeypatch):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with gl.use_backend("emulated"):
        emulated = glt.MaxPool2d(2)(x)
    plain = glt.MaxPool2d(2)(x)
    calls = []
    original = gl.reference.max_pool_backward
    monkeypatch.setattr(gl.reference, "max_pool_backward", lambda *a: calls.append(1) or original(*a))
    emulated.sum().backward()
    assert not calls
    with gl.use_backend("emulated"):
        plain.sum().backward()
    assert calls


# ---- torch.func


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        glt.BatchNorm2d(4, track_running_stats=False),
        glt.MaxPool2d(2),
        glt.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 2),
    ).double()


def test_func_grad_and_vmap():
    net, x = network(), torch.randn(3, 2, 3, 10, 10, dtype=torch.float64)
    parameters = dict(net.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, x[0])
    loss(parameters, x[0]).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.vmap(lambda one: loss(parameters, one))(x), torch.stack([loss(parameters, one) for one in x])
    )
    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    singly = [torch.func.grad(loss)(parameters, one) for one in x]
    for name in each:
        torch.testing.assert_close(each[name], torch.stack([one[name] for one in singly]))


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("name", ["max_pool2d", "max_unpool2d", "batch_norm gelu True", "dropout", "lp_pool2d 2"])
def test_a_vjp_is_asked_for_when_its_transformation_is_over(name, backend):
    function, *inputs = FUNCTIONS[name]
    with gl.use_backend(backend):
        y, vjp = torch.func.vjp(function, *inputs)
        found = vjp(torch.ones_like(y))
        given = leaves(inputs)
        expected = torch.autograd.grad(function(*given).sum(), given)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_func_second_derivatives():
    def function(x):
        return F.avg_pool2d(F.lp_pool2d(x.square(), 2.0, 2), 2).sum()

    def theirs(x):
        return nn.functional.avg_pool2d(nn.functional.lp_pool2d(x.square(), 2.0, 2), 2).sum()

    x = torch.rand(1, 1, 4, 4, dtype=torch.float64) + 0.1
    found = torch.func.jacrev(torch.func.jacrev(function))(x)
    torch.testing.assert_close(found, torch.autograd.functional.hessian(theirs, x))


def nested(function):
    """First derivatives in a second one."""

    def gradient(*inputs):
        return torch.func.grad(lambda *given: function(*given).square().sum())(*inputs)

    return torch.func.grad(lambda *given: gradient(*given).square().sum())


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_functionalize(name):
    function, *inputs = FUNCTIONS[name]
    for call in (function, torch.func.grad(lambda *given: function(*given).square().sum()), nested(function)):
        torch.testing.assert_close(torch.func.functionalize(call)(*inputs), call(*inputs), rtol=0, atol=0)
    if not name.startswith("batch_norm"):
        mapped = torch.vmap(torch.func.functionalize(function), randomness="same")
        torch.testing.assert_close(mapped(*[one[None] for one in inputs])[0], function(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_functionalize_counts_a_batch(momentum):
    layer, own = (glt.BatchNorm2d(3, momentum=momentum) for _ in range(2))
    buffers = {name: one.clone() for name, one in layer.named_buffers()}
    x = torch.randn(4, 3, 5, 5)

    def given(buffers, x):
        return torch.func.functional_call(layer, buffers, (x,))

    y = torch.func.functionalize(given)(buffers, x)
    assert torch.equal(y, own(x))
    assert all(torch.equal(buffers[name], one) for name, one in own.named_buffers())
    assert layer.num_batches_tracked == 0
    # And where the layer holds them itself, with gradients on either side.
    functionalize, grad = torch.func.functionalize, torch.func.grad
    expected = grad(lambda x: own(x).pow(3).sum())(x)
    for call in (
        functionalize(grad(lambda x: layer(x).pow(3).sum())),
        grad(lambda x: functionalize(layer)(x).pow(3).sum()),
    ):
        layer.reset_running_stats()
        layer(x)
        assert torch.equal(call(x), expected)
        assert all(torch.equal(*pair) for pair in zip(layer.buffers(), own.buffers(), strict=True))


def test_vmap_of_dropout_follows_randomness():
    x = torch.ones(4, 1000)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(F.dropout)(x)
    same = torch.vmap(F.dropout, randomness="same")(x)
    other = torch.vmap(F.dropout, randomness="different")(x)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(other[0], other[1])
    generator = gl.Generator(5)
    for randomness in ("error", "different"):
        with pytest.raises(RuntimeError, match="randomness"):
            torch.vmap(lambda x: F.dropout(x, generator=generator), randomness=randomness)(x)
    same = torch.vmap(lambda x: F.dropout(x, generator=generator), randomness="same")(x)
    assert torch.equal(same[0], same[1])
    assert generator.offset == 1


@pytest.mark.parametrize(
    "name", ["max_pool2d", "adaptive_avg_pool2d", "lp_pool2d 2", "dropout2d", "batch_norm, training"]
)
def test_vmap_over_samples_of_any_strides(name):
    function = {**THROUGH_BACKWARD, "batch_norm, training": FORWARD_MODE["batch_norm"]}.get(name) or FUNCTIONS[name][0]
    x = values((2, 4, 3, 4, 5))
    for given, axis in ((x, 1), (x.movedim(0, -1), -1), (x.movedim(2, -1).contiguous().movedim(-1, 2), 0)):
        found = torch.vmap(function, in_dims=axis, randomness="same")(given)
        each = [function(one) for one in given.unbind(axis)]
        torch.testing.assert_close(found, torch.stack(each))


@pytest.mark.parametrize("name", ["max_pool2d", "lp_pool2d 2", "dropout2d", "batch_norm without parameters"])
def test_vmap_over_no_samples(name):
    x = torch.ones(0, 2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    y = torch.vmap(FUNCTIONS[name][0], randomness="same")(x)
    assert y.shape == (0, *FUNCTIONS[name][0](torch.ones(2, 3, 4, 5, dtype=torch.float64)).shape)
    y.sum().backward()
    assert x.grad.shape == x.shape
    gradient = torch.func.grad(lambda one: FUNCTIONS[name][0](one).sum())
    assert torch.vmap(gradient, randomness="same")(x.detach()).shape == x.shape


@pytest.mark.filterwarnings("error")
def test_vmap_over_indices():
    x = values((3, 2, 2, 4, 4))
    found = torch.vmap(lambda one: F.max_pool2d(one, 2, return_indices=True))(x)
    for one, other in zip(found, F.max_pool2d(x.flatten(0, 1), 2, return_indices=True), strict=True):
        assert torch.equal(one.flatten(0, 1), other)


def test_vmap_over_stacked_modules():
    layers = [glt.BatchNorm2d(3, track_running_stats=False) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = values((2, 3, 4, 4), torch.float32)

    def call(parameters, buffers, x):
        return torch.func.functional_call(layers[0], (parameters, buffers), (x,))

    found = torch.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(found, torch.stack([layer(x) for layer in layers]))


def test_vmap_over_a_training_batch_norm_needs_statistics_for_each():
    layer, x = glt.BatchNorm1d(4), values((3, 5, 4), torch.float32)
    with pytest.raises(RuntimeError, match="running_mean or running_var"):
        torch.vmap(layer)(x)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(4))
    layers = [glt.BatchNorm1d(4) for _ in x]
    parameters, buffers = torch.func.stack_module_state(layers)

    def call(parameters, buffers, x):
        return torch.func.functional_call(layer, (parameters, buffers), (x,))

    torch.vmap(call)(parameters, buffers, x)
    for one, own in zip(x, layers, strict=True):
        own(one)
    torch.testing.assert_close(buffers["running_mean"], torch.stack([own.running_mean for own in layers]))


def test_vmap_over_an_evaluating_batch_norm():
    layer = glt.BatchNorm2d(3).eval()
    x = torch.randn(5, 3, 4, 4)
    found = torch.vmap(lambda one: layer(one[None])[0])(x)
    torch.testing.assert_close(found, layer(x))


FORWARD_MODE = {
    "dropout": F.dropout,
    "in place": lambda x: F.dropout(x * 1, inplace=True),
    "dropout_add": lambda x: F.dropout_add(x, x),
    "activation_dropout": lambda x: F.activation_dropout(x, "relu"),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "batch_norm, evaluation": lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3)),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "lp_pool2d": lambda x: F.lp_pool2d(x, 2.0, 2),
    "lp_pool2d inf": lambda x: F.lp_pool2d(x, float("inf"), 2),
    "max_unpool2d": lambda x: F.max_unpool2d(x, torch.zeros(2, 3, 4, 4, dtype=torch.int64), 1),
}


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("name", list(FORWARD_MODE))
def test_forward_mode_is_refused_not_dropped(name, requires_grad):
    function, x = FORWARD_MODE[name], torch.randn(2, 3, 4, 4, requires_grad=requires_grad)
    with forward_ad.dual_level(), pytest.raises(RuntimeError):
        function(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(RuntimeError):
        torch.func.jvp(function, (x.detach(),), (torch.ones_like(x),))


THROUGH_BACKWARD = {
    **FORWARD_MODE,
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "synchronized": lambda x: _Synchronized.apply(x, None, None, 1e-5, False, None)[0],
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", list(THROUGH_BACKWARD))
def test_forward_mode_through_a_backward_is_right_or_refused(name, create_graph, monkeypatch):
    monkeypatch.setattr(sync_batch_norm, "_gathered", lambda values, group: values[None])
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = THROUGH_BACKWARD[name](x)
    dy, tangent = torch.randn_like(y), torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, tangent, retain_graph=True)
    with forward_ad.dual_level():
        refused = None
        try:
            (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(dy, tangent), create_graph=create_graph)
        except RuntimeError as error:
            refused = str(error)
        if refused is None:
            # A backward is linear in dy.
            torch.testing.assert_close(forward_ad.unpack_dual(dx).tangent, expected, rtol=1e-5, atol=1e-6)
        else:
            assert "forward" in refused


@pytest.mark.parametrize("transform", [lambda function: function, torch.func.grad, nested])
@pytest.mark.parametrize("name", ["dropout", "batch_norm", "max_pool2d"])
def test_forward_mode_is_refused_within_a_compiled_graph(name, transform):
    def call(x):
        y = FORWARD_MODE[name](x)
        return y.square().sum() if transform is torch.func.grad else y

    def tangent(x):
        return torch.func.jvp(transform(call), (x,), (torch.ones_like(x),))[1]

    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.compile(tangent, backend="aot_eager")(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("name", sorted(FORWARD_MODE.keys() - {"in place"}))
def test_nested_gradients_within_a_compiled_graph(name):
    torch._dynamo.reset()
    x = values((2, 3, 4, 4), torch.float32) / 4
    results = []
    for call in (nested(FORWARD_MODE[name]), torch.compile(nested(FORWARD_MODE[name]), backend="aot_eager")):
        torch.manual_seed(1)
        results.append(call(x))
    torch.testing.assert_close(*results)
    assert results[0].abs().sum() > 0


def test_second_order_by_create_graph_in_half_types():
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    layer = glt.BatchNormAct2d(3, activation="gelu")
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    assert dx.dtype is torch.bfloat16
    dx.square().sum().backward()
    assert x.grad.dtype is torch.bfloat16
    assert first(x.grad).isfinite().all()
