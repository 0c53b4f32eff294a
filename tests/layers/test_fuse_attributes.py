"""Whatever a layer holds survives fusing and folding, or they refuse it: attribute by attribute, new ones included."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.layers.convolution import Conv2d
from gpu_layers.layers.linear import Linear
from gpu_layers.layers.running_statistics import BatchStatistics
from gpu_layers.layers.sequential import Sequential
from tests.inputs import normal

PENDING = BatchStatistics(7, np.array([[2] * 3, [3] * 3], np.float32))
#: Another value of each attribute than a new layer's.
OTHER = {
    "training": False,
    "momentum": -1.2,
    "track_running_stats": False,
    "_use_batch_statistics": True,
    "_update_statistics": False,
    "deferred": True,
    "skip_nonfinite": True,
    "_pending": PENDING,
    "_skipped": 3,
    "eps": 0.5,
    "affine": False,
    "channels_last": True,
    "activation": "relu",
    "train_affine": False,
    "group_size": 4,
    "communicator": gl.SyncBatchNorm(1).communicator,
    "p": 0.75,
    "inplace": True,
    "generator": gl.Generator(99),
    "first_sample": 3,
    "scaling": "inference",
    "shared_axes": (1,),
    "_taken": np.zeros(3, np.uint64),
    "_taken_again": (np.zeros(3, np.uint64),),
    "kernel_size": 2,
    "_kernel": (2, 1),
    "stride": 2,
    "padding": ((0, 0), (0, 0)),
    "dilation": 2,
    "return_indices": True,
    "ceil_mode": True,
}
#: Set when a layer is made, and by its passes; parameters and buffers have values of their own below.
MADE = {"num_features", "dtype", "parameters", "buffers", "gradients", "_saved"}
# Shapes that suit both layouts: as many channels as columns.
X = [normal((4, 3, 5, 3), np.float32, seed=seed) for seed in range(4)]
X[2][0, 0, 0, 0] = np.inf

MAKE = {
    "BN": lambda: gl.BatchNorm2d(3),
    "ghost": lambda: gl.GhostBatchNorm2d(3, 2),
    "sync": lambda: gl.SyncBatchNorm(3),
    "R": gl.ReLU,
    "D": lambda: gl.Dropout(0.4, generator=gl.Generator(5, 2)),
    "P": lambda: gl.MaxPool2d(1),
}
ROWS = ["BN R", "ghost R", "sync R", "BN P", "BN R P", "BN D R", "R D", "D R"]
CASES = [
    pytest.param(row, place, name, id=f"{row}, {name} of {kind}")
    for row in ROWS
    for place, kind in enumerate(row.split())
    for name in vars(MAKE[kind]())
    if name not in MADE
]


def model(row):
    made = Sequential(*(MAKE[kind]() for kind in row.split()))
    for seed, values in enumerate((*made.parameters.values(), *made.buffers.values())):
        if values.dtype.kind == "f":
            values[...] = np.abs(normal(values.shape, seed=seed)) + 0.5
    return made


def fresh(value):
    """Generators hold a state: one for each model."""
    return gl.Generator(value.seed, value.offset) if isinstance(value, gl.Generator) else value


def trace(sequential):
    """All that can be seen: outputs and gradients of batches (one is not finite) in this mode; the state."""
    seen = []
    for x in X:
        y = sequential(x.copy())
        outputs = y if isinstance(y, tuple) else (y,)
        seen += outputs
        if not isinstance(y, tuple):
            seen.append(sequential.backward(normal(y.shape, np.float32, seed=9)))
            seen += [value for _, value in sorted(sequential.gradients.items())]
    seen += [value.copy() for value in (*sequential.parameters.values(), *sequential.buffers.values())]
    for layer in sequential.layers:
        if hasattr(layer, "pending"):
            pending = layer.pending
            seen += [layer.num_batches_skipped, *(vars(pending).values() if pending else ())]
            layer.commit()
            seen += [value.copy() for value in layer.buffers.values()]
        if isinstance(getattr(layer, "generator", None), gl.Generator):
            seen.append(layer.generator.offset)
    return seen


def assert_same_traces(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        if one is None or other is None:
            assert one is other
        else:
            np.testing.assert_array_equal(one, other, strict=True)


@pytest.mark.parametrize(("row", "place", "name"), CASES)
def test_every_attribute_survives_or_is_refused(row, place, name):
    assert name in OTHER, (
        f"a new attribute: give it another value in OTHER, and say in fusing.py what becomes of {name}"
    )
    plain, original = model(row), model(row)
    for each in (plain, original):
        setattr(each.layers[place], name, fresh(OTHER[name]))
    if name == "_pending":
        with pytest.raises(RuntimeError, match=r"has statistics pending: commit\(\) or rollback\(\) them first"):
            gl.fuse(original)
        return
    before = vars(original.layers[place]).copy()
    fused = gl.fuse(original)
    assert vars(original.layers[place]) == before
    with np.errstate(all="ignore"):
        assert_same_traces(trace(fused), trace(plain))


def test_the_rows_above_are_fused_as_they_are():
    for row in ROWS:
        fused = gl.fuse(model(row))
        assert "Absorbed" in [type(layer).__name__ for layer in fused.layers], row


@pytest.mark.parametrize("row", ROWS)
def test_an_attribute_of_the_users_survives_or_the_layer_does(row):
    for place in range(len(row.split())):
        original = model(row)
        layer = original.layers[place]
        layer.colour = "red"
        fused = gl.fuse(original).layers[place]
        assert fused.colour == "red"
        assert fused is layer or row.split()[place] in ("BN", "ghost", "sync")


def test_an_attribute_of_the_sequential_survives():
    inner = model("BN R")
    inner.colour, outer = "red", Sequential(inner)
    outer.colour = "blue"
    fused = gl.fuse(outer)
    assert (fused.colour, fused.layers[0].colour) == ("blue", "red")
    assert type(fused.layers[0].layers[1]).__name__ == "Absorbed"


def doubled(kind):
    """A layer of a subclass, or one whose forward is wrapped: twice the output."""
    base = type(MAKE[kind]())

    class Twice(base):
        def forward(self, x, *args):
            return 2 * super().forward(x, *args)

    subclassed, wrapped = MAKE[kind](), MAKE[kind]()
    subclassed.__class__ = Twice
    forward = wrapped.forward
    wrapped.forward = lambda x: 2 * forward(x)
    return subclassed, wrapped


@pytest.mark.parametrize("row", ROWS)
def test_a_forward_of_its_own_is_kept(row):
    for place, kind in enumerate(row.split()):
        for first, second in zip(doubled(kind), doubled(kind), strict=True):
            plain, original = (
                Sequential(*(own if at == place else layer for at, layer in enumerate(model(row))))
                for own in (first, second)
            )
            fused = gl.fuse(original)
            assert fused.layers[place] is second
            for training in (True, False):
                ours, theirs = fused.train(training)(X[0]), plain.train(training)(X[0])
                np.testing.assert_array_equal(ours, theirs, strict=True)
                assert np.abs(ours).max() > 1


def test_a_sequential_with_a_forward_of_its_own_is_refused_or_kept():
    class Residual(Sequential):
        def forward(self, x):
            return x + super().forward(x)

    residual = Residual(gl.BatchNorm2d(3), gl.ReLU())
    with pytest.raises(TypeError, match=r"^expected a Sequential, got Residual$"):
        gl.fuse(residual)
    assert gl.fuse(Sequential(residual)).layers[0] is residual
    wrapped = model("BN R")
    wrapped.forward = lambda x: x
    with pytest.raises(TypeError, match=r"^expected a Sequential, got Sequential whose forward was replaced$"):
        gl.fuse(wrapped)
    assert gl.fuse(Sequential(wrapped)).layers[0] is wrapped


def test_modes_are_each_layers_own():
    """A dropout that keeps dropping in evaluation, and one that no longer does in training."""
    for row, place in (("R D", 1), ("D R", 0), ("BN D R", 1)):
        for training in (True, False):
            plain, original = model(row), model(row)
            for each in (plain, original):
                each.train(training)
                each.layers[place].train(not training)
            assert_same_traces(trace(gl.fuse(original)), trace(plain))


def test_a_batch_norm_in_two_places_stays_one_layer():
    norm, relu = gl.BatchNorm2d(3), gl.ReLU()
    fused = gl.fuse(Sequential(norm, relu, Sequential(norm, relu)))
    assert fused.layers[0] is norm
    assert fused.layers[2].layers[0] is norm
    # Layers without a state are fused wherever they stand.
    twice = gl.fuse(Sequential(gl.BatchNorm2d(3), relu, gl.BatchNorm2d(3), relu))
    assert [type(layer).__name__ for layer in twice.layers] == ["BatchNorm2d", "Absorbed"] * 2


# Folding.

FOLDED = {
    "Linear": (lambda: Linear(5, 3, seed=1), lambda: gl.BatchNorm1d(3)),
    "Linear, ghost": (lambda: Linear(5, 3, seed=1), lambda: gl.GhostBatchNorm1d(3, 2)),
    "Conv2d": (lambda: Conv2d(2, 3, 2, seed=1), lambda: gl.BatchNorm2d(3)),
    "Conv2d, sync": (lambda: Conv2d(2, 3, 2, seed=1), lambda: gl.SyncBatchNorm(3)),
}
FOLDED_CASES = [
    pytest.param(kind, name, id=f"{kind}, {name}")
    for kind, (_, make) in FOLDED.items()
    for name in vars(make())
    if name not in MADE
]


def folded_pair(kind):
    layer, norm = (make() for make in FOLDED[kind])
    for seed, values in enumerate((*layer.parameters.values(), *norm.parameters.values(), *norm.buffers.values())):
        if values.dtype.kind == "f":
            values[...] = np.abs(normal(values.shape, seed=seed)) + 0.5
    return layer.eval(), norm.eval()


def folded_input(kind):
    return normal((6, 5) if kind.startswith("Linear") else (2, 2, 5, 4), np.float32)


@pytest.mark.parametrize(("kind", "name"), FOLDED_CASES)
def test_every_attribute_of_a_batch_norm_is_folded_or_refused(kind, name):
    assert name in OTHER, (
        f"a new attribute: give it another value in OTHER, and say in folding.py what becomes of {name}"
    )
    layer, norm = folded_pair(kind)
    setattr(norm, name, OTHER[name])
    # Folding is of evaluation, whatever the mode.
    norm.eval()
    x = folded_input(kind)
    try:
        folded = gl.fold_batch_norm(layer, norm)
    except (TypeError, ValueError, RuntimeError):
        # To a matrix the layout of the channels makes no difference.
        refused = {"track_running_stats", "_use_batch_statistics", "_pending", "activation"}
        assert name in refused | ({"channels_last"} if kind.startswith("Conv2d") else set())
        return
    # At most 8 products of numbers below 10, times scales below 10: in float32.
    np.testing.assert_allclose(folded(x), norm(layer(x)), rtol=0, atol=30 * 1000 * 2.0**-24)


@pytest.mark.parametrize("kind", FOLDED)
def test_what_a_folded_layer_would_lose_is_refused_by_name(kind):
    layer, norm = folded_pair(kind)
    norm.colour = "red"
    with pytest.raises(TypeError, match=r"Norm(1d|2d)? has colour, which a folded layer would not have$"):
        gl.fold_batch_norm(layer, norm)
    layer, norm = folded_pair(kind)
    layer.colour = "red"
    assert gl.fold_batch_norm(layer, norm).colour == "red"
    layer, norm = folded_pair(kind)
    norm.update_statistics = True
    with pytest.raises(ValueError, match="has update_statistics=True"):
        gl.fold_batch_norm(layer, norm)
    norm.update_statistics, norm.use_batch_statistics = None, True
    with pytest.raises(ValueError, match="has use_batch_statistics=True: it evaluates by the batch"):
        gl.fold_batch_norm(layer, norm)


@pytest.mark.parametrize("kind", FOLDED)
def test_layers_with_a_forward_of_their_own_are_refused_by_name(kind):
    for which in (0, 1):
        pair = list(folded_pair(kind))
        base = type(pair[which])
        pair[which].forward = base.forward.__get__(pair[which])
        with pytest.raises(TypeError, match=f"^expected a plain {base.__name__}, got one whose forward was replaced$"):
            gl.fold_batch_norm(*pair)
        pair = list(folded_pair(kind))
        pair[which].__class__ = type("Mine", (base,), {})
        with pytest.raises(TypeError, match=r"^expected a .*, got Mine, a subclass, whose forward may be another$"):
            gl.fold_batch_norm(*pair)
