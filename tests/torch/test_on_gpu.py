"""CUDA tensors: values, streams, memory, graphs, two devices, random numbers. Needs a GPU, and a torch with CUDA."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

import gpu_layers as gl
import gpu_layers.torch as glt
from tests.torch.layers import CALLS, channels_last, first, pair, values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU: none that this torch can use"),
]

KEY = 0x6770755F6C617973


def step(module, x):
    given = x.detach().requires_grad_()
    result = module(given)
    y = first(result)
    y.backward(values(tuple(y.shape), y.dtype, 1).to(y.device))
    others = result[1:] if isinstance(result, tuple) else ()
    return [y.detach(), *others, given.grad, *(one.grad for one in module.parameters()), *module.buffers()]


@pytest.mark.parametrize("layout", [torch.clone, channels_last])
@pytest.mark.parametrize(("name", "arguments", "shape"), CALLS, ids=[f"{one[0]}{one[1]}" for one in CALLS])
def test_values_are_those_of_the_cpu(name, arguments, shape, layout):
    x = values(shape, torch.float32)
    if layout is channels_last and len(shape) in (4, 5):
        x = channels_last(x)
    expected = step(pair(name, arguments, torch.float32)[0], x)
    found = step(pair(name, arguments, torch.float32)[0].cuda(), x.cuda())
    for a, b in zip(found, expected, strict=True):
        assert a.is_cuda
        assert a.stride() == b.stride()
        # Two orders of the same sums in float32, of fewer than 1000 terms.
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5 * max(float(b.abs().max()), 1.0))


def network(fuse=True):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.375))
    return glt.convert(net, fuse=fuse).cuda()


def test_work_follows_torchs_current_stream():
    net, side = network(), torch.cuda.Stream()
    x, late = torch.randn(4, 3, 32, 32, device="cuda"), torch.zeros(4, 3, 32, 32, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        # Some 0.1 s in which the other stream could run ahead and read zeros.
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        torch.cuda.manual_seed(1)
        found = net[:4](late)
    side.synchronize()
    # A convolution may add in another order; of zeros nothing of this would come.
    torch.testing.assert_close(found, copy.deepcopy(net)[:4](x), rtol=1e-4, atol=1e-4)


def test_backward_runs_on_the_stream_of_its_forward():
    layer, side = glt.MaxPool2d(2), torch.cuda.Stream()
    x = torch.randn(8, 3, 64, 64, device="cuda", requires_grad=True)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        y = layer(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(nn.functional.max_pool2d(x, 2).sum(), x)
    torch.cuda.synchronize()
    assert torch.equal(dx, expected)


def test_a_thread_that_has_not_called_cuda():
    """Nor does torch's allocator there: what it gives was given back before."""
    layer, x = glt.Dropout(generator=gl.Generator(3)), torch.ones(1000, device="cuda")
    layer(x)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(layer, x).result()
    assert torch.equal(found, glt.Dropout(generator=gl.Generator(3, 4))(x))


def test_all_memory_is_torchs():
    import cupy

    pool = cupy.get_default_memory_pool()
    net, x = network(), torch.randn(4, 3, 32, 32, device="cuda", requires_grad=True)
    net(x).sum().backward()
    before = pool.total_bytes()
    torch.cuda.synchronize()
    for _ in range(3):
        net(x).sum().backward()
    assert pool.total_bytes() == before
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    y = glt.Dropout()(x)
    # The result, rounded up to the allocator's 512 bytes, and nothing else.
    assert torch.cuda.max_memory_allocated() - start <= y.numel() * 4 + 512


@pytest.mark.parametrize(("layer", "bytes_an_output"), [(glt.Dropout(), 0), (glt.MaxPool2d(2), 1)])
def test_what_is_kept_for_backward(layer, bytes_an_output):
    x = torch.randn(16, 8, 64, 64, device="cuda", requires_grad=True)
    layer(x)
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    y = layer(x)
    kept = torch.cuda.memory_allocated() - start - y.numel() * y.element_size()
    assert kept <= bytes_an_output * y.numel() + 2 * 512


def test_a_mask_is_of_torchs_generator():
    torch.cuda.manual_seed(11)
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    for offset in (0, 4):
        assert generator.get_offset() == offset
        y = glt.Dropout(0.375)(torch.ones(1000, device="cuda"))
        kept = torch.from_numpy(gl.ops.dropout_mask(1000, 0.375, 11 ^ KEY, offset))
        assert torch.equal((y != 0).cpu(), kept)
    state = torch.cuda.get_rng_state()
    y = glt.Dropout(0.375)(torch.ones(1000, device="cuda"))
    torch.cuda.set_rng_state(state)
    assert torch.equal(glt.Dropout(0.375)(torch.ones(1000, device="cuda")), y)


@pytest.mark.parametrize("make", [glt.Dropout, partial(glt.ActivationDropout, "relu")])
def test_a_generator_gives_the_bits_of_the_cpu(make):
    x = channels_last(values((2, 6, 5, 7), torch.float32))
    results = [make(p=0.375, generator=gl.Generator(3, 9))(x.to(device)) for device in ("cpu", "cuda")]
    assert results[1].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(results[0], results[1].cpu())


def test_nothing_waits_for_the_device():
    net, x = network(), torch.randn(4, 3, 32, 32, device="cuda", requires_grad=True)
    net[1].momentum = None
    net(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        net(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_draws_fresh_masks_and_counts():
    net, x = network(), torch.randn(4, 3, 32, 32, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            net(x).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    counted = int(net[1].num_batches_tracked)
    graph = torch.cuda.CUDAGraph()
    x.grad = None
    with torch.cuda.graph(graph):
        y = net(x)
        y.sum().backward()
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append((y != 0).clone())
    assert int(net[1].num_batches_tracked) == counted + 3
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
    # The backward of a replay is that of its mask: what was dropped passes no gradient.
    pooled = net[:4](x)
    factor = torch.where(pooled == 0, 0.0, y.detach() / pooled)
    (expected,) = torch.autograd.grad(pooled, x, factor)
    torch.testing.assert_close(x.grad, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_generator_of_its_own_is_refused_by_a_graph():
    layer, x = glt.Dropout(generator=gl.Generator(1)), torch.ones(8, device="cuda")
    layer(x)
    with pytest.raises(RuntimeError, match="captured graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(x)
    assert layer.generator.offset == 1


def test_unpooling_within_a_graph_checks_nothing():
    pool, unpool = glt.MaxPool2d(2, return_indices=True), glt.MaxUnpool2d(2)
    x = torch.randn(2, 3, 8, 8, device="cuda")
    expected = unpool(*pool(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = unpool(*pool(x))
    graph.replay()
    assert torch.equal(y, expected)


def test_compiled_with_reduced_overhead():
    net, x = network(), torch.randn(4, 3, 32, 32, device="cuda")
    compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
    masks = []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        masks.append((compiled(x) != 0).clone())
    assert not torch.equal(masks[-1], masks[-2])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="GPU: fewer than two")
def test_the_other_device():
    net = network().to("cuda:1")
    x = torch.randn(4, 3, 32, 32)
    found = net[:4](x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(found.to("cuda:0"), net[:4].to("cuda:0")(x.to("cuda:0")), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="same device"):
        glt.functional.batch_norm(x.to("cuda:1"), *(torch.ones(3, device="cuda:0") for _ in range(4)))


def test_recomputation_has_the_same_masks():
    from torch.utils.checkpoint import checkpoint

    net, x = network(), torch.randn(4, 3, 32, 32, device="cuda")
    gradients = []
    for run in (lambda given: net(given), lambda given: checkpoint(net, given, use_reentrant=False)):
        torch.cuda.manual_seed(5)
        given = x.clone().requires_grad_()
        run(given).square().sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)


def test_a_step_with_infinities_leaves_the_statistics():
    net = network()
    net[1].skip_nonfinite = True
    before = [one.clone() for one in net[1].buffers()]
    net(torch.full((2, 3, 16, 16), float("inf"), device="cuda"))
    assert all(torch.equal(a, b) for a, b in zip(before, net[1].buffers(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_follows_torchs_rule(dtype):
    net, x = network(), torch.randn(2, 3, 16, 16, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        y = net(x)
    assert y.dtype is dtype
    y.float().sum().backward()
    assert net[1].weight.grad.dtype is torch.float32
