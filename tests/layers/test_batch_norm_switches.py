"""Switches that outlast a mode, and running statistics that are updated once, late, or not at all."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.layers.linear import Linear
from gpu_layers.layers.sequential import Sequential
from gpu_layers.training.optimizers import SGD, Adam
from tests.inputs import assert_all_same_bits, assert_same_bits, normal, unchanged

X, DY = normal((7, 3)) + 2, normal((7, 3), seed=1)
#: (use, update) -> by the batch in training, by the batch in evaluation, updated in training, in evaluation.
SWITCHES = {
    (None, None): (True, False, True, False),
    (True, None): (True, True, True, False),
    (False, None): (False, False, True, False),
    (None, True): (True, False, True, True),
    (None, False): (True, False, False, False),
    (True, True): (True, True, True, True),
    (True, False): (True, True, False, False),
    (False, True): (False, False, True, True),
    (False, False): (False, False, False, False),
}


def layer(**arguments):
    made = gl.BatchNorm1d(3, dtype="float64", **arguments)
    made(normal((9, 3), seed=5))
    return made


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_switches(switches, training):
    switched, plain, updated = layer(), layer(), layer()
    switched.use_batch_statistics, switched.update_statistics = switches
    by_batch, updates = SWITCHES[switches][not training], SWITCHES[switches][2 + (not training)]
    # Through the other mode and back: the switches stay.
    switched.train(not training).train(training)
    plain.train(by_batch)
    assert_same_bits(switched(X), plain(X))
    updated(X)
    # Backward is that of the statistics which the forward used, whatever has become of them.
    assert_same_bits(switched.backward(DY), plain.backward(DY))
    for name in ("weight", "bias"):
        assert_same_bits(switched.gradients[name], plain.gradients[name])
    expected = updated if updates else layer()
    for name, value in expected.buffers.items():
        # Where the batch is not normalised its variance goes through float64's ``count * var``: one rounding.
        np.testing.assert_allclose(switched.buffers[name], value, rtol=4 * 2.0**-53, atol=0, err_msg=name)


def test_a_switch_is_checked():
    for name in ("use_batch_statistics", "update_statistics"):
        with pytest.raises(TypeError, match=f"{name} must be True, False, or None to follow the mode, got int"):
            setattr(layer(), name, 1)
    without = gl.BatchNorm1d(3, track_running_stats=False)
    without.update_statistics, without.use_batch_statistics = False, True
    with pytest.raises(ValueError, match="use_batch_statistics=False needs running statistics: this layer keeps none"):
        without.use_batch_statistics = False
    with pytest.raises(ValueError, match="update_statistics=True needs running statistics: this layer keeps none"):
        without.update_statistics = True


def test_statistics_of_one_value_are_refused_where_they_are_to_be_folded_in():
    frozen = layer()
    frozen.use_batch_statistics = False
    with (
        unchanged(*frozen.buffers.values()),
        pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size \[1, 3"),
    ):
        frozen(X[:1])
    frozen(X[:0])
    assert frozen.buffers["num_batches_tracked"] == 2
    frozen.update_statistics = False
    assert frozen(X[:1]).shape == (1, 3)


@pytest.mark.parametrize("optimizer", [lambda p: SGD(p, 0.1, 0.9, weight_decay=0.1), lambda p: Adam(p, 0.1)])
def test_a_frozen_affine_part_stays_as_it_is(optimizer):
    model = Sequential(Linear(3, 3, dtype="float64", seed=1), gl.BatchNorm1d(3, dtype="float64"))
    stepping = optimizer(model.parameters)

    def step():
        model(X)
        dx = model.backward(DY)
        stepping.step(model.gradients)
        return dx

    step()
    model.layers[1].train_affine = False
    model.eval().train()
    kept, moving = list(model.layers[1].parameters.values()), model.layers[0].parameters["weight"]
    before = moving.copy()
    with unchanged(*kept):
        assert np.isfinite(step()).all()
    assert model.layers[1].gradients == {"weight": None, "bias": None}
    assert (moving != before).any()
    model.to("cpu")
    with pytest.raises(ValueError, match=r"got a difference in \['1.bias'\]"):
        stepping.step({name: value for name, value in model.gradients.items() if name != "1.bias"})


def test_what_is_pending_is_folded_in_once():
    deferred, plain = layer(), layer()
    deferred.deferred = True
    with unchanged(*deferred.buffers.values()):
        assert_same_bits(deferred(X), plain(X))
        deferred(X)  # the same again, as recomputation does
        assert deferred.pending.count == 7
        np.testing.assert_allclose(deferred.pending.mean, X.mean(axis=0))
    deferred.to("cpu")
    deferred.commit()
    assert deferred.pending is None
    assert_all_same_bits(deferred.buffers, plain.buffers)
    with unchanged(*deferred.buffers.values()):
        deferred.commit()
        deferred(X)
        deferred.rollback()
        deferred.commit()
    assert deferred.num_batches_skipped == 0


def test_what_waits_and_what_is_counted_moves_with_the_layer(monkeypatch):
    norm = layer()
    norm.deferred = norm.skip_nonfinite = True
    norm(X)
    norm.commit()
    norm(X + 1)
    expected, own = norm.pending.statistics, (norm.pending.statistics, norm._skipped)
    for module in ("gpu_layers.layers.running_statistics", "gpu_layers.layers.base"):
        monkeypatch.setattr(f"{module}.moved", lambda array, xp: array.copy())
    norm.to("cpu")
    assert norm.pending.statistics is not own[0]
    assert norm._skipped is not own[1]
    assert norm.pending.count == 7
    assert_same_bits(norm.pending.statistics, expected)


def test_committing_before_backward_does_not_change_it():
    deferred, plain = layer(), layer()
    deferred.deferred = True
    deferred(X)
    assert_same_bits(deferred.eval()(X), plain.eval()(X))
    deferred.commit()
    assert_same_bits(deferred.backward(DY), plain.backward(DY))
    assert_same_bits(deferred.gradients["weight"], plain.gradients["weight"])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_a_batch_that_is_not_finite_is_left_out_and_counted(bad, momentum):
    skipping, plain, torchs = (layer(momentum=momentum) for _ in range(3))
    skipping.skip_nonfinite = True
    broken = X.copy()
    broken[2, 1] = bad
    for x in (X, broken, X + 1):
        with np.errstate(all="ignore"):
            skipping(x)
            torchs(x)
    for x in (X, X + 1):
        plain(x)
    assert_all_same_bits(skipping.buffers, plain.buffers)
    assert skipping.num_batches_skipped == 1
    assert skipping.to("cpu").num_batches_skipped == 1
    assert list(skipping.state_dict()) == list(plain.state_dict())
    # Without the switch it is torch's: the batch counts and spoils the average.
    assert torchs.buffers["num_batches_tracked"] == 4
    assert not np.isfinite(torchs.buffers["running_var"][1])


def two_norms():
    return Sequential(gl.BatchNorm1d(3, dtype="float64"), gl.ReLU(), gl.BatchNorm1d(3, dtype="float64"))


def test_a_transaction_folds_in_everything_or_nothing():
    model, plain = two_norms(), two_norms()
    plain(X)
    with gl.statistics_transaction(model):
        model(X)
        model(X)
        assert model.buffers["0.num_batches_tracked"] == 0
    assert_all_same_bits(model.buffers, plain.buffers)
    first, _, second = model.layers
    with (
        unchanged(*model.buffers.values()),
        pytest.raises(ValueError, match="should contain 2 elements not 3"),
        gl.statistics_transaction(model),
    ):
        second(first(X)[:, :2])
    assert not any(norm.deferred or norm.pending for norm in (model.layers[0], model.layers[2]))
    with gl.statistics_transaction(model):
        pass


def test_a_transaction_skips_a_step_for_all_layers():
    model = two_norms()
    model.layers[1].backward = model.layers[1].forward = lambda x: x * np.nan
    with unchanged(*model.buffers.values()), gl.statistics_transaction(model, skip_nonfinite=True):
        model(X)
    # The first layer's own statistics were finite; those of the step were not.
    assert [model.layers[i].num_batches_skipped for i in (0, 2)] == [1, 1]
    with gl.statistics_transaction(model.layers[0].forward, skip_nonfinite=True):
        model.layers[0](X)
    assert model.layers[0].buffers["num_batches_tracked"] == 1


@pytest.mark.parametrize("floor", ["reference", "emulated"])
@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("of_layer", [False, True])
@pytest.mark.parametrize("broken", [(), (0,), (1,), (0, 1)], ids=str)
def test_what_a_transaction_skips_and_what_a_layer_itself(broken, of_layer, of_all, floor):
    own, other = layer(), layer()
    own.skip_nonfinite = of_layer
    before = [state_of(norm) for norm in (own, other)]
    spoilt = X.copy()
    spoilt[3, 1] = np.nan
    with gl.use_backend(floor), gl.statistics_transaction(lambda: None, layers=[own, other], skip_nonfinite=of_all):
        for number, norm in enumerate((own, other)):
            norm(spoilt if number in broken else X)
    for number, norm in enumerate((own, other)):
        # The step is left out for all if any is broken; a layer leaves out its own besides.
        left_out = (of_all and broken != ()) or (of_layer and number == 0 and 0 in broken)
        assert norm.num_batches_skipped == left_out
        assert norm.buffers["num_batches_tracked"] == 2 - left_out
        if left_out:
            assert_all_same_bits(norm.buffers, before[number])
        else:
            plain = layer()
            plain(spoilt if number in broken else X)
            for name, value in plain.buffers.items():
                # By float64's own kernels on the other floor: some roundings of each sum of seven values.
                np.testing.assert_allclose(norm.buffers[name], value, rtol=32 * 2.0**-53, atol=0, err_msg=name)


@pytest.mark.parametrize("floor", ["reference", "emulated"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("accepted", [None, True, False])
@pytest.mark.parametrize("broken", [False, True])
def test_a_commit_is_accepted_by_the_caller_and_by_the_layer(floor, own, accepted, broken):
    norm, plain = layer(), layer()
    norm.deferred, norm.skip_nonfinite = True, own
    x = X.copy()
    x[3, 1] = np.inf if broken else 3
    before = state_of(norm)
    with gl.use_backend(floor), np.errstate(all="ignore"):
        norm(x)
        plain(x)
        norm.commit(None if accepted is None else np.array(accepted))
    left_out = accepted is False or (own and broken)
    assert norm.num_batches_skipped == left_out
    if left_out:
        assert_all_same_bits(norm.buffers, before)
    else:
        assert_all_same_bits(norm.buffers, state_of(plain))


@pytest.mark.parametrize("floor", ["reference", "emulated"])
def test_a_step_is_left_out_for_a_mean_or_a_variance_and_nothing_else(floor):
    """A variance may leave the range by itself; a parameter that is no number does not spoil the statistics."""
    x = normal((7, 3), np.float32)
    for column, weight, left_out in ((1e25, 1, True), (1, np.inf, False), (1, np.nan, False), (np.nan, 1, True)):
        norm = gl.BatchNorm1d(3)
        norm.parameters["weight"][1] = weight
        spoilt = x * np.array([1, 1, column], np.float32)
        with gl.use_backend(floor), np.errstate(all="ignore"), gl.statistics_transaction(norm, skip_nonfinite=True):
            norm(spoilt)
            assert np.isfinite(norm.pending.mean).all() == (column == column)
        assert norm.num_batches_skipped == left_out
        assert norm.buffers["num_batches_tracked"] == (not left_out)


def test_a_transaction_keeps_apart_from_what_waits():
    norm = layer()
    norm.deferred = True
    norm(X)
    with pytest.raises(RuntimeError, match="has statistics pending: commit"), gl.statistics_transaction(norm):
        pass
    assert norm.pending is not None
    norm.rollback()
    with gl.statistics_transaction(lambda x: norm(x), layers=[norm]):
        norm(X)
    assert norm.deferred
    assert norm.buffers["num_batches_tracked"] == 2
    with pytest.raises(RuntimeError, match="no statistics are pending"):
        norm.pending_is_finite()


class Broken(gl.BatchNorm1d):
    """Whose statistics can be found, and not folded in."""

    def commit(self, accepted=None):
        super().commit(accepted)
        raise MemoryError("no memory left")


def state_of(model):
    return {name: value.copy() for name, value in model.buffers.items()}


@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_commit_that_breaks_off_leaves_nothing_behind(position, skip_nonfinite):
    norms = [gl.BatchNorm1d(3, dtype="float64") for _ in range(3)]
    norms[position] = Broken(3, dtype="float64")
    model = Sequential(*norms)
    before = state_of(model)
    arrays = model.buffers
    with (
        pytest.raises(MemoryError, match="no memory left"),
        gl.statistics_transaction(model, skip_nonfinite=skip_nonfinite),
    ):
        model(X)
    assert_all_same_bits(model.buffers, before)
    assert all(model.buffers[name] is array for name, array in arrays.items())
    assert [norm.num_batches_skipped for norm in norms] == [0, 0, 0]
    assert not any(norm.deferred or norm.pending for norm in norms)


def test_a_buffer_that_cannot_be_written_leaves_nothing_behind():
    model = two_norms()
    before = state_of(model)
    model.layers[2].buffers["running_mean"].flags.writeable = False
    with pytest.raises(ValueError, match="read-only"), gl.statistics_transaction(model):
        model(X)
    model.layers[2].buffers["running_mean"].flags.writeable = True
    assert_all_same_bits(model.buffers, before)


def test_an_inner_transaction_fails_with_the_outer_one():
    model = two_norms()
    first, _, second = model.layers
    before = state_of(model)

    def step():
        with gl.statistics_transaction(model):
            with gl.statistics_transaction(first):
                y = first(X)
            # At its end the inner one has folded in: what follows sees it.
            assert first.buffers["num_batches_tracked"] == 1
            with gl.statistics_transaction(lambda x: x, layers=[first, second]):
                with gl.statistics_transaction(model):
                    first(X - 1)
                second(first(X + 1))
            assert [int(norm.buffers["num_batches_tracked"]) for norm in (first, second)] == [3, 1]
            second(y)
            raise OSError("later")

    with pytest.raises(OSError, match="later"):
        step()
    assert_all_same_bits(model.buffers, before)
    assert not any(norm.deferred or norm.pending for norm in (first, second))


@pytest.mark.parametrize("floor", ["reference", "emulated"])
@pytest.mark.parametrize("skipped_before", [0, 1])
def test_a_count_of_skipped_batches_is_undone_too(floor, skipped_before):
    norm, broken = layer(), Broken(3, dtype="float64")
    spoilt = X * np.nan
    with gl.use_backend(floor), np.errstate(all="ignore"):
        for _ in range(skipped_before):
            with gl.statistics_transaction(norm, skip_nonfinite=True):
                norm(spoilt)
        assert norm.num_batches_skipped == skipped_before
        with (
            pytest.raises(MemoryError, match="no memory left"),
            gl.statistics_transaction(Sequential(norm, broken), skip_nonfinite=True),
        ):
            broken(norm(spoilt))
    assert norm.num_batches_skipped == skipped_before


def test_an_inner_transaction_of_three_fails_with_the_outermost_alone():
    norm, other = layer(), layer()
    before, of_other = state_of(norm), state_of(other)

    def step():
        with gl.statistics_transaction(norm):
            with gl.statistics_transaction(other), gl.statistics_transaction(lambda x: x, layers=[norm, other]):
                other(norm(X))
            assert norm.buffers["num_batches_tracked"] == 2
            raise OSError("later")

    with pytest.raises(OSError, match="later"):
        step()
    assert_all_same_bits(norm.buffers, before)
    # The block that has failed is none of the other layer's.
    assert other.buffers["num_batches_tracked"] == of_other["num_batches_tracked"] + 1


def test_an_inner_transaction_that_fails_leaves_the_outer_one():
    norm, plain = layer(), layer()

    def inner():
        with gl.statistics_transaction(norm):
            norm(X + 1)
            raise OSError("inner")

    with gl.statistics_transaction(norm):
        with pytest.raises(OSError, match="inner"):
            inner()
        with gl.statistics_transaction(norm):
            norm(X)
        norm(X * 2)
    plain(X)
    plain(X * 2)
    assert_all_same_bits(norm.buffers, state_of(plain))


def test_an_outer_commit_that_breaks_off_undoes_the_inner_ones():
    norm, broken = layer(), Broken(3, dtype="float64")
    before, of_broken = state_of(norm), state_of(broken)

    def step():
        with gl.statistics_transaction(Sequential(norm, broken)):
            with gl.statistics_transaction(norm):
                norm(X)
            broken(norm(X))

    with pytest.raises(MemoryError, match="no memory left"):
        step()
    assert_all_same_bits(norm.buffers, before)
    assert_all_same_bits(broken.buffers, of_broken)
