"""Masks that elements share along axes: the contract's decisions, counted over the shape in which these are 1."""

import itertools

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.core.mask import shared_decisions
from tests import philox_in_ints
from tests.inputs import DTYPES, LAYOUTS, assert_same_bits, each_backend, normal, unchanged, with_specials

SEED, OFFSET = 2**63 + 12345, 2**32 + 7
SHAPES = [(3, 5, 8), (2, 3, 4, 5), (1, 6, 1, 4), (7,), (2, 3, 2, 3, 2, 3)]
EVERY = [
    (shape, axes)
    for shape in SHAPES
    for count in range(len(shape) + 1)
    for axes in itertools.combinations(range(len(shape)), count)
]


def kept(shape, axes, p, start=0):
    """The mask of plain integers, one decision for each element of the smaller shape."""
    small = [1 if axis in axes else size for axis, size in enumerate(shape)]
    decisions = philox_in_ints.kept(int(np.prod(small)), p, SEED, OFFSET, start).reshape(small)
    return np.broadcast_to(decisions, shape)


def dropped(x, keep, p):
    with np.errstate(invalid="ignore"):
        return np.where(keep, (x.astype(np.float64) * (1 / (1 - p))), 0).astype(x.dtype)


@each_backend
@pytest.mark.parametrize(("shape", "axes"), EVERY, ids=str)
def test_every_choice_of_axes(shape, axes, backend):
    x, dy = normal(shape, np.float64), normal(shape, np.float64, seed=1)
    start = 2**33 + 3
    with gl.use_backend(backend), unchanged(x, dy):
        y, saved = gl.ops.dropout_forward(x, 0.5, SEED, OFFSET, start=start, shared_axes=axes)
        dx = gl.ops.dropout_backward(dy, saved)
    keep = kept(shape, axes, 0.5, start)
    # A factor of 2 rounds nothing.
    assert_same_bits(y, dropped(x, keep, 0.5))
    assert_same_bits(dx, dropped(dy, keep, 0.5))


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_dtypes_layouts_and_awkward_values(dtype, layout, backend):
    x = with_specials((3, 70, 6), dtype)
    with gl.use_backend(backend):
        y, _ = gl.ops.dropout_forward(layout(x), 0.5, SEED, OFFSET, shared_axes=(1,))
    expected = dropped(x, kept(x.shape, (1,), 0.5), 0.5)
    numbers = ~np.isnan(expected.astype(np.float64))
    assert_same_bits(y[numbers], expected[numbers])
    assert np.isnan(y[~numbers].astype(np.float64)).all()


@pytest.mark.parametrize(
    ("mask_axes", "shared_axes", "shape"), [(2, (2, 3), (4, 5, 3, 2)), (1, (1, 2), (6, 3, 4)), (3, (-1,), (2, 3, 4, 5))]
)
def test_leading_axes_of_a_mask_are_a_case_of_this(mask_axes, shared_axes, shape):
    x = normal(shape, np.float32)
    results = [
        gl.ops.dropout_forward(x, 0.4, SEED, OFFSET, start=5, **options)
        for options in ({"mask_axes": mask_axes}, {"shared_axes": shared_axes})
    ]
    assert_same_bits(results[0][0], results[1][0])
    assert results[0][1].mask == results[1][1].mask


def test_channel_layers_and_stochastic_depth_are_cases_of_this():
    x = normal((5, 4, 3, 2), np.float32)
    for layer, axes in ((gl.Dropout2d(0.4), (2, 3)), (gl.DropPath(0.4), (1, 2, 3))):
        layer.generator = gl.Generator(3)
        shared = gl.Dropout(0.4, shared_axes=axes, generator=gl.Generator(3))
        assert_same_bits(shared(x), layer(x))


@each_backend
def test_p_0_p_1_and_nothing(backend):
    with gl.use_backend(backend):
        x = normal((4, 3, 8), np.float32)
        assert_same_bits(gl.ops.dropout_forward(x, 0.0, 1, 2, shared_axes=(1,))[0], x)
        assert_same_bits(gl.ops.dropout_forward(x, 1.0, 1, 2, shared_axes=(1,))[0], np.zeros_like(x))
        for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
            empty = np.ones(shape, np.float32)
            assert gl.ops.dropout_forward(empty, 0.5, 1, 2, shared_axes=(1,))[0].shape == shape


def test_decisions_are_counted():
    assert shared_decisions((3, 5, 8), (1,)) == (1, ((8, 1), (5, 0), (3, 8)), 24)
    assert shared_decisions((3, 5, 8), (1, 2)) == (40, (), 3)
    assert shared_decisions((3, 5, 8), (0,)) == (1, ((40, 1), (3, 0)), 40)
    assert shared_decisions((3, 5, 8), (0, 1, 2)) == (120, (), 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shared_axes": 1}, TypeError, "shared_axes must be a sequence of integers, got int"),
        ({"shared_axes": "1"}, TypeError, "shared_axes must be a sequence of integers, got str"),
        ({"shared_axes": (1.0,)}, TypeError, "shared_axes must be an integer, got float"),
        ({"shared_axes": (3,)}, ValueError, r"shared_axes must be in -3 \.\. 2, got 3"),
        ({"shared_axes": (1, -2)}, ValueError, r"shared_axes must be different axes, got \[1, -2\]"),
        ({"shared_axes": (1,), "mask_axes": 2}, ValueError, "pass one of them"),
        ({"shared_axes": (1,), "sample_ids": np.arange(2)}, ValueError, "sample_ids need a mask over all axes"),
        ({"shared_axes": (1,), "start": 2**64 - 7}, ValueError, "start must be in"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    x = np.ones((2, 3, 4), np.float32)
    for forward in (gl.ops.dropout_forward, gl.ops.alpha_dropout_forward):
        if "sample_ids" in options and forward is gl.ops.alpha_dropout_forward:
            continue
        with unchanged(x), pytest.raises(error, match=message):
            forward(x, 0.5, 1, 2, **options)


@each_backend
@pytest.mark.parametrize("axes", [(0, 2, 4, 6, 8), (1, 3, 5, 7)], ids=str)
def test_nine_turns(axes, backend):
    x = normal((2, 2, 3, 2, 2, 3, 2, 2, 2), np.float32)
    with gl.use_backend(backend):
        y, _ = gl.ops.dropout_forward(x, 0.5, SEED, OFFSET, shared_axes=axes)
    assert_same_bits(y, dropped(x, kept(x.shape, axes, 0.5), 0.5))


def test_more_turns_than_a_kernel_takes_are_refused():
    x = np.ones((2,) * 20, np.float32)
    with pytest.raises(ValueError, match="shared_axes alternate with other axes too often"):
        gl.ops.dropout_forward(x, 0.5, 1, 2, shared_axes=tuple(range(0, 20, 2)))


def test_the_layer():
    layer = gl.Dropout(0.5, shared_axes=(1,), generator=gl.Generator(SEED, 5))
    x, dy = normal((3, 4, 8), np.float32), normal((3, 4, 8), np.float32, seed=1)
    y = layer(x)
    expected, saved = gl.ops.dropout_forward(x, 0.5, SEED, 5, shared_axes=(1,))
    assert_same_bits(y, expected)
    assert_same_bits(layer.backward(dy), gl.ops.dropout_backward(dy, saved))
    assert repr(layer) == "Dropout(p=0.5, inplace=False, shared_axes=(1,))"
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match="shared_axes must be in"):
        layer(x[0, 0])
    with pytest.raises(ValueError, match="shared_axes must be different axes"):
        gl.Dropout(shared_axes=(1, 1))
    with pytest.raises(TypeError, match="shared_axes must be a sequence"):
        gl.Dropout(shared_axes=1)


@pytest.mark.parametrize("axes", [(1,), (0, 2), (2,)])
def test_a_part_of_a_batch_has_the_masks_of_the_whole(axes):
    x = normal((6, 4, 5), np.float32)
    whole = gl.Dropout(0.5, shared_axes=axes, generator=gl.Generator(3))(x)
    part = gl.Dropout(0.5, shared_axes=axes, generator=gl.Generator(3))
    part.first_sample = 2
    assert_same_bits(part(x[2:]), whole[2:])


def test_uncertainty_by_shared_masks_is_that_of_the_passes():
    layer = gl.Dropout(0.5, shared_axes=(1,), generator=gl.Generator(3))
    x = normal((2, 5, 4), np.float32)
    mean, variance = gl.mc_dropout(layer, x, passes=7)
    layer.generator = gl.Generator(3)
    outputs = np.stack([layer(x) for _ in range(7)]).astype(np.float64)
    np.testing.assert_allclose(mean, outputs.mean(axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(variance, outputs.var(axis=0), rtol=1e-5, atol=1e-6)


def test_one_mask_over_many_calls_as_a_recurrent_net_needs_it():
    """docs/dropout.md: every step starts from the generator's state of the first."""
    generator = gl.Generator(3)
    inputs, states = (gl.Dropout(0.5, generator=generator) for _ in range(2))
    x, h = normal((4, 3, 8), np.float32), np.ones((3, 8), np.float32)
    for _ in range(2):
        first = generator.get_state()
        masks = []
        for step in x:
            generator.set_state(first)
            masks.append((inputs(step) != 0, states(h) != 0))
        assert all((one == masks[0][0]).all() and (two == masks[0][1]).all() for one, two in masks)
        assert (masks[0][0] != masks[0][1]).any()
    assert generator.offset == 4
