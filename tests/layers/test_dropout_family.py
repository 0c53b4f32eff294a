"""What all dropout layers do, whether they drop elements, channels or samples, to 0 or another value."""

import warnings

import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests import philox_in_ints
from tests.inputs import LAYOUTS, assert_same_bits, each_dtype, normal, unchanged, with_specials

SEED = 2**40 + 3
# Shape, and the leading axes that have a mask.
INPUTS = {
    gl.Dropout: [((5, 7), 2), ((), 0)],
    gl.Dropout1d: [((3, 4, 5), 2), ((4, 5), 1)],
    gl.Dropout2d: [((3, 4, 2, 3), 2), ((3, 4, 5), 2)],
    gl.Dropout3d: [((2, 3, 2, 3, 2), 2), ((3, 2, 3, 2), 1)],
    gl.FeatureAlphaDropout: [((3, 4), 2), ((3, 4, 5), 2), ((3, 4, 2, 3), 2)],
    gl.DropPath: [((12,), 1), ((12, 3), 1), ((7, 3, 4), 1)],
    gl.AlphaDropout: [((5, 7), 2), ((), 0), ((3, 2, 4), 3)],
}
CHANNELS = [gl.Dropout1d, gl.Dropout2d, gl.Dropout3d]
EVERY = [(layer, shape, axes) for layer, shapes in INPUTS.items() for shape, axes in shapes]
every_input = pytest.mark.parametrize(
    ("make", "shape", "axes"), EVERY, ids=[f"{layer.__name__}-{shape}" for layer, shape, _ in EVERY]
)


def keep_of(shape, axes, p, offset):
    leading = shape[:axes]
    keep = philox_in_ints.kept(int(np.prod(leading)), p, SEED, offset).reshape(leading)
    return np.broadcast_to(keep.reshape(leading + (1,) * (len(shape) - axes)), shape)


@each_dtype
@every_input
def test_training(dtype, make, shape, axes):
    layer = make(0.5, generator=gl.Generator(SEED, 5))
    x, dy = np.array(normal(shape, dtype)), np.array(normal(shape, dtype, seed=1))
    op = gl.ops.alpha_dropout_forward if isinstance(layer, gl.AlphaDropout) else gl.ops.dropout_forward
    for offset in (5, 6):
        with unchanged(x, dy):
            y, dx = layer(x), layer.backward(dy)
        expected, saved = op(x, 0.5, SEED, offset, mask_axes=axes or None)
        assert_same_bits(y, expected)
        assert_same_bits(dx, gl.ops.dropout_backward(dy, saved))
        keep = keep_of(shape, axes, 0.5, offset)
        np.testing.assert_array_equal((dx != 0)[dy != 0], keep[dy != 0])
        if not isinstance(layer, gl.AlphaDropout):
            assert_same_bits(y, np.where(keep, x * dtype.type(2), dtype.type(0)))
    assert layer.generator.offset == 7


@every_input
def test_evaluation_is_the_identity(make, shape, axes):
    layer = make(0.5, generator=gl.Generator(SEED)).eval()
    x = np.array(with_specials(shape, np.float32))
    with unchanged(x):
        assert layer(x) is x
        assert layer.backward(x) is x
    assert layer.generator.offset == 0


@every_input
@pytest.mark.parametrize("p", [0, 1])
def test_p_0_changes_nothing_and_p_1_gives_zeros(make, shape, axes, p):
    layer = make(p, generator=gl.Generator(SEED))
    x = np.array(normal(shape, np.float32))
    expected = np.zeros_like(x) if p else x
    assert_same_bits(layer(x), expected)
    assert_same_bits(layer.backward(x), expected)
    assert layer.generator.offset == 1


@pytest.mark.parametrize("make", [make for make in INPUTS if make is not gl.DropPath])
def test_in_place_writes_the_input(make):
    shape, _ = INPUTS[make][0]
    values = normal(shape, np.float32)
    expected = make(0.5, generator=gl.Generator(SEED))(values)
    x = values.copy()
    layer = make(0.5, True, generator=gl.Generator(SEED))
    assert layer(x) is x
    assert_same_bits(x, expected)
    assert layer.eval()(x) is x


def torch_mask_axes(layer, shape):
    """Leading axes of torch's mask: the others have one fate each."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a later torch may take 3-D input of dropout2d for one sample
        y = layer(torch.ones(shape)).numpy()
    axes = next(axes for axes in range(len(shape) + 1) if _equal_beyond(y, axes))
    assert 0 < (y == y.max()).mean() < 1
    return axes


def _equal_beyond(y, axes):
    flat = y.reshape(*y.shape[:axes], -1)
    return (flat == flat[..., :1]).all()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Dropout1d", (30, 20, 5)),
        ("Dropout1d", (40, 5)),
        ("Dropout2d", (30, 20, 2, 3)),
        ("Dropout2d", (30, 20, 5)),
        ("Dropout3d", (30, 20, 2, 3, 2)),
        ("Dropout3d", (40, 3, 2, 3)),
        ("FeatureAlphaDropout", (30, 20)),
        ("FeatureAlphaDropout", (30, 20, 5)),
        ("FeatureAlphaDropout", (30, 20, 5, 2, 2)),
    ],
)
def test_what_is_dropped_together_is_torchs(name, shape):
    ours = getattr(gl, name)(generator=gl.Generator(SEED))(np.ones(shape, np.float32))
    expected = torch_mask_axes(getattr(torch.nn, name)(), shape)
    assert 0 < (ours == ours.max()).mean() < 1
    assert next(axes for axes in range(len(shape) + 1) if _equal_beyond(ours, axes)) == expected


@pytest.mark.parametrize("make", CHANNELS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rank", range(7))
def test_other_ranks_are_refused_in_torchs_words(make, training, rank):
    fewer, more = sorted({len(shape) for shape, _ in INPUTS[make]})
    layer = make(generator=gl.Generator(1)).train(training)
    x = np.ones((2,) * rank, np.float32)
    if rank in (fewer, more):
        layer(x)
        return
    message = f"^{make.__name__.lower()}: Expected {fewer}D or {more}D input, but received a {rank}D input$"
    with pytest.raises(ValueError, match=message):
        layer(x)
    assert layer.generator.offset == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_feature_alpha_dropout_needs_channels(rank):
    with pytest.raises(ValueError, match=r"^Feature dropout requires at least 2 dimensions in the input$"):
        gl.FeatureAlphaDropout()(np.ones((2,) * rank, np.float32))


def test_drop_path_needs_samples():
    with pytest.raises(ValueError, match=r"^DropPath requires at least 1 dimension in the input$"):
        gl.DropPath(0.5)(np.array(1.0))


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("of", [lambda shape: [1.0], lambda shape: None, lambda shape: np.ones(shape, int), torch.ones])
def test_a_forward_that_raises_leaves_everything_as_it_was(make, inplace, of):
    layer = make(0.5, generator=gl.Generator(1))
    layer.inplace = inplace and make is not gl.DropPath
    shape = INPUTS[make][0][0]
    x, good = of(shape), np.ones(shape, np.float32)
    layer(good)
    expected = layer.backward(good)
    with pytest.raises(TypeError):
        layer(x)
    assert not isinstance(x, np.ndarray) or (x == 1).all()
    assert layer.generator.offset == 1
    assert_same_bits(layer.backward(good), expected)
    layer.p = 1.5
    before = good.copy()
    with pytest.raises(ValueError, match="dropout probability"):
        layer(good)
    assert_same_bits(good, before)
    assert layer.generator.offset == 1


@pytest.mark.parametrize("make", INPUTS)
def test_a_read_only_input_is_not_written_to(make):
    x = LAYOUTS["read_only"](np.ones(INPUTS[make][0][0], np.float32))
    make(0.5)(x)
    if make is not gl.DropPath:
        with pytest.raises(ValueError, match=r"^the input is read-only, and cannot be changed in place"):
            make(0.5, True, generator=gl.Generator(1))(x)


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"p": 1.5}, ValueError, r"^dropout probability has to be between 0 and 1, but got 1\.5$"),
        ({"p": -0.5}, ValueError, r"^dropout probability has to be between 0 and 1, but got -0\.5$"),
        ({"p": float("nan")}, ValueError, "^dropout probability has to be between 0 and 1, but got nan$"),
        ({"p": "0.5"}, TypeError, "dropout probability must be a number, got str"),
        ({"p": None}, TypeError, "dropout probability must be a number, got NoneType"),
        ({"generator": 3}, TypeError, r"generator must be a gpu_layers\.Generator, got int"),
        ({"generator": np.random.default_rng(0)}, TypeError, "must be a gpu_layers.Generator, got Generator"),
    ],
)
def test_bad_arguments_are_refused(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


@pytest.mark.parametrize("make", [make for make in INPUTS if make is not gl.DropPath])
def test_defaults_and_repr_are_torchs(make):
    theirs = getattr(torch.nn, make.__name__)
    for arguments in ((), (0.25,), (0.1, True)):
        assert repr(make(*arguments)) == repr(theirs(*arguments))
    with pytest.raises(TypeError):
        make(0.5, False, gl.Generator(1))


def test_drop_path_defaults():
    assert repr(gl.DropPath()) == "DropPath(p=0.0)"
    assert repr(gl.DropPath(0.2)) == "DropPath(p=0.2)"


def test_drop_path_keeps_the_expectation():
    # The mean of 10**5 samples has deviation sqrt(p / (1 - p) / 10**5): six of them.
    y = gl.DropPath(0.3, generator=gl.Generator(1))(np.ones((10**5, 2)))
    assert abs(y.mean() - 1) < 6 * np.sqrt(0.3 / 0.7 / 10**5)


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize(
    "make",
    [
        lambda g: gl.Dropout(0.4, generator=g),
        lambda g: gl.Dropout(0.4, scaling="inference", generator=g),
        lambda g: gl.Dropout1d(0.4, generator=g),
        lambda g: gl.AlphaDropout(0.4, generator=g),
        lambda g: gl.FeatureAlphaDropout(0.4, generator=g),
        lambda g: gl.DropPath(0.4, generator=g),
        lambda g: gl.ActivationDropout("relu", 0.4, generator=g),
        lambda g: gl.ActivationDropout("silu", 0.4, order="before", generator=g),
    ],
)
def test_a_part_of_a_batch_gets_the_masks_of_the_whole(make, backend):
    x, dy = normal((7, 3, 5), np.float32), normal((7, 3, 5), np.float32, seed=1)
    whole = make(gl.Generator(1))
    with gl.use_backend(backend):
        y, dx = whole(x), whole.backward(dy)
        for part in (slice(0, 2), slice(2, 2), slice(2, 7)):
            layer = make(gl.Generator(1))
            layer.first_sample = part.start
            assert_same_bits(layer(x[part]), y[part].copy())
            assert_same_bits(layer.backward(dy[part]), dx[part].copy())


def test_moments_of_a_part_of_a_batch():
    x = normal((7, 5), np.float32)
    whole, part = gl.Dropout(0.4, generator=gl.Generator(1)), gl.Dropout(0.4, generator=gl.Generator(1))
    part.first_sample = 3
    expected = gl.mc_dropout(whole, x, passes=4)
    for ours, theirs in zip(gl.mc_dropout(part, x[3:], passes=4), expected, strict=True):
        assert_same_bits(ours, theirs[3:].copy())


def test_sample_ids_are_those_of_the_whole_already():
    x, ids = normal((4, 5), np.float32), np.array([9, 2, 7, 1])
    plain, part = gl.Dropout(0.4, generator=gl.Generator(1)), gl.Dropout(0.4, generator=gl.Generator(1))
    part.first_sample = 100
    assert_same_bits(part(x, ids), plain(x, ids))
