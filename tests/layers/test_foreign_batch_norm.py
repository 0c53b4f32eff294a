"""State of Keras, Flax and Chainer: each library's own formulas, written out, against the loaded layer."""

import ml_dtypes
import numpy as np
import pytest

import gpu_layers as gl
from tests.inputs import assert_same_bits, assert_within, normal, unchanged

BOUND = 1e3 * 2.0**-53
GAMMA, BETA, MEAN, VAR = normal((3,)), normal((3,), seed=1), normal((3,), seed=2), normal((3,), seed=3) ** 2

#: Library: the state in its own names, its default momentum and eps, whether its running variance is biased.
KERAS = {"gamma": GAMMA, "beta": BETA, "moving_mean": MEAN, "moving_variance": VAR}
FLAX = {"params": {"scale": GAMMA, "bias": BETA}, "batch_stats": {"mean": MEAN, "var": VAR}}
CHAINER = {"gamma": GAMMA, "beta": BETA, "avg_mean": MEAN, "avg_var": VAR, "N": np.array(0)}
LIBRARIES = {
    "keras": (KERAS, 0.99, 1e-3, True),
    "flax": (FLAX, 0.99, 1e-5, True),
    "chainer": (CHAINER, 0.9, 2e-5, False),
}
each_library = pytest.mark.parametrize("library", LIBRARIES)


def layer(**options):
    return gl.BatchNorm1d(3, **({"dtype": "float64"} | options))


@each_library
def test_evaluation_and_the_next_update_are_the_librarys(library):
    state, momentum, eps, biased = LIBRARIES[library]
    ours, x = layer(), normal((8, 3), seed=5) + 1
    gl.load_foreign_batch_norm(ours, state, library)
    assert_within(ours.eval()(x), (x - MEAN) / np.sqrt(VAR + eps) * GAMMA + BETA, 1000 * BOUND)
    ours.train()(x)
    assert_within(ours.buffers["running_mean"], momentum * MEAN + (1 - momentum) * x.mean(axis=0), BOUND)
    # What stays different: this library folds in the unbiased variance.
    newest = x.var(axis=0, ddof=1)
    assert_within(ours.buffers["running_var"], momentum * VAR + (1 - momentum) * newest, BOUND)
    converted = layer()
    gl.load_foreign_batch_norm(converted, state, library, values_per_channel=8)
    assert_within(converted.buffers["running_var"], VAR * (8 / 7 if biased else 1), BOUND)


@pytest.mark.parametrize(
    ("library", "state"),
    [
        ("keras", {f"batch_normalization_1/{name}:0": value for name, value in KERAS.items()}),
        ("keras", {f"model/block/bn/{name}": value.astype(np.float32) for name, value in KERAS.items()}),
        ("flax", {"scale": GAMMA, "bias": BETA, "mean": MEAN, "var": VAR}),
        ("flax", {"params/scale": GAMMA, "params/bias": BETA, "params/mean": MEAN, "params/var": VAR}),
        ("chainer", {f"bn1/{name}": value for name, value in CHAINER.items()}),
        ("chainer", {name: value.tolist() for name, value in CHAINER.items() if name != "N"}),
    ],
)
def test_ways_to_write_the_names(library, state):
    ours, plain = layer(), layer()
    gl.load_foreign_batch_norm(ours, state, library)
    gl.load_foreign_batch_norm(plain, LIBRARIES[library][0], library)
    for name, value in plain.state_dict().items():
        assert_within(ours.state_dict()[name], value, 2.0**-22)


def test_numbers_of_their_configuration():
    ours = layer(dtype="float32")
    state = {name: np.asarray(value).astype(ml_dtypes.bfloat16) for name, value in KERAS.items()}
    gl.load_foreign_batch_norm(ours, state, "keras", momentum=0.75, eps=0.5)
    assert (ours.momentum, ours.eps) == (0.25, 0.5)
    assert_same_bits(ours.parameters["weight"], GAMMA.astype(ml_dtypes.bfloat16).astype(np.float32))
    gl.load_foreign_batch_norm(ours, CHAINER | {"N": 7}, "chainer")
    assert ours.buffers["num_batches_tracked"] == 7
    gl.load_foreign_batch_norm(ours, KERAS, "keras")
    assert ours.buffers["num_batches_tracked"] == 0


def test_only_the_parts_that_a_layer_has():
    statistics = {"moving_mean": MEAN, "moving_variance": VAR}
    gl.load_foreign_batch_norm(layer(affine=False), statistics, "keras")
    gl.load_foreign_batch_norm(layer(bias=False), statistics | {"gamma": GAMMA}, "keras")
    with pytest.raises(ValueError, match=r"missing keys \[\], unexpected keys \['gamma'\]"):
        gl.load_foreign_batch_norm(layer(affine=False), statistics | {"gamma": GAMMA}, "keras")
    with pytest.raises(ValueError, match=r"missing keys \['gamma'\] \(a layer without scale or offset: pass ones"):
        gl.load_foreign_batch_norm(layer(), statistics | {"beta": BETA}, "keras")


@pytest.mark.parametrize(
    ("library", "state", "options", "error", "message"),
    [
        ("keras", CHAINER, {}, ValueError, r"missing keys \['moving_mean', .*unexpected keys"),
        ("caffe", KERAS, {}, ValueError, "library must be one of 'keras', 'flax', 'chainer', got 'caffe'"),
        ("keras", KERAS | {"gamma": np.ones(4)}, {}, ValueError, r"size mismatch for gamma: got shape \[4\]"),
        ("keras", KERAS | {"gamma": np.ones(3, int)}, {}, TypeError, "gamma must be floating, got int64"),
        ("keras", {"a/gamma": GAMMA, "b/beta": BETA}, {}, ValueError, r"got those of several layers: \['a', 'b'\]"),
        ("flax", {"params": {"BatchNorm_0": {}}}, {}, ValueError, r"unexpected keys \['BatchNorm_0'\]"),
        ("flax", {"opt_state": {}}, {}, ValueError, "got several arrays in 'opt_state'"),
        ("keras", [1], {}, TypeError, "Expected state to be dict-like, got <class 'list'>"),
        ("keras", KERAS, {"momentum": float("inf")}, ValueError, "momentum must be finite, got inf"),
        ("keras", KERAS, {"momentum": "0.9"}, TypeError, "momentum must be a number, got str"),
        ("keras", KERAS, {"eps": 0}, ValueError, "batch_norm eps must be positive, but got 0"),
        ("keras", KERAS, {"values_per_channel": 1}, ValueError, r"values_per_channel must be in 2 \.\."),
        ("chainer", CHAINER | {"N": -1}, {}, ValueError, r"N must be in 0 \.\."),
        ("chainer", CHAINER | {"N": np.array([1, 2])}, {}, TypeError, "N must be an integer"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_loaded(library, state, options, error, message):
    ours = layer()
    kept = [*ours.parameters.values(), *ours.buffers.values()]
    with unchanged(*kept), pytest.raises(error, match=message):
        gl.load_foreign_batch_norm(ours, state, library, **options)
    assert (ours.momentum, ours.eps) == (0.1, 1e-5)


def test_the_layer_is_a_batch_norm_with_statistics():
    with pytest.raises(TypeError, match="expected a batch norm layer, got ReLU"):
        gl.load_foreign_batch_norm(gl.ReLU(), KERAS, "keras")
    with pytest.raises(ValueError, match="keeps no running statistics"):
        gl.load_foreign_batch_norm(layer(track_running_stats=False), KERAS, "keras")
