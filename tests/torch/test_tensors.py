"""Programs on tensors: torch's memory, raw pointers, torch's stream. The driver is a stand-in that runs them emulated.

So all of the way to the driver is what CUDA tensors take, but for the tensors, which lie in the host's memory.
"""

import contextlib

import pytest
import torch

import gpu_layers as gl
import gpu_layers.torch as glt
from gpu_layers.torch import arrays, tensors
from tests.runtime.fake_cupy import execute, stand_in
from tests.torch.layers import CALLS, channels_last, every_other, first, pair, values

STREAM = 0xABCDE


@pytest.fixture
def gpu(monkeypatch):
    """The stand-in: tensors of the host pass for tensors of GPU 1, while GPU 0 is the current one."""
    with stand_in(monkeypatch) as make:
        yield installed(make(execute=execute), monkeypatch)


def installed(cupy, monkeypatch):
    cupy.current = 0

    @contextlib.contextmanager
    def device(number):
        before, cupy.current = cupy.current, number
        yield
        cupy.current = before

    asked = []

    def stream(number):
        asked.append((number, cupy.current))
        return STREAM

    def recorded(step, place, make=tensors._made):
        made = make(step, place)

        def run(objects):
            cupy.memory.append(made(objects))
            return cupy.memory[-1]

        return run

    cupy.asked, cupy.memory = asked, []
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: cupy.current, raising=False)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", stream, raising=False)
    monkeypatch.setattr(tensors.TensorArrays, "device", lambda self, tensor: 1)
    # Programs hold on to the stand-in that they were recorded with.
    read = tensors.TensorArrays.read

    def read_here(self, found):
        signature, addresses = read(self, found)
        return (*signature, cupy), addresses

    monkeypatch.setattr(tensors.TensorArrays, "read", read_here)
    monkeypatch.setattr(tensors, "memory_of", lambda device: torch.device("cpu"))
    monkeypatch.setattr(tensors, "_made", recorded)
    monkeypatch.setattr(arrays, "here", lambda tensor: arrays._KERNELS)
    return cupy


def step(module, x):
    torch.manual_seed(7)
    given = x.detach().requires_grad_()
    result = module(given)
    y = first(result)
    y.backward(values(tuple(y.shape), y.dtype, 1))
    others = result[1:] if isinstance(result, tuple) else ()
    return [y.detach(), *others, given.grad, *(one.grad for one in module.parameters()), *module.buffers()]


MODULES = [*CALLS, ("Dropout", (0.375,), (2, 3, 5, 7)), ("Dropout2d", (0.375,), (2, 3, 5, 7))]


PLACED = [
    (*one, layout)
    for one in MODULES
    for layout in (torch.clone, channels_last, every_other)
    if layout is not channels_last or len(one[2]) in (4, 5)
]


@pytest.mark.parametrize(
    ("name", "arguments", "shape", "layout"), PLACED, ids=[f"{one[0]}{one[1]}-{one[3].__name__}" for one in PLACED]
)
def test_kernels_get_the_tensors_own_memory(gpu, monkeypatch, name, arguments, shape, layout):
    x = layout(values(shape, torch.float32).abs() + 0.5 if "LPPool" in name else values(shape, torch.float32))
    found = step(pair(name, arguments, torch.float32)[0], x)
    launches = gpu.launches
    assert launches
    assert all(one.device == 1 and one.stream == STREAM for one in launches)
    # The stream is asked for in every call, of the tensors' device; afterwards the other is current again.
    assert set(gpu.asked) == {(1, 1)}
    assert gpu.current == 0
    monkeypatch.undo()
    with gl.use_backend("emulated"):
        expected = step(pair(name, arguments, torch.float32)[0], x)
    for a, b in zip(found, expected, strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_and_workspace_are_torchs(gpu, dtype):
    x = values((4, 3, 8, 8), dtype).requires_grad_()
    layer = glt.BatchNormAct2d(3, activation="relu").to(dtype)
    y = layer(x)
    # Whatever is written lies in tensors that torch made.
    known = {one.data_ptr() for one in (*gpu.memory, *layer.buffers(), x)}
    assert y.data_ptr() in known
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.data_ptr() in {one.data_ptr() for one in gpu.memory}
    assert not y._is_view()
    assert not dx._is_view()


def test_the_second_call_records_nothing_and_loads_nothing(gpu, monkeypatch):
    layer, x = glt.MaxPool2d(2), values((2, 3, 6, 6), torch.float32)
    layer(x)
    loaded = len(gpu.loaded)

    def refuse(*_):
        raise AssertionError("recorded again")

    monkeypatch.setattr(tensors, "_bound", refuse)
    layer(x + 1)
    assert len(gpu.loaded) == loaded
    assert len(gpu.launches) == 2


def test_a_seed_on_the_device_is_read_by_the_kernel(gpu, monkeypatch):
    # As a captured or compiled graph has it: the number is not read back.
    from gpu_layers.torch.ops import dropout

    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    seed, x = torch.tensor(-5), torch.ones(1000)
    dropping = dropout.Dropping(x.shape, 0.375, -1, "inverted", False)
    y = dropout._run(x, seed, (3, dropping))
    mask = dropping.mask(seed, 3)
    assert mask.rng_state.tolist() == [2**64 - 5, 3, 0]
    assert mask.seed == 0
    kept = torch.from_numpy(gl.ops.dropout_mask(1000, 0.375, 2**64 - 5, 3))
    assert torch.equal(y != 0, kept)


@pytest.mark.parametrize(
    "layer",
    [
        glt.Dropout(0.5),
        glt.Dropout2d(0.5),
        glt.DropoutAdd(0.5),
        glt.Dropout(0.5, inplace=True),
        glt.ActivationDropout("gelu", 0.5),
        glt.ActivationDropout("leaky_relu", 0.5, order="before"),
    ],
)
@pytest.mark.parametrize("layout", [torch.clone, channels_last])
def test_one_pass_of_memory_each_way(gpu, layer, layout):
    x = layout(values((2, 8, 5, 7), torch.float32)).requires_grad_()
    y = layer(x * 1, *([x.detach()] if isinstance(layer, glt.DropoutAdd) else []))
    assert len(gpu.launches) == 1
    assert len(gpu.memory) == (0 if getattr(layer, "inplace", False) else 1)
    y.backward(torch.ones_like(y))
    assert len(gpu.launches) == 2


def test_backends_and_devices_have_to_fit():
    x = torch.ones(3, device="meta")
    with gl.use_backend("reference"), pytest.raises(TypeError, match="takes CPU tensors"):
        arrays.here(x)
