"""Running statistics estimated again: against NumPy over the whole data set, and what stays as it was."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.layers.linear import Linear
from gpu_layers.layers.sequential import Sequential
from tests.inputs import BFLOAT16, assert_all_same_bits, assert_same_bits, assert_within, normal, unchanged

# Fewer than a hundred values of order 1 to 10 in float64, a handful of roundings each.
BOUND = 1e4 * 2.0**-53


def network(p=0.5):
    """Batch norm, and batch norm after dropout and weights."""
    return Sequential(
        Linear(4, 6, dtype="float64", seed=1),
        gl.BatchNorm1d(6, dtype="float64"),
        gl.ReLU(),
        gl.Dropout(p, generator=gl.Generator(3)),
        Linear(6, 5, dtype="float64", seed=2),
        gl.BatchNorm1d(5, dtype="float64"),
    )


def trained(p=0.5):
    model = network(p)
    for seed in range(5):
        model(normal((16, 4), seed=seed))
        model.backward(normal((16, 5), seed=seed))
    return model


def data():
    """Ragged batches; one is empty, one is a single sample."""
    return [normal((samples, 4), seed=9 + samples) * 2 + 1 for samples in (7, 1, 0, 12, 3)]


def inputs_of(model, position, x):
    for layer in model.layers[:position]:
        x = layer(x)
    return x


def test_each_batch_norm_gets_the_statistics_of_what_it_sees_in_evaluation():
    model, batches = trained(), data()
    with unchanged(*batches, *model.parameters.values()):
        gl.recalibrate(model, batches)
    model.eval()
    for position in (1, 5):
        x = inputs_of(model, position, np.concatenate(batches))
        buffers = model.layers[position].buffers
        assert_within(buffers["running_mean"], x.mean(axis=0), BOUND)
        assert_within(buffers["running_var"], x.var(axis=0, ddof=1), BOUND)
        assert buffers["num_batches_tracked"] == len(batches)
    # So evaluation over the data is normalised to the end: unlike before, when dropout was in the averages.
    y = model(np.concatenate(batches))
    assert_within(y.mean(axis=0), np.zeros(5), BOUND)
    assert_within(y.var(axis=0, ddof=1), np.ones(5), 1e-3)


def test_the_variance_shift_of_dropout_is_repaired():
    """x of variance v and mean 0, kept by 1/2 and doubled, has variance 2 v: the moving average learns that."""
    model = Sequential(gl.Dropout(0.5, generator=gl.Generator(1)), gl.BatchNorm1d(3, momentum=None, dtype="float64"))
    batches = [normal((500, 3), seed=seed) for seed in range(10)]
    for x in batches:
        model(x)
    shifted = model.layers[1].buffers["running_var"].copy()
    gl.recalibrate(model, batches)
    # The standard error of a variance of 5000 values is sqrt(2 / 5000) = 0.02; with dropout sqrt(5 / 5000) * 2 = 0.06.
    assert_within(shifted, np.full(3, 2.0), 0.3)
    exact = np.concatenate(batches).var(axis=0, ddof=1)
    assert_within(model.layers[1].buffers["running_var"], exact, BOUND)
    assert (np.abs(exact - 1) < 0.1).all()


def test_how_the_data_is_cut_does_not_matter():
    whole = np.concatenate(data())
    one, other = trained(), trained()
    gl.recalibrate(one, [whole])
    gl.recalibrate(other, data)
    for position in (1, 5):
        for name in ("running_mean", "running_var"):
            assert_within(other.layers[position].buffers[name], one.layers[position].buffers[name], BOUND)


def test_jointly_layers_normalise_by_the_batch():
    model = trained()
    batches = [normal((samples, 4), seed=samples) for samples in (7, 2, 12)]
    # Nothing is read twice: an iterator will do.
    gl.recalibrate(model, iter(batches), order="joint")
    first = np.concatenate([inputs_of(model, 1, x) for x in batches])
    copy = trained()
    copy.layers[3].eval()
    second = np.concatenate([inputs_of(copy, 5, x) for x in batches])
    for position, x in ((1, first), (5, second)):
        buffers = model.layers[position].buffers
        assert_within(buffers["running_mean"], x.mean(axis=0), BOUND)
        assert_within(buffers["running_var"], x.var(axis=0, ddof=1), BOUND)
        assert buffers["num_batches_tracked"] == 3


@pytest.mark.parametrize("order", ["sequential", "joint"])
@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32], ids=str)
def test_float32_statistics_of_far_away_data(order, backend, dtype):
    """Means a hundred times the spread; batch statistics are float32, merged in float64."""
    batches = [(normal((n, 3, 5), seed=n) + (100, 200, 150, 100, 120)[n - 2]).astype(dtype) for n in (2, 3, 4, 5, 6)]
    layer = gl.BatchNorm1d(3)
    with gl.use_backend(backend):
        gl.recalibrate(layer, batches, order=order)
    x = np.concatenate(batches).astype(np.float64)
    # The means of the batches, rounded, are off by 2**-24 * 200, and of the spread of about 40 the variance has.
    assert_within(layer.buffers["running_mean"], x.mean(axis=(0, 2)), 200 * 2.0**-22)
    assert_within(layer.buffers["running_var"], x.var(axis=(0, 2), ddof=1), 40 * 200 * 2.0**-20)
    assert layer.buffers["running_mean"].dtype == layer.buffers["running_var"].dtype == np.float32


def test_modes_switches_masks_and_batches_stay():
    model = trained()
    model.layers[1].eval()
    model.layers[5].update_statistics = False
    modes = [layer.training for layer in (model, *model.layers)]
    offset = model.layers[3].generator.offset
    for order in ("sequential", "joint"):
        gl.recalibrate(model, [(x, "label") for x in (data()[0], data()[3])], order=order)
        assert [layer.training for layer in (model, *model.layers)] == modes
        assert model.layers[5].update_statistics is False
        assert model.layers[5].buffers["num_batches_tracked"] == 2
        assert not any("forward" in vars(layer) or "_take_batch" in vars(layer) for layer in model.layers)
    assert model.layers[3].generator.offset == offset
    with pytest.raises(RuntimeError, match="backward was called before forward"):
        model.backward(normal((7, 5)))


def test_a_layer_that_works_in_place_leaves_the_batches_alone():
    model = Sequential(gl.ReLU(inplace=True), gl.BatchNorm1d(4, dtype="float64"), gl.BatchNorm1d(4, dtype="float64"))
    batches = data()
    with unchanged(*batches):
        gl.recalibrate(model, batches)


def test_a_function_and_a_layer_it_calls_twice():
    layer, unused = gl.BatchNorm1d(4, dtype="float64"), gl.BatchNorm1d(4)
    before = unused.state_dict()
    batches = [normal((6, 4)), normal((8, 4), seed=1)]
    gl.recalibrate(lambda x: layer(layer(x) + 3), batches, layers=[layer, unused])
    x = np.concatenate(batches)
    both = np.concatenate([x, x / np.sqrt(1 + 1e-5) + 3])
    assert_within(layer.buffers["running_mean"], both.mean(axis=0), BOUND)
    assert_within(layer.buffers["running_var"], both.var(axis=0, ddof=1), BOUND)
    assert_all_same_bits(unused.state_dict(), before)


def test_a_layer_that_some_batches_do_not_reach():
    layer = gl.BatchNorm1d(4, dtype="float64")
    batches = [normal((6, 4)), normal((8, 4), seed=1), np.full((3, 4), 100.0)]
    gl.recalibrate(lambda x: layer(x) if x[0, 0] < 50 else x, batches, layers=[layer])
    assert_within(layer.buffers["running_mean"], np.concatenate(batches[:2]).mean(axis=0), BOUND)


def test_batches_that_call_a_layer_as_often_as_they_like():
    """Once for the first batch, twice and three times for the others: all of what it receives counts."""
    layer = gl.BatchNorm1d(2, dtype="float64")
    batches = [normal((4, 2), seed=n) + n for n in range(3)]

    def model(x):
        times = 1 + int(np.round(x.mean()))
        for _ in range(times):
            x = layer(x) * 2 + 1
        return x

    assert [1 + int(np.round(x.mean())) for x in batches] == [1, 2, 3]
    layer.eval()
    received = []
    for x in batches:
        for _ in range(1 + int(np.round(x.mean()))):
            received.append(x)
            x = x / np.sqrt(1 + 1e-5) * 2 + 1
    gl.recalibrate(model, batches, layers=[layer])
    every = np.concatenate(received)
    assert len(every) == 24
    assert_within(layer.buffers["running_mean"], every.mean(axis=0), BOUND)
    assert_within(layer.buffers["running_var"], every.var(axis=0, ddof=1), BOUND)
    assert layer.buffers["num_batches_tracked"] == 3


def routed(order):
    """Three batch norms; each batch takes those that its first value says, in that order."""
    norms = {name: gl.BatchNorm1d(2, dtype="float64") for name in "abc"}

    def model(x, take=lambda name, x: norms[name](x)):
        for name in order[int(x[0, 0])]:
            x = take(name, x) * 2 + 1
        return x

    return norms, model


@pytest.mark.parametrize(
    "order", [["a", "ab", "cab"], ["a", "b", "ba"], ["ac", "bc", "ab"], ["c", "bc", "ab"], ["", "a", "bac"]]
)
def test_layers_that_are_first_reached_later(order):
    """Each has the statistics of what it receives when all those before it have theirs."""
    norms, model = routed(order)
    batches = [normal((5, 2), seed=n) * (n + 1) for n in range(3)]
    for number, x in enumerate(batches):
        x[0, 0] = number
    gl.recalibrate(model, lambda: iter(batches), layers=norms.values())
    received = {name: [] for name in "abc"}

    def take(name, x):
        received[name].append(x)
        return norms[name].eval()(x)

    for x in batches:
        model(x, take)
    for name, norm in norms.items():
        if received[name]:
            every = np.concatenate(received[name])
            assert_within(norm.buffers["running_mean"], every.mean(axis=0), BOUND)
            assert_within(norm.buffers["running_var"], every.var(axis=0, ddof=1), BOUND)
            assert norm.buffers["num_batches_tracked"] == 3
        else:
            assert norm.buffers["num_batches_tracked"] == 0


def test_layers_that_are_called_in_both_orders_are_both_estimated():
    norms, model = routed(["ab", "ba", "c"])
    batches = [normal((5, 2), seed=n) for n in range(3)]
    for number, x in enumerate(batches):
        x[0, 0] = number
    gl.recalibrate(model, batches, layers=norms.values())
    assert [int(norm.buffers["num_batches_tracked"]) for norm in norms.values()] == [3, 3, 3]
    first = np.concatenate([batches[0], batches[1] / np.sqrt(1 + 1e-5) * 2 + 1])
    assert_within(norms["a"].buffers["running_mean"], first.mean(axis=0), BOUND)


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_a_forward_that_the_user_has_wrapped_stays(order):
    """And what counts is what the batch norm itself receives."""
    layer = gl.BatchNorm1d(4, dtype="float64")
    inner, calls = layer.forward, []

    def wrapper(x):
        calls.append(len(x))
        return inner(x * 10)

    layer.forward = wrapper
    batches = data()
    gl.recalibrate(Sequential(layer), batches, order=order) if order == "sequential" else gl.recalibrate(
        Sequential(layer), [x for x in batches if len(x) != 1], order=order
    )
    assert layer.forward is wrapper
    assert calls
    x = 10 * np.concatenate([x for x in batches if order == "sequential" or len(x) != 1])
    assert_within(layer.buffers["running_mean"], x.mean(axis=0), 10 * BOUND)
    assert_within(layer.buffers["running_var"], x.var(axis=0, ddof=1), 100 * BOUND)
    with pytest.raises(OSError, match="the disk is gone"):
        gl.recalibrate(Sequential(layer), Failing(normal((5, 4))), order=order)
    assert layer.forward is wrapper
    assert "_forward" not in vars(layer)


def test_a_subclass_receives_what_its_forward_makes():
    class Tenfold(gl.BatchNorm1d):
        def forward(self, x):
            return super().forward(x * 10) + 3

    layer = Tenfold(4, dtype="float64")
    gl.recalibrate(layer, data())
    assert_within(layer.buffers["running_mean"], 10 * np.concatenate(data()).mean(axis=0), 10 * BOUND)


def test_a_layer_that_updates_in_evaluation_does_not_while_others_are_estimated():
    first, second = gl.BatchNorm1d(4, dtype="float64"), gl.BatchNorm1d(4, dtype="float64")
    first.update_statistics = second.update_statistics = True
    gl.recalibrate(Sequential(first, second), data())
    x = np.concatenate(data())
    assert_within(first.buffers["running_mean"], x.mean(axis=0), BOUND)
    y = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0, ddof=1) + 1e-5)
    assert_within(second.buffers["running_mean"], y.mean(axis=0), BOUND)
    assert_within(second.buffers["running_var"], y.var(axis=0, ddof=1), BOUND)
    assert first.update_statistics is second.update_statistics is True


class Failing:
    """Batches that break off."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        yield from self.batches
        raise OSError("the disk is gone")


@pytest.mark.parametrize("order", ["sequential", "joint"])
@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (Failing(normal((5, 4))), OSError, "the disk is gone"),
        ([normal((5, 4)), normal((5, 3))], ValueError, "expected input with 4 channels, got 3"),
        (
            [normal((5, 4)), np.full((5, 4), np.nan)],
            ValueError,
            r"the statistics of BatchNorm1d\(\d, .* are not finite",
        ),
        ([], ValueError, "^no batch reached a batch norm"),
        ([normal((0, 4))], ValueError, "a variance needs at least 2 values per channel, .* got 0 in 1 batches"),
        (3, TypeError, "batches must be an iterable, or a function that returns one, got int"),
    ],
)
def test_a_failure_changes_nothing(order, batches, error, message):
    model = trained()
    model.train()
    dx = model.backward(normal((16, 5), seed=4))
    with unchanged(*model.buffers.values()), pytest.raises(error, match=message):
        gl.recalibrate(model, batches, order=order)
    assert all(layer.training for layer in model.layers)
    assert_same_bits(model.backward(normal((16, 5), seed=4)), dx)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (3, {}, TypeError, "model must be a layer or a function, got int"),
        (gl.ReLU(), {}, ValueError, "found no batch norm with running statistics"),
        (gl.BatchNorm1d(4, track_running_stats=False), {}, ValueError, "found no batch norm with running statistics"),
        (network(), {"order": "random"}, ValueError, "order must be one of 'sequential', 'joint', got 'random'"),
    ],
)
def test_bad_arguments(model, options, error, message):
    with pytest.raises(error, match=message):
        gl.recalibrate(model, data(), **options)


def test_an_iterator_serves_a_single_batch_norm_only():
    layer = gl.BatchNorm1d(4, dtype="float64")
    gl.recalibrate(layer, iter(data()))
    assert_within(layer.buffers["running_mean"], np.concatenate(data()).mean(axis=0), BOUND)
    with pytest.raises(TypeError, match="pass a list, or a function that returns an iterator"):
        gl.recalibrate(network(), iter(data()))
