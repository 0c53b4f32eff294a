"""Fused rows of layers: the same bits as the layers one by one, and the same state."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.layers.linear import Linear
from gpu_layers.layers.sequential import Sequential
from gpu_layers.training.network import image_classifier
from tests.inputs import BFLOAT16, assert_all_same_bits, assert_same_bits, each_dtype, normal

PATTERNS = {
    "BN R": ["BatchNorm2d", "Absorbed"],
    "BN R D": ["BatchNorm2d", "Absorbed", "Dropout"],
    "BN D R": ["BatchNorm2d", "Dropout", "Absorbed"],
    "R D": ["ActivationDropout", "Absorbed"],
    "D R": ["ActivationDropout", "Absorbed"],
    "BN R D R D": ["BatchNorm2d", "Absorbed", "ActivationDropout", "Absorbed", "Dropout"],
    "R BN D": ["ReLU", "BatchNorm2d", "Dropout"],
    "BNA R D": ["BatchNorm2d", "ActivationDropout", "Absorbed"],
    "DI R": ["Dropout", "ReLU"],
    "D2 R": ["Dropout2d", "ReLU"],
    "AD R": ["ActivationDropout", "ReLU"],
    "BN P R": ["BatchNormMaxPool", "Absorbed", "ReLU"],
    "BN R P": ["BatchNormMaxPool", "Absorbed", "Absorbed"],
    "BNA P D": ["BatchNormMaxPool", "Absorbed", "Dropout"],
    "BN R D P": ["BatchNorm2d", "Absorbed", "Dropout", "MaxPool2d"],
    "BN PL": ["BatchNorm2d", "MaxPool2d"],
}  # fmt: skip


def model(pattern, dtype=np.float32, p=0.4):
    dtype = "float64" if dtype == np.float64 else "float32"
    make = {
        "BN": lambda n: gl.BatchNorm2d(3, dtype=dtype),
        "BNA": lambda n: gl.BatchNorm2d(3, dtype=dtype, activation="relu"),
        "R": lambda n: gl.ReLU(),
        "D": lambda n: gl.Dropout(p, generator=gl.Generator(n, 5)),
        "DI": lambda n: gl.Dropout(p, scaling="inference", generator=gl.Generator(n)),
        "D2": lambda n: gl.Dropout2d(p, generator=gl.Generator(n)),
        "AD": lambda n: gl.ActivationDropout("tanh", p, generator=gl.Generator(n)),
        "P": lambda n: gl.MaxPool2d(1),
        "PL": lambda n: gl.MaxPool2d(1, channels_last=True),
    }
    made = Sequential(*(make[kind](number) for number, kind in enumerate(pattern.split())))
    for seed, values in enumerate(made.parameters.values()):
        values[...] = normal(values.shape, seed=seed)
    return made


def names(sequential):
    return [type(layer).__name__ for layer in sequential.layers]


def check_same(fused, plain, x, dy):
    """Two training steps, and evaluation: outputs, gradients, statistics, offsets."""
    for training in (True, True, False):
        fused.train(training)
        plain.train(training)
        assert_same_bits(fused(x.copy()), plain(x.copy()))
        assert_same_bits(fused.backward(dy), plain.backward(dy))
        for one, other in ((fused.gradients, plain.gradients), (fused.buffers, plain.buffers)):
            assert list(one) == list(other)
            assert_all_same_bits(one, other)
        offsets = [
            [layer.generator.offset for layer in each.layers if getattr(layer, "generator", None)]
            for each in (fused, plain)
        ]
        assert offsets[0] == offsets[1]


@each_dtype
@pytest.mark.parametrize("pattern", PATTERNS)
def test_fused_rows_give_the_same_bits(pattern, dtype):
    fused = gl.fuse(model(pattern, dtype))
    assert names(fused) == PATTERNS[pattern]
    x = normal((5, 3, 4, 6), dtype)
    check_same(fused, model(pattern, dtype), x, normal(x.shape, dtype, seed=1))


@pytest.mark.parametrize("pattern", ["BN R D", "BN D R", "R D", "D R"])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=str)
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_emulated(pattern, dtype, p):
    x = normal((5, 3, 4, 6), dtype)
    with gl.use_backend("emulated"):
        check_same(gl.fuse(model(pattern, p=p)), model(pattern, p=p), x, normal(x.shape, dtype, seed=1))


@each_dtype
@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_batch_norm_and_a_pooling_that_makes_fewer(backend, dtype):
    def made():
        layers = model("BN R", dtype).layers
        return Sequential(*layers, gl.MaxPool2d(3, 2, 1))

    x = normal((5, 3, 4, 7), dtype)
    with gl.use_backend(backend):
        fused, plain = gl.fuse(made()), made()
        assert names(fused) == ["BatchNormMaxPool", "Absorbed", "Absorbed"]
        check_same(fused, plain, x, normal((5, 3, 2, 4), dtype, seed=1))
    assert repr(fused.layers[0]).startswith("BatchNormMaxPool(BatchNorm2d(3,")


@pytest.mark.parametrize("pattern", ["BN R D", "R D", "D R"])
def test_zeros_infinities_and_nan(pattern):
    x = normal((5, 3, 4, 6), np.float32)
    x[0, 0, 0, :] = 0.0, -0.0, np.inf, -np.inf, np.nan, -1
    fused, plain = gl.fuse(model(pattern)), model(pattern)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(fused(x), plain(x))
        np.testing.assert_array_equal(fused.backward(np.abs(x)), plain.backward(np.abs(x)))


def test_half_precision_differs_where_a_positive_value_rounds_to_zero():
    """The one difference: gamma this small makes values of 1e-9, which float16 has not."""
    plain, x = model("BN R"), np.array([[[[-1.0, 1.0]]] * 3], np.float16)
    plain.layers[0].parameters["weight"][...] = 1e-9
    plain.layers[0].parameters["bias"][...] = 0
    fused = gl.fuse(plain)
    assert_same_bits(fused(x), plain(x))
    dy = np.ones_like(x)
    assert_same_bits(fused(x), np.zeros_like(x))
    fused.backward(dy)
    plain.backward(dy)
    assert plain.gradients["0.bias"].tolist() == [0, 0, 0]
    assert fused.gradients["0.bias"].tolist() == [1, 1, 1]


def test_state_is_shared_under_the_same_names():
    plain = model("BN R D BN R")
    fused = gl.fuse(plain.eval())
    assert not fused.training
    assert not any(layer.training for layer in fused.layers)
    fused.train()(normal((5, 3, 4, 6), np.float32))
    for kind in ("parameters", "buffers"):
        ours, theirs = getattr(fused, kind), getattr(plain, kind)
        assert list(ours) == list(theirs)
        assert all(ours[name] is theirs[name] for name in theirs)
    assert plain.buffers["3.num_batches_tracked"] == 1
    fused.layers[0].reset_running_stats()
    assert plain.buffers["0.num_batches_tracked"] == 0
    assert fused.layers[2] is plain.layers[2]
    state = fused.state_dict()
    model("BN R D BN R").load_state_dict(state)


def test_rows_within_rows_and_a_whole_network():
    inner = model("BN R")
    nested = gl.fuse(Sequential(gl.ReLU(), inner, gl.Dropout(0.5)))
    assert names(nested) == ["ReLU", "Sequential", "Dropout"]
    assert names(nested.layers[1]) == ["BatchNorm2d", "Absorbed"]
    for placement in ("after", "before"):
        build = {"p": 0.3, "placement": placement, "seed": 1, "dtype": np.dtype(np.float32)}
        fused = gl.fuse(image_classifier((1, 6, 6), 3, **build))
        x = normal((4, 1, 6, 6), np.float32)
        assert names(fused).count("Absorbed") == 3
        check_same(fused, image_classifier((1, 6, 6), 3, **build), x, normal((4, 3), np.float32))


def test_other_features_work_on_what_is_fused():
    fused = gl.fuse(Sequential(Linear(3, 3, seed=1), gl.BatchNorm1d(3), gl.ReLU(), gl.Dropout(0.5)))
    x = normal((8, 3), np.float32)
    gl.recalibrate(fused, [x])
    assert fused.buffers["1.num_batches_tracked"] == 1
    mean, variance = gl.mc_dropout(fused, x, passes=20)
    assert (variance[mean > 0] > 0).all()
    with gl.statistics_transaction(fused):
        fused(x)
    assert fused.buffers["1.num_batches_tracked"] == 2
    assert "(2): Absorbed()" in repr(fused)


@pytest.mark.parametrize("value", [gl.ReLU(), [gl.ReLU()], None])
def test_only_a_sequential_is_fused(value):
    with pytest.raises(TypeError, match="expected a Sequential, got"):
        gl.fuse(value)
    assert names(gl.fuse(Sequential())) == []
