"""Masks: where their numbers come from, and what they are."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import checkpoint

import gpu_layers as gl
import gpu_layers.torch as glt
from gpu_layers.runtime.backend import _Choice, back_on
from gpu_layers.torch import functional, random, registry
from tests.torch.layers import channels_last, every_other

P = 0.375


def expected_mask(shape, seed, offset=0, axes=None):
    """True where kept: of the core's contract, over the leading axes."""
    lead = shape[: len(shape) if axes is None else axes]
    keep = gl.ops.dropout_mask(int(np.prod(lead)), P, seed, offset).reshape(lead)
    keep = torch.from_numpy(keep.reshape(*lead, *(1,) * (len(shape) - len(lead))))
    return keep.expand(shape)


LAYERS = [
    (glt.Dropout, (5, 7, 3), None),
    (glt.Dropout, (2, 3, 5, 4), None),
    (glt.Dropout1d, (3, 5, 4), 2),
    (glt.Dropout1d, (5, 4), 1),
    (glt.Dropout2d, (2, 5, 4, 3), 2),
    (glt.Dropout3d, (2, 5, 2, 3, 2), 2),
    (glt.Dropout3d, (5, 2, 3, 2), 1),
    (glt.DropPath, (9, 4, 2), 1),
]


@pytest.mark.parametrize("layout", [lambda x: x, every_other, lambda x: x.t().contiguous().t() if x.dim() == 2 else x])
@pytest.mark.parametrize(("kind", "shape", "axes"), LAYERS)
def test_torchs_generator_gives_the_seed(kind, shape, axes, layout):
    x = layout(torch.ones(shape))
    torch.manual_seed(11)
    y = kind(P)(x)
    torch.manual_seed(11)
    seed = int(torch.randint(0, 2**63 - 1, ()))
    kept = expected_mask(shape, seed, axes=axes)
    assert torch.equal(y, torch.where(kept, torch.tensor(1 / (1 - P)), torch.tensor(0.0)))


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize(("kind", "shape", "axes"), LAYERS)
def test_a_generator_gives_the_cores_masks(kind, shape, axes, backend):
    generator = gl.Generator(2**64 - 3, 2**64 - 1)
    layer = kind(P, generator=generator)
    state = torch.get_rng_state()
    x = torch.ones(shape, requires_grad=True)
    with gl.use_backend(backend):
        results = [layer(x) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    for y, offset in zip(results, (2**64 - 1, 0), strict=True):
        kept = expected_mask(shape, 2**64 - 3, offset, axes)
        assert torch.equal(y != 0, kept)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx, y.detach())
    assert generator.offset == 1


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("shape", [(2, 6, 5, 3), (2, 16, 3, 3), (1, 3, 2, 2, 5)])
@pytest.mark.parametrize(
    "layer",
    [
        glt.Dropout(P),
        glt.ActivationDropout("gelu", P),
        glt.ActivationDropout("relu", P, order="before"),
        glt.ActivationDropout("sigmoid", P, order="before"),
        glt.ActivationDropout("tanh", P).eval(),
    ],
    ids=repr,
)
def test_a_mask_is_of_the_logical_shape_whatever_the_format(layer, shape, backend):
    x, dy = torch.randn(shape), torch.randn(shape)
    results = []
    for given in (x, channels_last(x), every_other(x)):
        torch.manual_seed(5)
        given = given.detach().requires_grad_()
        with gl.use_backend(backend):
            y = layer(given)
        # Of a gradient in either format.
        (dx,) = torch.autograd.grad(y, given, dy, retain_graph=True)
        (other,) = torch.autograd.grad(y, given, channels_last(dy))
        assert torch.equal(dx, other)
        assert dx.stride() == other.stride()
        results.append((y, dx))
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])
    assert all(one.stride() == channels_last(x).stride() for one in results[1])


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_a_training_forward_draws_once_and_others_not_at_all(p):
    torch.manual_seed(3)
    torch.randint(0, 2**63 - 1, ())
    once = torch.get_rng_state()
    for layer, *inputs in (
        (glt.Dropout(p), torch.ones(1000)),
        (glt.Dropout2d(p), torch.ones(2, 3, 4, 4)),
        (glt.AlphaDropout(p), torch.ones(0)),
        (glt.DropPath(p), torch.ones(3, 2)),
        (glt.ActivationDropout("gelu", p), torch.ones(3, 2)),
        (glt.DropoutAdd(p), torch.ones(3, 2), torch.ones(3, 2)),
    ):
        torch.manual_seed(3)
        start = torch.get_rng_state()
        layer.eval()(*inputs)
        assert torch.equal(torch.get_rng_state(), start)
        layer.train()(*inputs)
        assert torch.equal(torch.get_rng_state(), once)


@torch.inference_mode()
def inference_tensor(**options):
    return torch.ones(3, 4, **options)


def dual(call):
    def called(**options):
        with forward_ad.dual_level():
            return call(forward_ad.make_dual(torch.ones(3, 4), torch.ones(3, 4)), **options)

    return called


def with_jvp(call, transform=lambda function: function):
    def called(**options):
        x = torch.ones(3, 4)
        return torch.func.jvp(transform(lambda one: call(one, **options)), (x,), (x,))

    return called


def summed_gradient(call):
    return torch.func.grad(lambda x: call(x).sum())


RAISING = [
    lambda **kw: functional.dropout(torch.ones(3), 1.5, **kw),
    lambda **kw: functional.dropout(torch.ones(3, dtype=torch.int64), **kw),
    lambda **kw: functional.dropout1d(torch.ones(3), **kw),
    lambda **kw: functional.dropout(torch.ones(3, requires_grad=True), inplace=True, **kw),
    lambda **kw: functional.dropout(torch.ones(1, 3).expand(2, 3), inplace=True, **kw),
    lambda **kw: functional.dropout(torch.nested.nested_tensor([torch.ones(2)]), **kw),
    lambda **kw: functional.activation_dropout(torch.nested.nested_tensor([torch.ones(2)]), "relu", **kw),
    # More than an address can tell.
    *(
        lambda call=call, **kw: call(torch.ones(1).expand(2**60), **kw)
        for call in (
            functional.dropout,
            functional.drop_path,
            lambda x, **kw: functional.activation_dropout(x, "gelu", **kw),
            lambda x, **kw: functional.dropout_add(x, x, **kw),
        )
    ),
    lambda **kw: functional.dropout_add(torch.ones(3), torch.ones(4), **kw),
    lambda **kw: functional.dropout_add(torch.ones(3), torch.ones(3).double(), **kw),
    lambda **kw: functional.activation_dropout(torch.ones(3), "softplus", **kw),
    lambda **kw: functional.activation_dropout(inference_tensor(requires_grad=True), "gelu", **kw),
    dual(functional.dropout),
    dual(lambda x, **kw: functional.alpha_dropout(x, 0.5, True, inplace=True, **kw)),
    dual(lambda x, **kw: functional.dropout_add(torch.ones(3, 4), x, **kw)),
    dual(lambda x, **kw: functional.activation_dropout(x, "relu", **kw)),
    with_jvp(functional.drop_path),
    with_jvp(lambda x, **kw: functional.dropout_add(x, x, **kw), torch.vmap),
    with_jvp(lambda x, **kw: functional.activation_dropout(x, "relu", **kw), summed_gradient),
]


@pytest.mark.parametrize("call", RAISING)
def test_a_call_that_raises_draws_nothing(call):
    before, generator = torch.get_rng_state(), gl.Generator(3)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        call()
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        call(generator=generator)
    with pytest.raises(TypeError):
        functional.dropout(torch.ones(3), generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert generator.offset == 0


def test_a_sharded_tensor_is_refused_before_anything_is_drawn():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        x = DTensor.from_local(torch.ones(3, 4), init_device_mesh("cpu", (1,)))
        for call in (
            functional.dropout,
            functional.drop_path,
            lambda x, **kw: functional.dropout(x, inplace=True, **kw),
        ):
            test_a_call_that_raises_draws_nothing(lambda call=call, **kw: call(x, **kw))
            with pytest.raises(NotImplementedError, match="DTensor"):
                call(x)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: x[0],
        lambda x: (x * 1).unbind()[0],
        lambda x: torch.no_grad()(lambda: x[0])(),
        lambda x: inference_tensor(),
    ],
)
def test_a_change_in_place_that_raises_writes_nothing(change):
    given = change(torch.ones(3, 4, requires_grad=True))
    state, generator = torch.get_rng_state(), gl.Generator(3)
    with pytest.raises(RuntimeError) as expected:
        given.mul_(1)
    for options in ({}, {"generator": generator}):
        with pytest.raises(RuntimeError) as found:
            functional.dropout(given, inplace=True, **options)
        assert str(found.value) == str(expected.value)
    assert torch.equal(given, torch.ones_like(given))
    assert torch.equal(torch.get_rng_state(), state)
    assert generator.offset == 0


def test_a_batch_norm_that_raises_updates_nothing():
    layer, x = glt.BatchNorm1d(4), inference_tensor()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        layer(x)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(4))
    with torch.no_grad():
        layer(x)
    assert layer.num_batches_tracked == 1
    layer = glt.BatchNormAct1d(4)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        layer(torch.ones(3, 4), x)
    assert layer.num_batches_tracked == 0
    layer = glt.BatchNorm1d(4)
    with torch.inference_mode():
        layer.weight = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        layer(torch.ones(3, 4))
    assert layer.num_batches_tracked == 0


def test_alpha_dropout_is_torchs_affine_map():
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    torch.manual_seed(2)
    y = glt.AlphaDropout(P)(x)
    torch.manual_seed(2)
    kept = expected_mask((5, 6, 3), int(torch.randint(0, 2**63 - 1, ())))
    alpha = 1.7580993408473766
    a = ((1 - P) * (1 + P * alpha**2)) ** -0.5
    expected = torch.where(kept, a * x + alpha * a * P, torch.tensor(-alpha * a * (1 - P), dtype=torch.float64))
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(glt.AlphaDropout(1.0)(x), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dropout_add_rounds_its_sum_once(dtype):
    x, residual = torch.randn(2, 3, 7, 5).to(dtype), torch.randn(2, 3, 7, 5).to(dtype)
    torch.manual_seed(4)
    y = glt.DropoutAdd(P)(x, residual)
    torch.manual_seed(4)
    kept = expected_mask((2, 3, 7, 5), int(torch.randint(0, 2**63 - 1, ())))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    scaled = torch.where(kept, x.to(wide) * torch.tensor(1 / (1 - P), dtype=wide), torch.zeros((), dtype=wide))
    assert torch.equal(y, (residual.to(wide) + scaled).to(dtype))
    assert torch.equal(glt.DropoutAdd(P).eval()(x, residual), residual + x)


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "identity", None])
def test_activation_dropout_is_its_two_steps(activation, order):
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    phi = getattr(torch.nn.functional, activation) if activation in ("relu", "gelu") else lambda z: z
    torch.manual_seed(6)
    y = glt.ActivationDropout(activation, P, order=order)(x)
    torch.manual_seed(6)
    z = glt.Dropout(P)(phi(x)) if order == "after" else phi(glt.Dropout(P)(x))
    dy = torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(y, z, rtol=1e-13, atol=1e-13)
    (dx,), (expected,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(z, x, dy)
    torch.testing.assert_close(dx, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(glt.ActivationDropout(activation, P).eval()(x), phi(x), rtol=1e-13, atol=1e-13)


def test_in_place():
    x = torch.ones(50, requires_grad=True)
    y = x * 1
    z = glt.Dropout(0.5, inplace=True)(y)
    assert z is y
    z.sum().backward()
    assert torch.equal(x.grad, z.detach())
    # Through a view whose memory is not in order, and a part of a tensor with a graph.
    wide = torch.ones(4, 6)
    glt.Dropout(0.5, True)(wide.t())
    assert set(wide.unique().tolist()) == {0.0, 2.0}
    weight = torch.ones(6, 4, requires_grad=True)
    used = weight * 1
    glt.Dropout(0.5, True)(used[:3])
    used.sum().backward()
    assert torch.equal(weight.grad[3:], torch.ones(3, 4))
    assert set(weight.grad[:3].unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("name", ["Dropout", "Dropout1d"])
def test_in_place_writes_nothing_where_nothing_is_dropped(name):
    """As torch: what was kept for a backward may go on, and a leaf may be given. The draw is made."""
    generator = gl.Generator(0)
    layer = getattr(glt, name)(0.0, inplace=True, generator=generator)
    x = torch.randn(2, 3, 4, requires_grad=True)
    y = x.sigmoid()
    assert layer(y) is y
    y.sum().backward()
    assert layer(x) is x
    assert generator.offset == 2


def test_in_evaluation_the_input_itself_comes_back():
    x = torch.randn(3, 4)
    for layer in (glt.Dropout(), glt.AlphaDropout(), glt.DropPath(0.3)):
        assert layer.eval()(x) is x


def network(generator=None):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        glt.BatchNorm2d(4),
        glt.Dropout(0.4, generator=generator),
        glt.MaxPool2d(2),
        torch.nn.Conv2d(4, 4, 1),
        glt.Dropout2d(0.3, generator=generator),
    )


@pytest.mark.parametrize(
    ("generator", "options"),
    [
        (None, {"use_reentrant": True}),
        (None, {"use_reentrant": False}),
        (gl.Generator(3), {"use_reentrant": False, "context_fn": glt.checkpoint_contexts}),
    ],
)
def test_a_recomputed_forward_has_the_same_masks_and_counts_once(generator, options):
    plain = network(generator)
    again = copy.deepcopy(plain)
    x = torch.randn(2, 3, 8, 8)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(1)
    y = plain(a)
    y.square().sum().backward()
    torch.manual_seed(1)
    z = checkpoint(again, b, **options)
    z.square().sum().backward()
    assert torch.equal(y, z)
    assert torch.equal(a.grad, b.grad)
    for p, q in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for p, q in zip(plain.buffers(), again.buffers(), strict=True):
        assert torch.equal(p, q)
    assert again[1].num_batches_tracked == 1
    if generator is not None:
        assert plain[2].generator.offset == again[2].generator.offset == 2


def test_two_backwards_and_checkpoints_within_checkpoints_replay():
    layer = glt.Dropout(0.5, generator=gl.Generator(9))

    def inner(x):
        return layer(x * 2)

    def outer(x):
        y = checkpoint(inner, layer(x), use_reentrant=False, context_fn=glt.checkpoint_contexts)
        return layer(y).square()

    reference = copy.deepcopy(layer)
    x = torch.randn(40, requires_grad=True)
    y = checkpoint(outer, x, use_reentrant=False, context_fn=glt.checkpoint_contexts)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    second = torch.autograd.grad(y.sum(), x)[0]
    z = reference(reference(reference(x) * 2)).square()
    assert torch.equal(y, z)
    expected = torch.autograd.grad(z.sum(), x)[0]
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_generator_of_its_own_without_contexts_is_refused(reentrant):
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    y = checkpoint(network(gl.Generator(3)), x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="checkpoint_contexts"):
        y.sum().backward()


def test_another_mask_of_the_recomputation_is_used_throughout():
    # Without the state of the generator the recomputed mask is another one: its gradient has to be of that mask.
    linear, layer, masks = torch.nn.Linear(6, 6, bias=False), glt.Dropout(0.5), []

    def branch(x):
        y = layer(x)
        masks.append((y != 0).float())
        return linear(y)

    x = torch.ones(4, 6, requires_grad=True)
    checkpoint(branch, x, use_reentrant=False, preserve_rng_state=False).sum().backward()
    assert not torch.equal(*masks)
    torch.testing.assert_close(x.grad, masks[1] * 2 * linear.weight.sum(0))


def test_layers_that_share_a_generator_share_its_stream():
    generator = gl.Generator(1)
    a, b = glt.Dropout(P, generator=generator), glt.Dropout2d(P, generator=generator)
    a(torch.ones(3)), b(torch.ones(1, 2, 3, 3)), a.eval()(torch.ones(3))
    assert generator.offset == 2
    copied = copy.deepcopy(torch.nn.Sequential(a, b))
    assert copied[0].generator is copied[1].generator is not generator
    assert copied[0].generator.get_state() == generator.get_state()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("hooks", [False, True])
def test_a_default_device_changes_nothing(hooks, compiled):
    def forward(x):
        return functional.alpha_dropout(functional.dropout2d(functional.dropout(x, P), P), P, True)

    x = torch.ones(2, 3, 5, 4)
    results = []
    for device in ("cpu", "meta"):
        torch.manual_seed(7)
        given = x.clone().requires_grad_()
        call = torch.compile(forward, backend="aot_eager", fullgraph=True) if compiled else forward
        with torch.device(device):
            if hooks:
                with torch.autograd.graph.saved_tensors_hooks(lambda one: one, lambda one: one):
                    y = call(given)
            else:
                y = call(given)
            y.sum().backward()
        results.append((y, given.grad))
    torch.manual_seed(7)
    assert torch.equal(results[0][0], forward(x))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_under_a_default_device_a_gpu_draws_as_without():
    with torch.device("meta"):
        assert registry.is_eager(torch.ones(3, device="cpu"))
        stub = SimpleNamespace(get_offset=lambda: 8, set_offset=lambda _: None, initial_seed=lambda: 3)
        assert random._numbers_of_cuda(stub).tolist()[1] == 8
    with BaseTorchFunctionMode():
        assert not registry.is_eager(torch.ones(3))


@pytest.mark.parametrize("generator", [None, gl.Generator(3)])
def test_nothing_is_drawn_where_nothing_can_compute(monkeypatch, generator):
    layers = [glt.Dropout(0.5, generator=generator), glt.DropoutAdd(0.5, generator=generator)]
    layers += [glt.ActivationDropout("relu", 0.5, generator=generator)]
    x, state = torch.ones(3), torch.get_rng_state()
    for layer in layers:
        given = (x, x) if isinstance(layer, glt.DropoutAdd) else (x,)
        with back_on(_Choice("cuda")), pytest.raises(TypeError, match="takes CUDA tensors"):
            layer(*given)
        with monkeypatch.context() as patch:
            patch.setenv("CXX", "no-such-compiler")
            with pytest.raises(RuntimeError, match="no-such-compiler"), gl.use_backend("emulated"):
                layer(*given)
    assert torch.equal(torch.get_rng_state(), state)
    assert generator is None or generator.offset == 0
