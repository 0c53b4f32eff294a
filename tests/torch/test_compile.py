"""torch.compile, torch.export and make_fx: one graph, eager's values."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_function
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import gpu_layers as gl
import gpu_layers.torch as glt


class Network(nn.Module):
    """Every kind of module once."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.cumulative = glt.BatchNormAct2d(4), glt.BatchNorm2d(4, momentum=None)
        self.max, self.avg = glt.MaxPool2d(2), glt.AvgPool2d(2, 1, ceil_mode=True)
        self.lp, self.adaptive_max, self.adaptive_avg = (
            glt.LPPool2d(2.0, 2, ceil_mode=True),
            glt.AdaptiveMaxPool2d(3),
            glt.AdaptiveAvgPool2d(1),
        )
        self.unpool, self.indexed = glt.MaxUnpool2d(2), glt.MaxPool2d(2, return_indices=True)
        self.channels, self.elements, self.samples = glt.Dropout2d(0.3), glt.Dropout(0.2), glt.DropPath(0.3)
        self.alpha, self.activated, self.added = (
            glt.AlphaDropout(0.1),
            glt.ActivationDropout("gelu", 0.1),
            glt.DropoutAdd(0.2),
        )
        self.linear = nn.Linear(4, 5)

    def forward(self, x):
        h = self.conv(x)
        h = self.norm(h, residual=h)
        h = self.cumulative(self.channels(self.max(h)))
        h = self.samples(self.elements(self.avg(h)))
        h = self.alpha(self.added(h, h))
        g = self.adaptive_avg(h) + self.adaptive_avg(self.adaptive_max(h))
        values, indices = self.indexed(h)
        g = (
            g
            + self.adaptive_avg(self.lp(h.abs() + 0.1))
            + self.adaptive_avg(self.unpool(values, indices, h.shape[-2:]))
        )
        return self.linear(self.activated(g.flatten(1)))


def networks(training):
    torch.manual_seed(0)
    eager = Network().train(training)
    return eager, copy.deepcopy(eager)


def compare(eager, compiled, module, shape, masks):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    results = []
    for call in (eager, compiled):
        torch.manual_seed(3)
        y = call(x)
        y.sum().backward()
        results.append(y)
    if not masks:
        return
    # float32, some thousand sums of differently fused steps.
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    for p, q in zip(eager.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)
    for p, q in zip(eager.buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_a_symbolic_trace_has_the_modules_themselves():
    eager, module = networks(True)
    traced = torch.fx.symbolic_trace(module)
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert called == {name for name, _ in module.named_children()}
    x = torch.randn(2, 3, 16, 18)
    for training in (True, False):
        results = []
        for network in (eager, traced):
            torch.manual_seed(3)
            results.append(network.train(training)(x))
        assert torch.equal(*results)
    assert all(torch.equal(*pair) for pair in zip(eager.buffers(), module.buffers(), strict=True))
    # A module alone is not within a graph.
    with pytest.raises(TypeError, match="Proxy"):
        torch.fx.symbolic_trace(glt.Dropout())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_with_eagers_masks(backend, dynamic, training):
    torch._dynamo.reset()
    eager, module = networks(training)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=counter)
    shapes = [(2, 3, 16, 18), (3, 3, 20, 22), (5, 3, 23, 17)] if dynamic else [(2, 3, 16, 18)]
    counts = []
    for shape in shapes:
        compare(eager, compiled, module, shape, True)
        counts.append(counter.frame_count)
    # One compilation for all sizes. (Of torch's own modules too the backend may be asked twice for the first one, once
    # their floats turn out to be constants.)
    assert counts == counts[:1] * len(shapes)


def test_inductor():
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = nn.Sequential(glt.BatchNormAct2d(3), glt.MaxPool2d(2), glt.ActivationDropout("silu", 0.5), glt.Dropout(0.5))
    module = copy.deepcopy(eager)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(module, fullgraph=True, backend="inductor")
        x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
        compare(eager, compiled, module, (2, 3, 8, 8), True)
        assert compiled(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_of_every_module(dynamic, training):
    torch._dynamo.reset()
    eager, module = networks(training)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="inductor")
    for shape in [(2, 3, 16, 18), (3, 3, 20, 22)] if dynamic else [(2, 3, 16, 18)]:
        compare(eager, compiled, module, shape, not training)


@pytest.mark.parametrize("training", [True, False])
def test_export_with_a_dynamic_batch(training):
    eager, module = networks(training)
    x = torch.randn(2, 3, 16, 18)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    assert any("gpu_layers" in str(node.target) for node in program.graph.nodes)
    wide = torch.randn(5, 3, 16, 18)
    torch.manual_seed(1)
    expected = eager(wide)
    torch.manual_seed(1)
    torch.testing.assert_close(program.module()(wide), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        glt.MaxPool2d(3, 2, 1),
        glt.AvgPool2d(3, 2, 1, True),
        glt.LPPool2d(2, 2),
        glt.AdaptiveAvgPool2d(1),
        glt.AdaptiveMaxPool2d(2),
        glt.BatchNorm2d(3),
        glt.BatchNorm2d(3, momentum=None),
    ],
)
def test_export_with_a_dynamic_image(layer):
    names = {axis: torch.export.Dim(name, min=8) for axis, name in ((0, "n"), (2, "h"), (3, "w"))}
    expected = copy.deepcopy(layer)
    program = torch.export.export(layer, (torch.randn(9, 3, 16, 18),), dynamic_shapes=(names,))
    x = torch.randn(10, 3, 31, 23)
    torch.testing.assert_close(program.module()(x), expected(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(mode):
    def function(x):
        return glt.functional.max_pool2d(glt.functional.dropout(x), 2)

    graph = make_fx(function, tracing_mode=mode)(torch.randn(2, 3, 8, 8)).graph
    names = [str(node.target) for node in graph.nodes]
    assert "gpu_layers.dropout.default" in names
    assert "gpu_layers.max_pool.default" in names


def test_a_generator_of_its_own_is_refused():
    torch._dynamo.reset()
    layer = torch.compile(glt.Dropout(generator=gl.Generator(1)), fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match=r"gpu_layers\.Generator"):
        layer(torch.ones(3))


def test_a_checkpoint_within_a_compiled_graph_counts_once():
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Conv2d(3, 4, 3), glt.BatchNorm2d(4), glt.Dropout(0.4), nn.Conv2d(4, 4, 1))
    module = copy.deepcopy(eager)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x):
        return checkpoint(module, x, use_reentrant=False)

    compare(eager, compiled, module, (2, 3, 8, 8), True)
    assert module[1].num_batches_tracked == 1


def test_dispatch_modes_see_the_operations():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Listed(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen = (*self.seen, str(function))
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with Listed() as listed:
        glt.MaxPool2d(2)(glt.BatchNorm2d(3)(x)).sum().backward()
    assert {"gpu_layers.batch_norm_training.default", "gpu_layers.max_pool_backward.default"} <= set(listed.seen)


@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_subclasses_keep_their_type(backend):
    class Named(torch.Tensor):
        pass

    x = torch.randn(2, 3, 4, 4).as_subclass(Named).requires_grad_()
    with gl.use_backend(backend):
        for layer in (glt.MaxPool2d(2), glt.BatchNorm2d(3), glt.Dropout(generator=gl.Generator(1))):
            y = layer(x)
            assert type(y) is Named
            (dx,) = torch.autograd.grad(y.square().sum(), x)
            assert dx.shape == x.shape


def test_script_is_refused():
    with pytest.raises(RuntimeError):
        torch.jit.script(glt.MaxPool2d(2))


@pytest.mark.parametrize("name", ["max_pool2d", "lp_pool2d", "batch_norm", "avg_pool2d"])
def test_transforms_within_a_compiled_graph(name):
    torch._dynamo.reset()
    arguments = {"lp_pool2d": (2.0, 2), "batch_norm": (None, None, None, None, True)}.get(name, (2,))

    def call(lib, x):
        return getattr(lib, name)(x, *arguments).square().sum()

    x = torch.rand(4, 2, 3, 4, 4) + 0.5
    gradient = torch.func.grad(lambda one: call(glt.functional, one))
    expected = torch.stack([torch.func.grad(lambda one: call(nn.functional, one))(one) for one in x])
    for function in (torch.vmap(gradient), lambda x: torch.stack([gradient(one) for one in x])):
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "trace",
    [
        lambda function, x: make_fx(function)(x),
        lambda function, x: make_fx(function, tracing_mode="symbolic")(x),
        lambda function, x: make_fx(function, pre_dispatch=True)(x),
        lambda function, x: torch.jit.trace(function, x),
        lambda function, x: aot_function(function, lambda graph, _: graph)(x),
        lambda function, x: aot_function(function, lambda graph, _: graph)(x.clone().requires_grad_()),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_generator_of_its_own_is_refused_by_every_tracer(trace):
    generator = gl.Generator(3)
    with pytest.raises(RuntimeError, match="compiled or captured graph"):
        trace(lambda x: glt.functional.dropout(x, 0.5, generator=generator), torch.ones(6, 4))
    assert generator.offset == 0


@pytest.mark.parametrize("name", ["avg_pool2d", "max_pool2d", "batch_norm"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_vmap_within_a_compiled_graph(backend, name):
    def each(x):
        if name == "batch_norm":
            return glt.functional.batch_norm(x[None], None, None, training=True)[0]
        return getattr(glt.functional, name)(x, 2)

    def gradient(x):
        return torch.vmap(torch.func.grad(lambda one: each(one).square().sum()))(x)

    x, results = torch.randn(4, 3, 6, 6), []
    for call in (lambda function: function, lambda one: torch.compile(one, backend=backend, fullgraph=True)):
        given = x.clone().requires_grad_()
        y = call(torch.vmap(each))(given)
        y.square().sum().backward()
        results.append((y, given.grad, call(gradient)(x)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    operation = torch.ops.gpu_layers.avg_pool
    found = torch.vmap(lambda one: operation(one, [2, 2], [2, 2], [0, 0], [1, 1], False, [], True, None, False))(x)
    torch.testing.assert_close(found, nn.functional.avg_pool2d(x, 2))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("backend", "momentum"), [("eager", 0.1), ("aot_eager", 0.1), ("aot_eager", None)])
def test_a_batch_that_a_compiled_graph_recomputes_counts_once(backend, momentum, reentrant):
    x = torch.randn(4, 3, 5, 5)
    eager, outside, inside = (glt.BatchNorm2d(3, momentum=momentum) for _ in range(3))
    eager(x)

    def around(x):
        return checkpoint(inside, x, use_reentrant=reentrant)

    torch.compile(around, backend=backend, fullgraph=True)(x.clone().requires_grad_()).sum().backward()
    compiled = torch.compile(outside, backend=backend, fullgraph=True)
    checkpoint(compiled, x.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    for layer in (outside, inside):
        for one, other in zip(layer.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("output_size", [2, (None, 3), (3, 2)])
def test_adaptive_maxima_of_any_image_size_are_compiled_once(output_size):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer, eager = (one.AdaptiveMaxPool2d(output_size, True) for one in (glt, nn))
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for size in (16, 20, 32, 70):
        a, b = (torch.randn(2, 3, size, size + 3).requires_grad_() for _ in range(2))
        b.data.copy_(a.data)
        found, expected = compiled(a), eager(b)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        found[0].square().sum().backward()
        expected[0].square().sum().backward()
        assert torch.equal(a.grad, b.grad)
    assert counter.frame_count == 1


def test_adaptive_maxima_are_exported_for_any_image_size():
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim("width", min=8)}
    x = torch.randn(1, 3, 9, 12)
    program = torch.export.export(glt.AdaptiveMaxPool2d((None, 3)), (x,), dynamic_shapes=(sizes,))
    x = torch.randn(1, 3, 700, 900)
    assert torch.equal(program.module()(x), nn.AdaptiveMaxPool2d((None, 3))(x))
