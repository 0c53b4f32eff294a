"""Captured steps: replays give what calls give."""

import contextlib
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers import graphs, random
from gpu_layers.core.cuda import import_cupy
from gpu_layers.distributed import Communicator
from gpu_layers.runtime.backend import emulation, use_executor
from gpu_layers.training import SGD, Adam, Conv2d, Linear
from tests.conftest import _why_no_gpu
from tests.inputs import assert_same_bits, normal

SHAPE = (64, 2, 32, 32)  # batch norm takes a group of blocks, and workspace
SEED = 2**40 + 3

LAYERS = {
    "BatchNorm2d": lambda: [gl.BatchNorm2d(2)],
    "BatchNorm2d, cumulative": lambda: [gl.BatchNorm2d(2, momentum=None)],
    "BatchNorm2d, channels last": lambda: [gl.BatchNorm2d(32, channels_last=True)],
    "SyncBatchNorm of one process": lambda: [gl.SyncBatchNorm(2)],
    "pooling": lambda: [gl.MaxPool2d(3, 2, 1), gl.AvgPool2d(2)],
    "dropout": lambda: [gl.Dropout(0.4), gl.Dropout2d(0.3), gl.ActivationDropout("gelu", 0.2)],
    "all": lambda: [gl.BatchNorm2d(2, activation="relu"), gl.Dropout(0.4), gl.MaxPool2d(2), gl.LPPool2d(2.0, 2)],
}


def network(name):
    layers = LAYERS[name]()
    generator = gl.Generator(SEED)
    for layer in layers:
        layer.to("cuda")
        if hasattr(layer, "generator"):
            layer.generator = generator
    return layers, generator


def forward_and_backward(layers, x):
    y = x
    for layer in layers:
        y = layer(y)
    dx = y
    for layer in reversed(layers):
        dx = layer.backward(dx)
    return y, dx


def state_of(layers):
    return {f"{i}.{name}": value.get() for i, layer in enumerate(layers) for name, value in layer.state_dict().items()}


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_replays_are_calls(name):
    cupy = import_cupy()
    captured, generator = network(name)
    called, other = network(name)
    x = cupy.asarray(normal(SHAPE, np.float32))
    graph = gl.capture(lambda: forward_and_backward(captured, x))
    for _ in range(2):
        forward_and_backward(called, x)
    assert generator.get_state() == other.get_state()
    for seed in range(1, 4):
        x[...] = cupy.asarray(normal(SHAPE, np.float32, seed))
        actual, expected = graph.replay(), forward_and_backward(called, x)
        assert actual is graph.result
        # What comes from the shared pool is not what the graph writes to.
        others = [cupy.zeros(SHAPE, np.float32) for _ in range(4)]
        graph_again = [one.copy() for one in actual]
        for one, two in zip(graph_again, expected, strict=True):
            assert_same_bits(one.get(), two.get())
        assert not any(one.any() for one in others)
        assert generator.get_state() == other.get_state()
        for key, value in state_of(captured).items():
            assert_same_bits(value, state_of(called)[key], key)


@pytest.mark.gpu
def test_calls_and_replays_alternate():
    cupy = import_cupy()
    captured, generator = network("dropout")
    called, other = network("dropout")
    x = cupy.asarray(normal(SHAPE, np.float32))
    graph = gl.capture(lambda: forward_and_backward(captured, x), warmup=1)
    forward_and_backward(called, x)
    for move in ("replay", "call", "replay", "back", "replay"):
        if move == "back":
            generator.set_state({"seed": 5, "offset": 2**64 - 1})
            other.set_state({"seed": 5, "offset": 2**64 - 1})
            continue
        actual = graph.replay() if move == "replay" else forward_and_backward(captured, x)
        for one, two in zip(actual, forward_and_backward(called, x), strict=True):
            assert_same_bits(one.get(), two.get(), move)
        assert generator.get_state() == other.get_state()


def training_step(optimizer_of, x):
    """A network, its optimizer, and a step that changes its parameters."""
    layers = gl.Sequential(gl.BatchNorm2d(2, activation="relu"), gl.BatchNorm2d(2)).to("cuda")
    optimizer = optimizer_of(layers.parameters)

    def step():
        y = layers(x)
        layers.backward(y * y)
        optimizer.step(layers.gradients)

    return layers, optimizer, step


@pytest.mark.gpu
@pytest.mark.parametrize(
    "optimizer_of",
    [partial(SGD, lr=0.1, momentum=0.9), partial(Adam, lr=0.1, weight_decay=1e-2)],
    ids=["SGD", "Adam"],
)
def test_optimizers_count_the_steps_of_replays(optimizer_of):
    x = import_cupy().asarray(normal(SHAPE, np.float32))
    captured, own, step = training_step(optimizer_of, x)
    called, other, call = training_step(optimizer_of, x)
    graph = gl.capture(step)
    call(), call()
    begun = None
    for move in ("replay", "call", "replay", "replay", "back", "replay"):
        if move == "back":
            own.load_state_dict(begun[0]), other.load_state_dict(begun[1])
            continue
        if move == "call":
            begun = own.state_dict(), other.state_dict()
        (step if move == "call" else graph.replay)()
        call()
        assert own.steps == other.steps
        for key, value in captured.parameters.items():
            # The corrections are powers, which a GPU may round otherwise, and the parameters differ by that from then.
            np.testing.assert_allclose(value.get(), called.parameters[key].get(), rtol=1e-6, err_msg=move)
    told, expected = own.state_dict(), other.state_dict()
    assert told.keys() == expected.keys()
    for key in ("steps", *(name for name in told if name.startswith("updates."))):
        assert isinstance(told[key], np.ndarray)
        assert told[key] == expected[key] == 4


@pytest.mark.gpu
def test_a_capture_allocates_nothing_from_the_shared_pool_and_waits_for_nothing(monkeypatch):
    cupy = import_cupy()
    layers, _ = network("all")
    x = cupy.asarray(normal(SHAPE, np.float32))
    runs = []

    seen = []
    # What waits, allocates, or asks what fits. CuPy's own compiled code does not pass here: its allocations show in the
    # pool, and a wait of its own ends a capture with an error.
    refused = {
        cupy.cuda.runtime: ("deviceSynchronize", "streamSynchronize", "eventSynchronize", "memcpy", "malloc"),
        cupy.cuda.driver: ("occupancyMaxActiveBlocksPerMultiprocessor", "moduleLoad", "moduleLoadData"),
    }
    original = [(module, name, getattr(module, name)) for module, names in refused.items() for name in names]

    def step():
        if len(runs) == 2:
            # Now it is captured.
            for module, name, _ in original:
                monkeypatch.setattr(module, name, lambda *rest, name=name: seen.append((name, rest)))
            pool = cupy.get_default_memory_pool()
            before = pool.used_bytes(), pool.total_bytes()
        try:
            result = forward_and_backward(layers, x)
        finally:
            if len(runs) == 2:
                for module, name, function in original:
                    monkeypatch.setattr(module, name, function)
                seen.extend([] if (pool.used_bytes(), pool.total_bytes()) == before else ["the shared pool"])
        runs.append(result)
        return result

    gl.capture(step)
    assert len(runs) == 3
    assert seen == []


@pytest.mark.gpu
def test_a_strided_input_is_read_anew_by_replays():
    cupy = import_cupy()
    captured, _ = network("all")
    called, _ = network("all")
    x = cupy.asarray(normal(SHAPE[::-1], np.float32)).T
    graph = gl.capture(lambda: forward_and_backward(captured, x), warmup=1)
    forward_and_backward(called, x)
    for seed in range(1, 3):
        x[...] = cupy.asarray(normal(SHAPE, np.float32, seed))
        for one, two in zip(graph.replay(), forward_and_backward(called, x), strict=True):
            assert_same_bits(one.get(), two.get())


class TwoProcesses(Communicator):
    """The first of two, which both have the same numbers."""

    rank, size = 0, 2

    def gather(self, values):
        return import_cupy().stack([values, values])


def linear(x):
    layer = Linear(32, 4)
    return lambda: layer.to("cuda")(x[0, 0])


def step_of(layer, x, **options):
    layer.to("cuda")
    return lambda: layer(x, **options)


def unpooling(x):
    y, saved = gl.ops.max_pool_forward(x, (2, 2))
    indices = gl.ops.max_pool_indices(saved)
    return lambda: gl.ops.max_unpool_forward(y, indices, SHAPE[2:])[0]


LENGTHS = np.full((64, 2), 5)
REFUSED = {
    "SyncBatchNorm of several processes cannot be captured": lambda x: step_of(
        gl.SyncBatchNorm(2, communicator=TwoProcesses()), x
    ),
    "a padded batch cannot be captured: its valid": lambda x: step_of(gl.BatchNorm2d(2), x, lengths=LENGTHS),
    "a padded batch cannot be captured": lambda x: step_of(
        gl.BatchNorm2d(2), x, mask=import_cupy().ones((64, 32, 32), bool)
    ),
    "pooling with lengths= cannot be captured": lambda x: (
        lambda: gl.ops.max_pool_forward(x, (2, 2), lengths=LENGTHS)[0]
    ),
    "MaxUnpool with check=True cannot be captured": unpooling,
    "Linear cannot be captured": linear,
    "Conv2d cannot be captured": lambda x: step_of(Conv2d(2, 2, 3, padding=1), x),
}


@pytest.mark.gpu
@pytest.mark.parametrize("message", REFUSED)
def test_what_a_graph_cannot_hold_is_refused_before_anything_runs(message):
    x = import_cupy().asarray(normal(SHAPE, np.float32))
    step, calls = REFUSED[message](x), []

    def called():
        calls.append("begun")
        calls.append(step())

    with pytest.raises(RuntimeError, match=message):
        gl.capture(called)
    assert calls == ["begun"]
    # The stream, the allocator and the generators are as before.
    assert step().size


@pytest.mark.gpu
def test_an_error_of_the_step_is_raised_and_ends_the_capture():
    cupy = import_cupy()
    x = cupy.asarray(normal((4, 8), np.float32))
    calls = []

    def step():
        calls.append(gl.ops.relu_forward(x)[0])
        if len(calls) == 3:
            raise ZeroDivisionError("in the step")

    with pytest.raises(ZeroDivisionError, match="in the step"):
        gl.capture(step)
    assert len(calls) == 3
    gl.capture(lambda: gl.ops.relu_forward(x)[0]).replay()


@pytest.mark.parametrize(("warmup", "error"), [(0, ValueError), (1.0, TypeError), (True, TypeError)])
def test_bad_arguments(warmup, error):
    with pytest.raises(error, match="warmup must be"):
        gl.capture(lambda: None, warmup=warmup)


@pytest.mark.skipif(_why_no_gpu() is None, reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(RuntimeError, match=r"no usable GPU|needs CuPy"):
        gl.capture(lambda: None)


class RecordingStream:
    """A stand-in for CuPy's streams: what is launched while it captures runs when the graph is launched."""

    def __init__(self, **_):
        self.captured = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def record(self):
        pass

    def wait_event(self, event):
        pass

    def begin_capture(self):
        launches = self.captured = []

        class Recorder:
            def launch(self, *launch):
                launches.append(launch)

        self._recording = use_executor(Recorder())
        self._recording.__enter__()

    def end_capture(self):
        self._recording.__exit__(None, None, None)

        def launch():
            for one in self.captured:
                emulation().launch(*one)

        return SimpleNamespace(launch=launch)


@pytest.fixture
def emulated_graphs(monkeypatch):
    """Graphs of emulated kernels, whose generators lie in the host's memory."""
    cuda = SimpleNamespace(
        MemoryPool=lambda: SimpleNamespace(malloc=None),
        device=SimpleNamespace(get_device_id=lambda: 0),
        Stream=RecordingStream,
        get_current_stream=RecordingStream,
        using_allocator=lambda malloc: contextlib.nullcontext(),
        runtime=SimpleNamespace(CUDARuntimeError=RuntimeError),
    )
    monkeypatch.setattr(graphs, "require_gpu", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(graphs, "CudaGraphGenerator", partial(gl.CudaGraphGenerator, device="cpu"))
    with gl.use_backend("emulated"):
        yield


def dropouts():
    """Layers of two generators; two layers share one."""
    shared, own = gl.Generator(SEED, 2**64 - 3), gl.Generator(SEED + 1, 5)
    layers = [
        gl.Dropout(0.4, generator=shared),
        gl.ActivationDropout("gelu", 0.2, generator=own),
        gl.Dropout1d(0.3, generator=shared),
    ]
    return layers, [shared, own]


@pytest.mark.parametrize("warmup", [1, 2, 3])
def test_offsets_of_a_captured_step_are_those_of_calls(emulated_graphs, warmup):
    captured, generators = dropouts()
    called, others = dropouts()
    x = normal((6, 5, 7), np.float32)
    graph = gl.capture(lambda: forward_and_backward(captured, x), warmup=warmup)
    assert random.device_draws.get() is None
    for _ in range(warmup):
        forward_and_backward(called, x)
    moves = ("replay", "replay", "call", "replay", "back", "replay", "seed", "replay", "rng_state", "replay", "replay")
    for number, move in enumerate(moves):
        assert [one.get_state() for one in generators] == [one.get_state() for one in others]
        if move in ("back", "seed"):
            for one in (generators[0], others[0]):
                # To the offset that comes next anyway, with another seed; or to another offset.
                state = one.get_state()
                one.set_state({**state, "seed": 9} if move == "seed" else {**state, "offset": 3})
            continue
        if move == "rng_state":
            assert generators[1].next_offset() == others[1].next_offset()
            continue
        x[...] = normal(x.shape, x.dtype, number)
        actual = graph.replay() if move == "replay" else forward_and_backward(captured, x)
        for one, two in zip(actual, forward_and_backward(called, x), strict=True):
            assert_same_bits(one, two, f"{number}: {move}")


def test_a_step_that_raises_leaves_generators_as_they_were(emulated_graphs):
    (layer, *_), (generator, _) = dropouts()
    x, calls = normal((6, 5, 7), np.float32), []

    def step():
        layer(x)
        calls.append(None)
        if len(calls) == 3:
            raise ZeroDivisionError("while it is captured")

    with pytest.raises(ZeroDivisionError):
        gl.capture(step)
    assert random.device_draws.get() is None
    # Two runs for good.
    assert generator.get_state() == {"seed": SEED, "offset": 2**64 - 1}
    expected, _ = gl.ops.dropout_forward(x, 0.4, SEED, 2**64 - 1)
    assert_same_bits(layer(x), expected)


def test_a_generator_that_comes_later_is_refused(emulated_graphs):
    layers, _ = dropouts()
    calls = []

    def step():
        calls.append(None)
        return layers[len(calls) > 2](normal((4, 8), np.float32))

    with pytest.raises(RuntimeError, match="must do the same in each call"):
        gl.capture(step)
