"""The generator whose offset lies in device memory: the same masks, read by the kernels; captured and replayed."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.core.cuda import import_cupy
from tests.inputs import assert_same_bits, normal

SEED = 2**40 + 3
X = normal((6, 5, 7), np.float32)
IDS = np.array([4, -1, 7, 2**40, 0, 9])
LAYERS = {
    "Dropout": lambda generator: gl.Dropout(0.4, generator=generator),
    "Dropout1d": lambda generator: gl.Dropout1d(0.4, generator=generator),
    "DropPath": lambda generator: gl.DropPath(0.4, generator=generator),
    "AlphaDropout": lambda generator: gl.AlphaDropout(0.4, generator=generator),
    "relu": lambda generator: gl.ActivationDropout("relu", 0.4, generator=generator),
    "gelu": lambda generator: gl.ActivationDropout("gelu", 0.4, order="before", generator=generator),
    "identity": lambda generator: gl.ActivationDropout("identity", 0.4, generator=generator),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
each_backend = pytest.mark.parametrize("backend", [("reference", {}), ("emulated", {}), ("emulated", {"check": True})])


def device_generator(offset=0, seed=SEED):
    return gl.CudaGraphGenerator(seed, offset, device="cpu")


@each_layer
@each_backend
@pytest.mark.parametrize("offset", [5, 2**32 - 1, 2**64 - 1])
def test_masks_are_those_of_the_numbers(make, backend, offset):
    name, options = backend
    ours, theirs = make(device_generator(offset)), make(gl.Generator(SEED, offset))
    with gl.use_backend(name, **options):
        for _ in range(3):
            assert_same_bits(ours(X), theirs(X))
            assert_same_bits(ours.backward(X), theirs.backward(X))
            assert ours.generator.offset == theirs.generator.offset
            assert ours.generator.get_state() == theirs.generator.get_state()


@each_backend
def test_masks_of_samples(backend):
    name, options = backend
    ours, theirs = (gl.Dropout(0.4, generator=g) for g in (device_generator(), gl.Generator(SEED)))
    with gl.use_backend(name, **options):
        for x in (X, X.reshape(6, 35)[:, :32].copy()):
            assert_same_bits(ours(x, sample_ids=IDS), theirs(x, sample_ids=IDS))
            assert_same_bits(ours.backward(x), theirs.backward(x))


@each_backend
def test_backward_draws_the_mask_of_its_forward_though_others_drew_since(backend):
    name, options = backend
    with gl.use_backend(name, **options):
        generator = device_generator()
        first, second = gl.Dropout(0.5, generator=generator), gl.Dropout(0.5, generator=generator)
        x = np.ones((40, 5), np.float32)
        y, z = first(x), second(x)
        assert (y != z).any()
        assert_same_bits(first.backward(x), y)
        assert_same_bits(second.backward(x), z)
        first(x)
        assert_same_bits(second.backward(x), z)


def test_a_layer_keeps_its_numbers_in_one_place():
    # A captured graph refers to that memory for ever.
    layer = gl.Dropout(0.5, generator=device_generator())
    layer(X)
    place = layer._taken
    layer(X)
    assert layer._taken is place
    assert place.tolist()[:2] == [SEED, 1]


@pytest.mark.parametrize("x", [X.astype(int), [1.0]])
def test_a_forward_that_raises_takes_no_offset(x):
    layer = gl.Dropout(0.5, generator=device_generator(3))
    with pytest.raises(TypeError):
        layer(x)
    assert layer.generator.offset == 3


def test_evaluation_takes_no_offset():
    layer = gl.Dropout(0.5, generator=device_generator(3)).eval()
    layer.backward(layer(X))
    assert layer.generator.offset == 3


def test_state_is_read_and_written_back():
    generator = device_generator(7)
    place = generator.rng_state
    state = generator.get_state()
    assert state == {"seed": SEED, "offset": 7}
    layer = gl.Dropout(0.5, generator=generator)
    y = layer(X)
    assert generator.offset == 8
    generator.set_state(state)
    assert_same_bits(layer(X), y)
    generator.set_state({"seed": 5, "offset": 2**64 - 1})
    assert generator.seed == 5
    assert generator.rng_state is place
    with pytest.raises(ValueError, match="offset must be in"):
        generator.set_state({"seed": 6, "offset": -1})
    assert generator.get_state() == {"seed": 5, "offset": 2**64 - 1}
    assert generator.next_offset() == 2**64 - 1
    assert generator.offset == 0
    assert repr(generator) == "CudaGraphGenerator(seed=5, offset=0, device='cpu')"


def test_spawned_streams_are_the_generators():
    ours, theirs = device_generator(7).spawn(3), gl.Generator(SEED, 7).spawn(3)
    assert [child.get_state() for child in ours] == [child.get_state() for child in theirs]
    assert all(isinstance(child, gl.CudaGraphGenerator) and child.device == "cpu" for child in ours)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'gpu'"):
        gl.CudaGraphGenerator(1, device="gpu")
    with pytest.raises(ValueError, match="seed must be in"):
        gl.CudaGraphGenerator(-1, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rng_state": np.zeros(3)}, TypeError, "rng_state must be uint64, got float64"),
        (
            {"rng_state": np.zeros(2, np.uint64)},
            ValueError,
            r"rng_state must be three contiguous numbers, got the shape \[2\]",
        ),
        ({"rng_state": np.zeros(6, np.uint64)[::2]}, ValueError, "rng_state must be three contiguous numbers"),
        (
            {"seed": 1, "rng_state": np.zeros(3, np.uint64)},
            ValueError,
            "seed and offset are in rng_state: pass None for both",
        ),
        ({"rng_state": [1, 2, 3]}, TypeError, "expected a numpy.ndarray or cupy.ndarray, got list"),
        ({}, TypeError, "seed must be an integer, got NoneType"),
    ],
)
def test_bad_draws_are_refused(arguments, error, message):
    for forward in (
        gl.ops.dropout_forward,
        gl.ops.alpha_dropout_forward,
        lambda x, *rest, **rng_state: gl.ops.activation_dropout_forward(x, "relu", *rest, **rng_state),
    ):
        with pytest.raises(error, match=message):
            forward(X, 0.5, **({"seed": None, "offset": None} | arguments))


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # CuPy's are not ours
@each_layer
def test_replays_of_a_captured_graph_draw_fresh_masks(make):
    cupy = import_cupy()
    x = cupy.asarray(X)
    generator = gl.CudaGraphGenerator(SEED)
    layer, expected = make(generator), make(gl.Generator(SEED))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # x and the generator were written on another stream
    with stream:
        for _ in range(
            2
        ):  # compiles, loads and allocates, which a capture must not: what lives on, and what comes anew
            layer.backward(layer(x))
        stream.synchronize()
        generator.set_state({"seed": SEED, "offset": 0})
        stream.begin_capture()
        y = layer(x)
        dx = layer.backward(x)
        graph = stream.end_capture()
        for replay in range(1, 4):
            graph.launch(stream)
            stream.synchronize()
            assert_same_bits(y.get(), expected(x).get())
            assert_same_bits(dx.get(), expected.backward(x).get())
            assert generator.offset == replay
        generator.set_state({"seed": SEED + 1, "offset": 9})
        graph.launch(stream)
        stream.synchronize()
        expected.generator.set_state({"seed": SEED + 1, "offset": 9})
        assert_same_bits(y.get(), expected(x).get())
