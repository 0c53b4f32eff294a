"""Arrays that cannot be written to, numbers that a dtype does not hold, and what the messages say."""

import itertools

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import gpu_layers as gl
from gpu_layers.ops.checks import overlaps_itself
from tests.inputs import assert_same_bits, assert_within, each_backend, normal, unchanged

IN_PLACE = {
    "relu": lambda x, out: gl.ops.relu_forward(x, out=out),
    "dropout": lambda x, out: gl.ops.dropout_forward(x, 0.5, 1, 2, out=out),
    "dropout by channels": lambda x, out: gl.ops.dropout_forward(x, 0.5, 1, 2, mask_axes=1, out=out),
    "alpha_dropout": lambda x, out: gl.ops.alpha_dropout_forward(x, 0.5, 1, 2, out=out),
    "dropout_backward": lambda x, out: gl.ops.dropout_backward(x, gl.ops.dropout_forward(x, 0.5, 1, 2)[1], out=out),
}
LAYERS = {
    "ReLU": gl.ReLU(inplace=True),
    "Dropout": gl.Dropout(0.5, inplace=True, generator=gl.Generator(1)),
    "AlphaDropout": gl.AlphaDropout(0.5, inplace=True, generator=gl.Generator(1)),
    "Dropout1d": gl.Dropout1d(0.5, inplace=True, generator=gl.Generator(1)),
    "unscaled, in evaluation": gl.Dropout(0.5, inplace=True, scaling="inference").eval(),
}
OVERLAPPING = {
    "broadcast rows": lambda base: as_strided(base, (4, 5), (0, 4)),
    "broadcast columns": lambda base: as_strided(base, (4, 5), (4, 0)),
    "windows": lambda base: as_strided(base, (4, 5), (8, 4)),
    "windows backwards": lambda base: as_strided(base[::-1], (4, 5), (-8, 4)),
    "half an element apart": lambda base: as_strided(base, (4, 5), (20, 2)),
    "steps that meet": lambda base: as_strided(base, (4, 5), (12, 8)),
    "read-only": lambda base: np.broadcast_to(base[:5], (4, 5)),
}
SHARED_MEMORY = (
    r"^unsupported operation: more than one element of the written-to tensor refers to a single memory location\. "
    r"Please clone\(\)"
)


@each_backend
@pytest.mark.parametrize("call", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("view", OVERLAPPING.values(), ids=OVERLAPPING)
def test_elements_that_share_memory_are_not_written(backend, call, view):
    base = normal((40,), np.float32)
    out = view(base)
    for x in (out, normal((4, 5), np.float32)):
        with gl.use_backend(backend), unchanged(base), pytest.raises(ValueError, match=SHARED_MEMORY):
            call(x, out)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers_in_place_refuse_them_too(layer):
    base = normal((40,), np.float32)
    x = as_strided(base, (4, 5), (4, 4))
    offset = layer.generator.offset if getattr(layer, "generator", None) else 0
    with unchanged(base), pytest.raises(ValueError, match=SHARED_MEMORY):
        layer(x)
    if getattr(layer, "generator", None):
        assert layer.generator.offset == offset
    # Reading them is fine.
    assert_same_bits(gl.ReLU()(x), np.where(x > 0, x, np.float32(0)))


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_read_only_input_is_named_as_such(layer):
    x = np.ones((4, 5), np.float32)
    x.flags.writeable = False
    with pytest.raises(ValueError, match=r"^the input is read-only, and cannot be changed in place: pass a copy$"):
        layer(x)


def test_overlap_is_decided_exactly():
    """Against the addresses of all elements, over all strides up to two rows of three axes."""
    seen = set()
    for itemsize, shape in itertools.product((1, 2), [(2, 3, 2), (3, 1, 2), (1, 4, 3), (2, 2, 2)]):
        for strides in itertools.product(range(-7, 8), repeat=3):
            offsets = itertools.product(*map(range, shape))
            addresses = [
                sum(place * stride for place, stride in zip(index, strides, strict=True)) + byte
                for index in offsets
                for byte in range(itemsize)
            ]
            overlap = len(set(addresses)) < len(addresses)
            assert overlaps_itself(shape, strides, itemsize) == overlap, (shape, strides, itemsize)
            seen.add(overlap)
    assert seen == {True, False}


def test_views_without_overlap_are_written():
    x = normal((6, 8), np.float32)
    # Steps of the second axis reach over those of the first, yet no place is taken twice: 0 24 48, 16 40 64.
    for out in (x.T, x[::-2, ::3], as_strided(x.reshape(-1), (3, 2), (24, 16)), np.zeros((5, 0, 2), np.float32)):
        values = out.copy()
        gl.ops.relu_forward(values, out=out)
        assert_same_bits(np.ascontiguousarray(out), np.where(values > 0, values, np.float32(0)))


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8"])
def test_the_other_byte_order_is_named(dtype):
    x, name = np.ones((2, 3, 4)), np.dtype(dtype).newbyteorder("=").name
    advice = rf"got {dtype}, {name} in the other byte order: pass x\.astype\('{name}'\)$"
    native = x.astype(name)
    for call in (
        gl.ReLU(),
        gl.Dropout(),
        gl.MaxPool1d(2),
        gl.AvgPool1d(2),
        gl.BatchNorm1d(3),
        gl.LPPool1d(2, 2),
        lambda value: gl.ops.relu_forward(native, out=value),
        lambda value: gl.ops.relu_backward(value, gl.ops.relu_forward(native)[1]),
        lambda value: gl.ops.batch_norm_forward(native, None, None, residual=value),
    ):
        with pytest.raises(TypeError, match=advice):
            call(x.astype(dtype))
    assert_same_bits(gl.ReLU()(x.astype(dtype).astype(name)), native)


def test_the_other_byte_order_of_integers_is_named():
    with pytest.raises(TypeError, match=r"sample_ids must be int64, got >i8, int64 in the other byte order"):
        gl.Dropout()(np.ones((2, 3)), sample_ids=np.arange(2).astype(">i8"))
    with pytest.raises(TypeError, match=r"type int64 but got: >i8, int64 in the other byte order"):
        gl.MaxUnpool1d(2)(np.ones((1, 1, 2)), np.arange(2).reshape(1, 1, 2).astype(">i8"))


@each_backend
@pytest.mark.parametrize("eps", [2.0**-149, 1.9e-45, 2.0**-126, 1e-30, 3e38])
@pytest.mark.parametrize("kind", ["batch", "ghost", "sync", "given", "max_pool"])
def test_any_eps_that_float32_holds(backend, eps, kind):
    """Channel 0 is constant, and so all eps: 1 / sqrt of it, rounded to float32, is the slope of dx."""
    x, dy = np.zeros((4, 2, 6), np.float32), normal((4, 2, 6), np.float32, seed=1)
    x[:, 1] = normal((4, 6), np.float32)
    gamma, beta = np.array([2, 3], np.float32), np.array([0.5, -1], np.float32)
    zeros = np.zeros(2, np.float32)
    with gl.use_backend(backend):
        if kind == "batch":
            y, saved = gl.ops.batch_norm_forward(x, gamma, beta, eps=eps)
            dx = gl.ops.batch_norm_backward(dy, saved)[0]
        elif kind == "ghost":
            y, saved = gl.ops.ghost_batch_norm_forward(x, gamma, beta, bounds=(0, 4), eps=eps)
            dx = gl.ops.ghost_batch_norm_backward(dy, saved)[0]
        elif kind == "sync":
            alone = gl.SyncBatchNorm(2).communicator
            y, saved = gl.ops.sync_batch_norm_forward(x, gamma, beta, alone, eps=eps)
            dx = gl.ops.sync_batch_norm_backward(dy, saved)[0]
        elif kind == "given":
            y, saved = gl.ops.batch_norm_inference(x, zeros, zeros, gamma, beta, eps=eps)
            dx = gl.ops.batch_norm_inference_backward(dy, saved)[0]
        else:
            y, saved = gl.ops.batch_norm_max_pool_forward(x, gamma, beta, (1,), eps=eps)
            dx = gl.ops.batch_norm_max_pool_backward(dy, saved)[0]
    assert_same_bits(y[:, 0], np.full((4, 6), 0.5, np.float32))
    slope = 2 / np.sqrt(np.float64(np.float32(eps)))
    wanted = dy[:, 0].astype(np.float64)
    if kind != "given":
        wanted = wanted - wanted.mean()
    # A root, a quotient, two products and the mean of 24 numbers below 3: fewer than 32 roundings.
    assert_within(dx[:, 0], slope * wanted, slope * 3 * 32 * 2.0**-24)
    assert np.isfinite(y).all()


@pytest.mark.parametrize(("eps", "becomes"), [(2.0**-151, "0.0"), (2.0**-150, "0.0"), (3.5e38, "inf")])
def test_an_eps_that_float32_does_not_hold_is_refused(eps, becomes):
    x, ones = normal((4, 2), np.float32), np.ones(2, np.float32)
    alone = gl.SyncBatchNorm(2).communicator
    for forward in (
        lambda x, one, **options: gl.ops.batch_norm_forward(x, one, one, **options),
        lambda x, one, **options: gl.ops.batch_norm_inference(x, one, one, one, one, **options),
        lambda x, one, **options: gl.ops.ghost_batch_norm_forward(x, one, one, bounds=(0, 4), **options),
        lambda x, one, **options: gl.ops.sync_batch_norm_forward(x, one, one, alone, **options),
        lambda x, one, **options: gl.ops.batch_norm_max_pool_forward(x[..., None], one, one, (1,), **options),
        lambda x, one, **options: gl.ops.batch_norm_max_pool_inference(
            x[..., None], one, one, one, one, (1,), **options
        ),
    ):
        with pytest.raises(ValueError, match=f"must be a positive float32 number, but got .*, which becomes {becomes}"):
            forward(x, ones, eps=eps)
        # float64 holds it.
        forward(x.astype(np.float64), ones.astype(np.float64), eps=eps)
    for make in (gl.BatchNorm1d, gl.SyncBatchNorm, lambda n, **options: gl.GhostBatchNorm1d(n, 2, **options)):
        with pytest.raises(ValueError, match="must be a positive float32 number"):
            make(2, eps=eps)
        assert make(2, eps=eps, dtype="float64").eps == eps


@each_backend
@pytest.mark.parametrize("momentum", [-1, -1.2, 0, 1, 1.5, 100.0])
@pytest.mark.parametrize("kind", ["batch", "ghost", "sync"])
def test_momentum_is_any_finite_number(backend, momentum, kind):
    make = {"batch": gl.BatchNorm1d, "ghost": lambda n, **rest: gl.GhostBatchNorm1d(n, 2, **rest)}
    layer = make.get(kind, gl.SyncBatchNorm)(3, momentum=momentum, dtype="float64")
    mean, var = np.zeros(3), np.ones(3)
    with gl.use_backend(backend):
        for seed in range(2):
            x = normal((6, 3), seed=seed)
            layer(x)
            mean = (1 - momentum) * mean + momentum * x.mean(axis=0)
            var = (1 - momentum) * var + momentum * x.var(axis=0, ddof=1)
    # Some ten roundings of numbers below 100**2 * 10.
    assert_within(layer.buffers["running_mean"], mean, 1e6 * 2.0**-53)
    assert_within(layer.buffers["running_var"], var, 1e6 * 2.0**-53)


def test_a_momentum_beyond_float32_is_infinity_there_without_a_warning():
    layer = gl.BatchNorm1d(1, momentum=1e39)
    layer.buffers["running_mean"][...] = -1
    layer(np.array([[1], [3]], np.float32))
    assert layer.buffers["running_mean"].tolist() == [np.inf]  # -1 * -inf + 2 * inf
    assert np.isnan(layer.buffers["running_var"]).all()  # 1 * -inf + 2 * inf


def test_running_statistics_asked_for_too_late_are_named():
    layer = gl.BatchNorm1d(3, track_running_stats=False)
    layer.track_running_stats = True
    x = normal((4, 3), np.float32)
    for training in (True, False):
        with pytest.raises(RuntimeError, match=r"BatchNorm1d has no running_mean: call reset_running_stats\(\)"):
            layer.train(training)(x)
    layer.reset_running_stats()
    layer.train()(x)
    assert_within(layer.buffers["running_mean"], 0.1 * x.astype(np.float64).mean(axis=0), 8 * 2.0**-24)
    del layer.buffers["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="has no num_batches_tracked"):
        layer(x)


def test_running_statistics_that_share_memory_are_refused():
    layer = gl.BatchNorm1d(3)
    layer.buffers["running_var"] = as_strided(np.ones(1, np.float32), (3,), (0,))
    with pytest.raises(ValueError, match=SHARED_MEMORY):
        layer(normal((4, 3), np.float32))
