"""What happens between a forward and its backward: the gradient is that of the forward, or an error, never another."""

import gc

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.core import writes
from gpu_layers.layers.convolution import Conv2d
from gpu_layers.layers.linear import Linear
from gpu_layers.layers.sequential import Sequential
from gpu_layers.training.optimizers import SGD, Adam
from tests.inputs import assert_all_same_bits, assert_same_bits, each_backend, normal

MODIFIED = (
    r"^one of the variables needed for gradient computation has been modified by an inplace operation: {name}, of"
)


def randomised(layer):
    """Parameters and running statistics that are not those of a new layer."""
    for seed, values in enumerate((*layer.parameters.values(), *layer.buffers.values())):
        if values.dtype.kind == "f":
            values[...] = np.abs(normal(values.shape, seed=seed)) + 0.5
    return layer


def batch_norm_and_pool(activation):
    return gl.fuse(Sequential(gl.BatchNorm2d(3, activation=activation), gl.MaxPool2d(2))).layers[0]


X = normal((4, 3, 6, 5), np.float32)
SAVES_NOTHING = {
    "ReLU": gl.ReLU,
    "Dropout": lambda: gl.Dropout(0.4, generator=gl.Generator(1)),
    "Dropout2d": lambda: gl.Dropout2d(0.4, generator=gl.Generator(1)),
    "AlphaDropout": lambda: gl.AlphaDropout(0.4, generator=gl.Generator(1)),
    "DropPath": lambda: gl.DropPath(0.4, generator=gl.Generator(1)),
    "ActivationDropout relu": lambda: gl.ActivationDropout("relu", 0.4, generator=gl.Generator(1)),
    "ActivationDropout identity": lambda: gl.ActivationDropout("identity", 0.4, generator=gl.Generator(1)),
    "MaxPool2d": lambda: gl.MaxPool2d(3, 2, 1),
    "AdaptiveMaxPool2d": lambda: gl.AdaptiveMaxPool2d(2),
    "AvgPool2d": lambda: gl.AvgPool2d(2),
}
NORMS = {
    "BatchNorm2d": lambda: gl.BatchNorm2d(3),
    "BatchNorm2d gelu": lambda: gl.BatchNorm2d(3, activation="gelu"),
    "GhostBatchNorm2d": lambda: gl.GhostBatchNorm2d(3, 2, activation="silu"),
    "SyncBatchNorm": lambda: gl.SyncBatchNorm(3, activation="relu"),
    "BatchNormMaxPool": lambda: batch_norm_and_pool("leaky_relu"),
}
SAVES_X = {
    **NORMS,
    "ActivationDropout gelu": lambda: gl.ActivationDropout("gelu", 0.4, generator=gl.Generator(1)),
    "ActivationDropout tanh before": lambda: gl.ActivationDropout(
        "tanh", 0.4, order="before", generator=gl.Generator(1)
    ),
    "Conv2d": lambda: Conv2d(3, 4, 3, seed=1),
    "LPPool2d": lambda: gl.LPPool2d(3, 2),
    "LPPool2d inf": lambda: gl.LPPool2d(np.inf, 2),
}
ALL = SAVES_NOTHING | SAVES_X


def made(kind, training=True):
    return randomised(ALL[kind]()).train(training)


def gradients(layer, x, between=lambda layer, x, y: None):
    """Of x and of parameters, where something happens between forward and backward."""
    y = layer(x)
    dy = normal(y.shape, y.dtype, seed=7)
    between(layer, x, y)
    return {"x": layer.backward(dy), **layer.gradients}


@each_backend
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_are_the_callers(backend, kind, training):
    if kind.startswith("Dropout") or kind in ("AlphaDropout", "DropPath"):
        training = True  # in evaluation the output is the input
    with gl.use_backend(backend):
        expected = gradients(made(kind, training), X.copy())

        def overwrite(layer, x, y):
            y[...] = np.nan
            gl.ReLU(inplace=True)(y)

        assert_all_same_bits(gradients(made(kind, training), X.copy(), overwrite), expected)


@each_backend
@pytest.mark.parametrize("kind", SAVES_NOTHING)
def test_inputs_that_are_not_saved_may_be_overwritten(backend, kind):
    with gl.use_backend(backend):
        expected = gradients(made(kind), X.copy())

        def overwrite(layer, x, y):
            x[...] = np.nan
            gl.ReLU(inplace=True)(x)

        assert_all_same_bits(gradients(made(kind), X.copy(), overwrite), expected)


IN_PLACE = {
    "all of x": lambda x: gl.ReLU(inplace=True)(x),
    "a view": lambda x: gl.Dropout(0.5, inplace=True, generator=gl.Generator(1))(x[1:2, :, ::-2]),
    "the last element": lambda x: gl.AlphaDropout(0.5, inplace=True, generator=gl.Generator(1))(x.reshape(-1)[-1:]),
    "out": lambda x: gl.ops.relu_forward(np.ones_like(x), out=x),
    "out of a backward": lambda x: gl.ops.dropout_backward(
        np.ones_like(x), gl.ops.dropout_forward(np.ones_like(x), 0.5, 1, 2)[1], out=x
    ),
}


@each_backend
@pytest.mark.parametrize("kind", SAVES_X)
@pytest.mark.parametrize("write", IN_PLACE.values(), ids=IN_PLACE)
def test_a_saved_input_that_this_library_overwrites_is_an_error(backend, kind, write):
    for training in (True, False):
        layer, x = made(kind, training), X.copy()
        with gl.use_backend(backend):
            with pytest.raises(RuntimeError, match=MODIFIED.format(name="x")):
                gradients(layer, x, lambda layer, x, y: write(x))
            # A forward of what is there now has a backward again.
            again = gradients(layer, x)
            if "Dropout" not in kind:
                assert_all_same_bits(again, gradients(layer, x.copy()))


@pytest.mark.parametrize("kind", SAVES_X)
def test_writes_elsewhere_or_before_are_none_of_its_business(kind):
    whole = np.zeros((12, 3, 6, 5), np.float32)
    x = whole[4:8]
    x[...] = X
    expected = gradients(made(kind), X.copy())

    def write_around(layer, x, y):
        gl.ReLU(inplace=True)(whole[:4])
        gl.ReLU(inplace=True)(whole[8:])
        gl.ReLU(inplace=True)(whole[:0])

    # In place before the forward: as it were another input.
    gl.Dropout(0.0, inplace=True)(x)
    assert_all_same_bits(gradients(made(kind), x, write_around), expected)


@each_backend
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_parameters_and_statistics_of_a_forward_are_those_of_its_backward(backend, kind, training):
    other = {name: value + 1 for name, value in made(kind).state_dict().items()}

    def step(layer, x, y):
        SGD(layer.parameters, lr=1.0).step({name: np.ones_like(value) for name, value in layer.parameters.items()})

    def by_hand(layer, x, y):
        for values in (*layer.parameters.values(), *layer.buffers.values()):
            values[...] = 7

    def train_another(layer, x, y):
        """A layer that has the same buffers, as those of a fused model and the plain one do."""
        twin = gl.SyncBatchNorm(3, momentum=0.9)
        twin.buffers = layer.buffers
        twin(X * 3 + 1)

    with gl.use_backend(backend):
        expected = gradients(made(kind, training), X)
        for between in (step, by_hand, train_another, lambda layer, x, y: layer.load_state_dict(other)):
            assert_all_same_bits(gradients(made(kind, training), X, between), expected)
        # Another forward in training folds in its statistics; the first forward's saved ones stay.
        layer = made(kind, training)
        y = layer(X)
        saved = layer._saved
        layer.train()(X * 3 + 1)
        layer._saved = saved
        dx = layer.backward(normal(y.shape, y.dtype, seed=7))
        assert_all_same_bits({"x": dx, **layer.gradients}, expected)


@each_backend
def test_operations_copy_what_is_small(backend):
    """Normalising by live running averages, which the layer then updates."""
    layer, dy = randomised(gl.BatchNorm2d(3)), normal(X.shape, np.float32, seed=7)
    mean, var = layer.buffers["running_mean"], layer.buffers["running_var"]
    affine = layer.parameters["weight"], layer.parameters["bias"]
    window = {"kernel_size": (2, 2)}
    with gl.use_backend(backend):
        passes = [
            (gl.ops.batch_norm_inference, gl.ops.batch_norm_inference_backward, {}, dy),
            (gl.ops.batch_norm_inference, gl.ops.batch_norm_inference_backward, {"activation": "gelu"}, dy),
            (
                gl.ops.batch_norm_max_pool_inference,
                gl.ops.batch_norm_max_pool_inference_backward,
                {"activation": "gelu", **window},
                dy[:, :, :3, :2],
            ),
        ]
        saved = [forward(X, mean, var, *affine, **options)[1] for forward, _, options, _ in passes]
        expected = [backward(dz, one) for (_, backward, _, dz), one in zip(passes, saved, strict=True)]
        saved = [forward(X, mean, var, *affine, **options)[1] for forward, _, options, _ in passes]
        layer(X * 3 + 1)
        for values in affine:
            values[...] = 9
        for (_, backward, _, dz), one, wanted in zip(passes, saved, expected, strict=True):
            assert_all_same_bits(backward(dz, one), wanted)
    assert (saved[0].mean != mean).all()
    assert (saved[0].var != var).all()


@each_backend
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_a_residual_is_read_again_where_an_activation_needs_it(backend, activation):
    layer, residual = randomised(gl.BatchNorm2d(3, activation=activation)), normal(X.shape, np.float32, seed=3)
    dy = normal(X.shape, np.float32, seed=7)
    with gl.use_backend(backend):
        layer(X, residual=residual)
        expected = layer.backward(dy)
        layer(X, residual=residual)
        gl.ReLU(inplace=True)(residual)
        if activation is None:
            assert_all_same_bits(layer.backward(dy), expected)
        else:
            with pytest.raises(RuntimeError, match=MODIFIED.format(name="residual")):
                layer.backward(dy)


@each_backend
def test_rows_that_work_in_place_have_the_gradients_of_those_that_do_not(backend):
    def model(inplace):
        return Sequential(
            gl.BatchNorm2d(3),
            gl.ReLU(),
            gl.AlphaDropout(0.4, inplace, generator=gl.Generator(1)),
            gl.MaxPool2d(2),
            gl.ReLU(inplace),
            gl.Dropout(0.4, inplace, generator=gl.Generator(2)),
            Conv2d(3, 2, 2, seed=1),
            gl.ReLU(inplace),
            gl.Dropout2d(0.4, inplace, generator=gl.Generator(3)),
        )

    with gl.use_backend(backend):
        assert_all_same_bits(gradients(model(True), X.copy()), gradients(model(False), X.copy()))


def test_a_residual_connection_in_place():
    """y += x, by NumPy itself, into the output of a ReLU."""
    layer, dy = gl.ReLU(), normal(X.shape, np.float32, seed=7)
    y = layer(X)
    y += 100
    assert_same_bits(layer.backward(dy), np.where(X > 0, dy, np.float32(0)))


def test_a_layer_in_place_after_two_readers():
    """The second branch overwrites what the first one has saved."""
    norm, x = gl.BatchNorm2d(3), X.copy()
    y = norm(x)
    gl.Dropout(0.5, inplace=True, generator=gl.Generator(1))(x)
    with pytest.raises(RuntimeError, match=r"x, of shape \[4, 3, 6, 5\], was written to after the forward"):
        norm.backward(y)


@pytest.mark.parametrize("make", [lambda: Linear(5, 2, seed=1), lambda: Conv2d(3, 2, 2, seed=1)])
@pytest.mark.parametrize("write", ["SGD", "Adam", "load_state_dict"])
def test_a_weight_that_has_changed_is_an_error(make, write):
    """It is as large as an input: not copied. Replaced by another array it is the forward's that counts."""
    layer = make()
    x = normal((4, 5), np.float32) if isinstance(layer, Linear) else X
    expected = gradients(layer, x)
    optimizer = {"SGD": SGD, "Adam": Adam}.get(write)

    def change(layer, x, y):
        if optimizer is None:
            layer.load_state_dict(layer.state_dict())
        else:
            optimizer(layer.parameters, lr=0.1).step({k: np.ones_like(v) for k, v in layer.parameters.items()})

    with pytest.raises(RuntimeError, match=MODIFIED.format(name="weight")):
        gradients(layer, x, change)
    layer = make()

    def replace(layer, x, y):
        layer.parameters["weight"] = np.zeros_like(layer.parameters["weight"])

    assert_all_same_bits(gradients(layer, x, replace), expected)


def test_a_training_loop_sees_none_of_this():
    model = Sequential(Linear(4, 6, seed=1), gl.BatchNorm1d(6), gl.ReLU(inplace=True), gl.Dropout(0.5, inplace=True))
    model.append(Linear(6, 2, seed=2))
    optimizer = SGD(model.parameters, lr=0.1)
    for seed in range(3):
        model(normal((8, 4), np.float32, seed=seed))
        model.backward(normal((8, 2), np.float32))
        optimizer.step(model.gradients)


def test_records_go_with_their_memory():
    gc.collect()
    before = dict(writes._writes.ranges)
    kept = np.ones(4, np.float32)
    for size in range(1, 50):
        gl.ReLU(inplace=True)(np.ones(size, np.float32))
        gl.ReLU(inplace=True)(kept[1:3])
    gc.collect()
    new = writes._writes.ranges.keys() - before.keys()
    address = kept.__array_interface__["data"][0]
    assert new == {(address + 4, address + 12)}
    del kept
    gc.collect()
    assert writes._writes.ranges.keys() <= before.keys()


@each_backend
@pytest.mark.parametrize("kind", ["Dropout", "AlphaDropout", "ActivationDropout relu", "ActivationDropout gelu"])
@pytest.mark.parametrize("on_device", [False, True])
def test_an_earlier_forward_has_its_own_mask_or_none(backend, kind, on_device):
    """The numbers of a call for CUDA graphs lie in one place, which the layer's next call takes."""
    layer, again = made(kind), made(kind)
    for one in (layer, again):
        one.generator = gl.CudaGraphGenerator(3, device="cpu") if on_device else gl.Generator(3)
    with gl.use_backend(backend):
        expected = gradients(again, X)["x"]
        layer(X)
        earlier = layer._saved
        layer(X)
        dy = normal(X.shape, np.float32, seed=7)
        assert (layer.backward(dy) != expected).any()
        layer._saved = earlier
        if not on_device or kind == "ActivationDropout relu":
            assert_same_bits(layer.backward(dy), expected)
        else:
            with pytest.raises(RuntimeError, match=MODIFIED.format(name="rng_state")):
                layer.backward(dy)


def test_live_numbers_of_a_generator_are_not_those_of_an_earlier_call():
    generator = gl.CudaGraphGenerator(3, device="cpu")
    _, saved = gl.ops.dropout_forward(X, 0.5, None, None, rng_state=generator.rng_state)
    kept = gl.ops.dropout_backward(X, saved)
    taken = generator.advance(None)
    with pytest.raises(RuntimeError, match=MODIFIED.format(name="rng_state")):
        gl.ops.dropout_backward(X, saved)
    assert_same_bits(gl.ops.dropout_backward(X, saved.with_rng_state(taken)), kept)
