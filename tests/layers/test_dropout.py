"""The dropout layer: which mask, which scale, where the result goes, and when the generator moves."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests import philox_in_ints
from tests.inputs import (
    LAYOUTS,
    WRITABLE_LAYOUTS,
    accumulation_dtype,
    assert_same_bits,
    each_dtype,
    normal,
    unchanged,
    with_specials,
)

SEED = 2**40 + 3
each_scaling = pytest.mark.parametrize("scaling", ["inverted", "inference"])


def expected_training(x, p, offset, scaling="inverted", seed=SEED):
    wide = accumulation_dtype(x.dtype)
    scale = 1 / (1 - p) if scaling == "inverted" else 1
    keep = philox_in_ints.kept(x.size, p, seed, offset).reshape(x.shape)
    return np.where(keep, (x.astype(wide) * wide.type(scale)).astype(x.dtype), x.dtype.type(0))


@each_dtype
@each_scaling
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_training(dtype, scaling, layout):
    layer = gl.Dropout(0.3, scaling=scaling, generator=gl.Generator(SEED, 5))
    x, dy = layout(normal((4, 7, 3), dtype)), layout(normal((4, 7, 3), dtype, seed=1))
    for offset in (5, 6):
        with unchanged(x, dy):
            y, dx = layer(x), layer.backward(dy)
        assert_same_bits(y, expected_training(x, 0.3, offset, scaling))
        assert_same_bits(dx, expected_training(dy, 0.3, offset, scaling))
        assert not np.shares_memory(x, y)


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_evaluation_is_the_identity_bit_for_bit(dtype, layout):
    layer = gl.Dropout(0.9).eval()
    x, dy = layout(with_specials((9, 5), dtype)), layout(with_specials((9, 5), dtype, seed=1))
    with unchanged(x, dy):
        assert_same_bits(layer(x), x)
        assert_same_bits(layer.backward(dy), dy)


@each_dtype
def test_evaluation_of_unscaled_dropout_multiplies_by_what_is_kept(dtype):
    layer = gl.Dropout(0.3, scaling="inference").eval()
    x, dy = normal((9, 5), dtype), normal((9, 5), dtype, seed=1)
    wide = accumulation_dtype(dtype)
    with unchanged(x, dy):
        assert_same_bits(layer(x), (x.astype(wide) * wide.type(1 - 0.3)).astype(dtype))
        assert_same_bits(layer.backward(dy), (dy.astype(wide) * wide.type(1 - 0.3)).astype(dtype))


@each_dtype
@each_scaling
@pytest.mark.parametrize("training", [True, False])
def test_p_0_changes_nothing(dtype, scaling, training):
    layer = gl.Dropout(0, scaling=scaling).train(training)
    x = np.where(np.isnan(values := with_specials((200,), dtype)), dtype.type(7), values)
    assert_same_bits(layer(x), x)
    assert_same_bits(layer.backward(x), x)


@each_dtype
@each_scaling
def test_p_1_gives_zeros_and_no_nan(dtype, scaling):
    layer = gl.Dropout(1, scaling=scaling)
    x = with_specials((200,), dtype)
    assert_same_bits(layer(x), np.zeros(200, dtype))
    assert_same_bits(layer.backward(x), np.zeros(200, dtype))


@each_scaling
def test_both_scalings_keep_the_expectation(scaling):
    # Of 10**6 ones the training mean has deviation sqrt(p / (1 - p) / 10**6) or less: six of them.
    layer = gl.Dropout(0.2, scaling=scaling, generator=gl.Generator(1))
    x = np.ones(10**6)
    difference = layer(x).mean() - layer.eval()(x).mean()
    assert abs(difference) < 6 * np.sqrt(0.2 / 0.8 / 10**6)


# The generator.


@each_scaling
@pytest.mark.parametrize("p", [0, 0.5, 1])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_training_forward_takes_one_offset_and_nothing_else_takes_any(scaling, p, inplace):
    generator = gl.Generator(1, 10)
    layer = gl.Dropout(p, inplace, scaling=scaling, generator=generator)
    x = np.ones((3, 4))
    for count in (1, 2, 3):
        layer(x)
        layer.backward(x)
        layer.backward(x)
        assert generator.get_state() == {"seed": 1, "offset": 10 + count}
    layer(np.ones((0, 4)))
    assert generator.offset == 14
    layer.eval()
    layer(x)
    layer.backward(x)
    assert generator.offset == 14


def test_layers_share_the_default_generator(default_generator):
    gl.manual_seed(SEED)
    x = np.ones((5, 8))
    first, second = gl.Dropout(), gl.Dropout(0.25)
    own = gl.Dropout(generator=gl.Generator(9))
    results = [first(x), own(x), second(x), first(x)]
    assert default_generator.offset == 3
    assert_same_bits(results[0], expected_training(x, 0.5, 0))
    assert_same_bits(results[1], expected_training(x, 0.5, 0, seed=9))
    assert_same_bits(results[2], expected_training(x, 0.25, 1))
    assert_same_bits(results[3], expected_training(x, 0.5, 2))
    gl.manual_seed(SEED)
    assert_same_bits(second(x), expected_training(x, 0.25, 0))


def test_a_state_brings_the_masks_back():
    generator = gl.Generator(SEED)
    layer = gl.Dropout(generator=generator)
    x = np.ones(100)
    layer(x)
    state = generator.get_state()
    ahead = [layer(x) for _ in range(3)]
    generator.set_state(state)
    for expected in ahead:
        assert_same_bits(layer(x), expected)
    assert len({y.tobytes() for y in ahead}) == 3


def test_spawned_generators_give_layers_their_own_masks():
    x = np.ones(200)
    masks = {gl.Dropout(generator=child)(x).tobytes() for child in gl.Generator(1).spawn(20)}
    assert len(masks) == 20


# Backward belongs to the last forward.


def test_backward_keeps_to_the_mode_of_its_forward():
    layer = gl.Dropout(generator=gl.Generator(SEED))
    x = np.ones(50)
    layer(x)
    layer.eval()
    assert_same_bits(layer.backward(x), expected_training(x, 0.5, 0))
    layer(x)
    layer.train()
    assert_same_bits(layer.backward(x), x)


# In place.


@each_dtype
@each_scaling
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS.values(), ids=WRITABLE_LAYOUTS)
def test_in_place_writes_the_input(dtype, scaling, layout):
    values = normal((4, 7, 3), dtype)
    layer = gl.Dropout(0.4, True, scaling=scaling, generator=gl.Generator(SEED))
    x = layout(values)
    assert layer(x) is x
    assert_same_bits(x, expected_training(values, 0.4, 0, scaling))
    dy = layout(values)
    with unchanged(dy):
        assert_same_bits(layer.backward(dy), expected_training(values, 0.4, 0, scaling))
    x = layout(values)
    assert layer.eval()(x) is x
    wide = accumulation_dtype(dtype)
    scale = wide.type(1 if scaling == "inverted" else 1 - 0.4)
    assert_same_bits(x, (values.astype(wide) * scale).astype(dtype))


# Construction.


def test_an_unknown_scaling_is_refused():
    with pytest.raises(ValueError, match="scaling must be one of 'inverted', 'inference', got 'none'"):
        gl.Dropout(scaling="none")


def test_repr_is_torchs():
    for arguments in ((), (0.25,), (0.1, True)):
        assert repr(gl.Dropout(*arguments)) == repr(torch.nn.Dropout(*arguments))
    assert repr(gl.Dropout(scaling="inference")) == "Dropout(p=0.5, inplace=False, scaling='inference')"


def test_there_is_nothing_to_learn_or_store():
    layer = gl.Dropout()
    layer(np.ones(3))
    layer.backward(np.ones(3))
    assert (layer.parameters, layer.gradients, layer.state_dict()) == ({}, {}, {})
    layer.load_state_dict({})
