"""Mean and variance over dropout masks: against numpy.var over the same passes, and what becomes of the modes."""

import ml_dtypes
import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.layers.linear import Linear
from gpu_layers.layers.sequential import Sequential
from gpu_layers.runtime.backend import use_executor
from tests.inputs import (
    UNIT_ROUNDOFF,
    accumulation_dtype,
    assert_all_same_bits,
    assert_same_bits,
    assert_within,
    each_backend,
    each_dtype,
    normal,
    unchanged,
)


def over_passes(forward, passes):
    outputs = np.stack([np.asarray(forward(), np.float64) for _ in range(passes)])
    return outputs.mean(axis=0), outputs.var(axis=0)


def check(moments, expected, dtype):
    """Some ten roundings of the accumulation dtype; the outputs averaged in ``expected`` are rounded to the dtype."""
    roundoff = 10 * UNIT_ROUNDOFF[accumulation_dtype(dtype)] + 2 * UNIT_ROUNDOFF[dtype]
    for ours, theirs, size in zip(moments, expected, (1, 2), strict=True):
        assert ours.dtype == accumulation_dtype(dtype)
        assert_within(ours, theirs, roundoff * 8**size)


@each_dtype
@each_backend
@pytest.mark.parametrize("scaling", ["inverted", "inference"])
@pytest.mark.parametrize("passes", [1, 2, 7])
def test_a_dropout_layer(dtype, backend, scaling, passes):
    x = normal((5, 7), dtype)
    layer = gl.Dropout(0.4, scaling=scaling, generator=gl.Generator(1, 2**64 - 3))
    with gl.use_backend(backend), unchanged(x):
        moments = gl.mc_dropout(layer, x, passes=passes)
    assert layer.generator.offset == (2**64 - 3 + passes) % 2**64
    again = gl.Dropout(0.4, scaling=scaling, generator=gl.Generator(1, 2**64 - 3))
    check(moments, over_passes(lambda: again(x), passes), dtype)


@pytest.mark.parametrize(
    "make",
    [
        lambda g: gl.Dropout2d(0.4, generator=g),
        lambda g: gl.AlphaDropout(0.4, generator=g),
        lambda g: gl.DropPath(0.4, generator=g),
        lambda g: gl.ActivationDropout("gelu", 0.4, order="before", generator=g),
        lambda g: Sequential(gl.ReLU(), gl.Dropout(0.4, generator=g)),
    ],
)
def test_other_layers(make):
    x = normal((6, 5, 4), np.float32)
    layer, again = make(gl.Generator(1)), make(gl.Generator(1))
    check(gl.mc_dropout(layer.eval(), x, passes=5), over_passes(lambda: again(x), 5), np.dtype(np.float32))


@each_backend
@pytest.mark.parametrize("shape", [(6, 5), (6, 64), (6,), (0, 3)])
def test_masks_of_samples(backend, shape):
    x, ids = normal(shape, np.float32), (np.arange(6) * 7)[: shape[0]]
    layer, again = (gl.Dropout(0.4, generator=gl.Generator(1)) for _ in range(2))
    expected = over_passes(lambda: again(x, sample_ids=ids), 4)
    with gl.use_backend(backend), unchanged(x, ids):
        moments = gl.mc_dropout(layer, x, 4, sample_ids=ids)
    assert layer.generator.offset == 4
    check(moments, expected, np.dtype(np.float32))
    # Of a sample, whatever else is in the batch.
    order = np.arange(len(ids))[::-1]
    reordered = gl.mc_dropout(gl.Dropout(0.4, generator=gl.Generator(1)), x[order], 4, sample_ids=ids[order])
    for ours, whole in zip(reordered, moments, strict=True):
        assert_same_bits(ours, whole[order])


def test_a_dropout_layer_is_one_launch():
    class Launches:
        names: list[str] = []  # noqa: RUF012

        def launch(self, kernel, *rest):
            self.names.append(kernel.name)

    x = normal((6, 5), np.float32)
    with use_executor(Launches()):
        gl.mc_dropout(gl.Dropout(), x, 50)
        gl.mc_dropout(gl.Dropout(), x, 50, sample_ids=np.arange(6))
    assert Launches.names == ["dropout_moments<float, false>", "dropout_moments<float, true>"]


def test_a_generator_on_the_device():
    x = normal((6, 5), np.float32)
    layer = gl.Dropout(0.4, generator=gl.CudaGraphGenerator(1, device="cpu"))
    again = gl.Dropout(0.4, generator=gl.Generator(1))
    check(gl.mc_dropout(layer, x, 4), over_passes(lambda: again(x), 4), np.dtype(np.float32))


def network(inplace=False):
    return Sequential(
        Linear(4, 8, seed=1),
        gl.BatchNorm1d(8),
        gl.ReLU(),
        Sequential(gl.Dropout(0.5, inplace, generator=gl.Generator(3))),
        Linear(8, 2, seed=2),
    )


def modes(model):
    return [layer.training for layer in (model, *model.layers, *model.layers[3].layers)]


def test_a_network_with_batch_norm_in_evaluation():
    x = normal((9, 4), np.float32)
    model, again = network(), network()
    for training in (True, False):
        model.train(training)
        model.layers[1].eval()  # frozen: it stays what it is
        state, before = model.state_dict(), modes(model)
        moments = gl.mc_dropout(model, x, passes=6)
        assert modes(model) == before
        assert_all_same_bits(model.state_dict(), state)
        again.eval()
        again.layers[3].layers[0].train()
        check(moments, over_passes(lambda: again(x), 6), np.dtype(np.float32))
        assert moments[1].max() > 0


def test_modes_come_back_after_an_exception():
    model = network()
    before = modes(model)
    with pytest.raises(ValueError, match="expected"):
        gl.mc_dropout(model, normal((9, 4, 2), np.float32))
    assert modes(model) == before


def test_a_function_and_its_layers():
    x = normal((9, 4), np.float32)
    dropout, norm = gl.Dropout(0.5, generator=gl.Generator(3)).eval(), gl.BatchNorm1d(4)
    seen = []

    def model(value):
        seen.append((dropout.training, norm.training))
        return dropout(norm(value))

    gl.mc_dropout(model, x, passes=2, layers=[dropout, norm])
    gl.mc_dropout(model, x, passes=1)
    assert seen == [(True, False), (True, False), (False, True)]
    assert (dropout.training, norm.training) == (False, True)


def test_layers_of_an_object_and_of_a_method():
    class Model:
        def __init__(self):
            self.parts = {"dropout": gl.Dropout(0.5, generator=gl.Generator(3)).eval()}

        def __call__(self, x):
            return self.parts["dropout"](x)

        predict = __call__

    x = np.ones((50, 4), np.float32)
    for model in (Model(), Model().predict):
        _, variance = gl.mc_dropout(model, x, passes=8)
        assert variance.max() > 0


def test_layers_in_place_leave_the_input_alone():
    x = normal((9, 4), np.float32)
    model = Sequential(gl.Dropout(0.5, True, generator=gl.Generator(3)), gl.ReLU(True))
    again = Sequential(gl.Dropout(0.5, generator=gl.Generator(3)), gl.ReLU())
    with unchanged(x):
        moments = gl.mc_dropout(model, x, passes=5)
    check(moments, over_passes(lambda: again(x), 5), np.dtype(np.float32))


def test_the_mean_and_variance_are_those_of_dropout():
    # Of x / q with probability q and 0 otherwise: x and x**2 p / q. Six deviations over 4,000 passes.
    x = np.full(1000, 2.0)
    mean, variance = gl.mc_dropout(gl.Dropout(0.2, generator=gl.Generator(5)), x, passes=4000)
    assert abs(mean.mean() - 2) < 6 * np.sqrt(4 * 0.25 / 4e6)
    assert abs(variance.mean() - 4 * 0.25) < 0.01


def test_what_no_call_keeps_is_zero():
    x = np.array([np.nan, np.inf, -np.inf, 1.0] * 20)
    mean, variance = gl.mc_dropout(gl.Dropout(1), x, passes=3)
    assert_same_bits(mean, np.zeros(80))
    assert_same_bits(variance, np.zeros(80))


@each_dtype
@each_backend
def test_one_launch_and_many_passes_agree_where_outputs_overflow(dtype, backend):
    """0.75 of the largest number, kept, is 1.25 of it, which the dtype rounds to infinity: either way of counting."""
    largest = float(ml_dtypes.finfo(dtype).max)
    x = np.array([0.75 * largest, -0.75 * largest, np.inf, -np.inf, np.nan, 3, -0.0, largest / 2] * 40).astype(dtype)
    with gl.use_backend(backend):
        alone = gl.mc_dropout(gl.Dropout(0.4, generator=gl.Generator(1)), x, passes=6)
        within = gl.mc_dropout(Sequential(gl.Dropout(0.4, generator=gl.Generator(1))), x, passes=6)
    kept = sum(gl.ops.dropout_mask(x.size, 0.4, 1, offset).astype(int) for offset in range(6))
    assert set(kept) >= {1, 2, 3, 4, 5, 6}
    for mean, variance in (alone, within):
        for position, value in enumerate([np.inf, -np.inf, np.inf, -np.inf, np.nan]):
            part = slice(position, None, 8)
            np.testing.assert_array_equal(mean[part], np.where(kept[part] == 0, 0, value))
            np.testing.assert_array_equal(variance[part], np.where(kept[part] == 0, 0, np.nan))
        outputs = (np.array(3 / 0.6, accumulation_dtype(dtype)).astype(dtype), 0, largest / 1.2)
        for position, value in zip((5, 6), outputs, strict=False):
            part, share = slice(position, None, 8), kept[position::8] / 6
            roundoff = 10 * UNIT_ROUNDOFF[accumulation_dtype(dtype)]
            assert_within(mean[part], float(value) * share, roundoff * 8)
            assert_within(variance[part], float(value) ** 2 * share * (1 - share), roundoff * 64)
        # Half of the largest number stays one when it is kept.
        assert np.isfinite(mean[7::8]).all()
        np.testing.assert_array_equal(np.isnan(variance[7::8]), False)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (gl.Dropout(), {"passes": 0}, ValueError, r"passes must be in 1 \.\. 16777216, got 0"),
        (gl.Dropout(), {"passes": 2.0}, TypeError, "passes must be an integer, got float"),
        (gl.Dropout(), {"passes": 2**24 + 1}, ValueError, "passes must be in"),
        (3, {}, TypeError, "model must be a layer or a function, got int"),
        (gl.Dropout(), {"sample_ids": np.arange(2)}, ValueError, r"sample_ids must have the shape \[3\]"),
        (gl.Dropout(), {"sample_ids": np.arange(3.0)}, TypeError, "sample_ids must be int64, got float64"),
    ],
)
def test_bad_arguments_are_refused(model, options, error, message):
    offset, x = gl.default_generator.offset, np.ones(3)
    with unchanged(x), pytest.raises(error, match=message):
        gl.mc_dropout(model, x, **options)
    assert gl.default_generator.offset == offset


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"p": 2}, ValueError, "dropout probability has to be between 0 and 1, but got 2"),
        ({"passes": -1}, ValueError, "passes must be in"),
        ({"start": 2**64}, ValueError, "start must be in"),
    ],
)
def test_bad_arguments_of_the_op_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        gl.ops.dropout_moments(np.ones(3), **({"p": 0.5, "seed": 1, "offset": 2, "passes": 3} | change))
