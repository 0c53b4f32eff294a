"""Dropout of channels-last arrays, whose mask is that of the other layout; and dropout plus a residual."""

import numpy as np
import pytest

from gpu_layers import ops
from gpu_layers.core.activations import NAMES
from gpu_layers.runtime.backend import use_backend
from gpu_layers.runtime.kernel import FLOAT_DTYPES
from tests.inputs import assert_same_bits, normal, with_specials

SEED, OFFSET, P = 0x0123456789ABCDEF, 2**64 - 2, 0.375
SHAPES = [(2, 3, 5, 16), (3, 7, 5), (2, 4, 8), (5, 24), (2, 9, 1), (0, 3, 4)]


@pytest.fixture(params=["reference", "emulated"], autouse=True)
def backend(request):
    with use_backend(request.param):
        yield


def kept(shape, axes, start=0):
    """Of (N, *spatial, C): by the contract, in the order of (N, C, *spatial)."""
    first = (shape[0], shape[-1], *shape[1:-1])
    lead = first[:axes]
    mask = ops.dropout_mask(int(np.prod(lead)), P, SEED, OFFSET, start).reshape(*lead, *(1,) * (len(first) - len(lead)))
    return np.moveaxis(np.broadcast_to(mask, first), 1, -1)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("start", [0, 4, 7])
@pytest.mark.parametrize("axes", [None, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_is_that_of_the_other_layout(shape, axes, start, dtype):
    x = normal(shape, dtype)
    y, saved = ops.dropout_forward(x, P, SEED, OFFSET, start=start, scale=2.0, mask_axes=axes, channels_last=True)
    mask = kept(shape, axes, start)
    # Times 2 rounds nothing.
    np.testing.assert_array_equal(y, np.where(mask, x * dtype.type(2), dtype.type(0)))
    np.testing.assert_array_equal(ops.dropout_backward(x, saved), y)
    in_place = x.copy()
    ops.dropout_forward(
        in_place, P, SEED, OFFSET, start=start, scale=2.0, mask_axes=axes, channels_last=True, out=in_place
    )
    np.testing.assert_array_equal(in_place, y)


@pytest.mark.parametrize("view", [lambda x: x[::-1], lambda x: x[..., ::2], lambda x: np.moveaxis(x, 1, -1)])
def test_views_give_what_their_copies_give(view):
    x = view(normal((4, 6, 8, 16), np.float32))
    for options in ({}, {"residual": x}):
        y, _ = ops.dropout_forward(x, P, SEED, OFFSET, channels_last=True, **options)
        options = {name: one.copy() for name, one in options.items()}
        z, _ = ops.dropout_forward(np.ascontiguousarray(x), P, SEED, OFFSET, channels_last=True, **options)
        np.testing.assert_array_equal(y, z)
        assert y.flags.c_contiguous


def test_alpha_dropout_too():
    x = normal((3, 5, 7, 8), np.float64)
    y, saved = ops.alpha_dropout_forward(x, P, SEED, OFFSET, mask_axes=2, channels_last=True)
    z, other = ops.alpha_dropout_forward(np.moveaxis(x, -1, 1), P, SEED, OFFSET, mask_axes=2)
    np.testing.assert_array_equal(y, np.moveaxis(z, 1, -1))
    dx, dz = ops.alpha_dropout_backward(x, saved), ops.alpha_dropout_backward(np.moveaxis(x, -1, 1), other)
    np.testing.assert_array_equal(dx, np.moveaxis(dz, 1, -1))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("activation", NAMES)
def test_activation_dropout_has_the_bits_of_the_other_layout(activation, order, dtype):
    for shape in SHAPES:
        x, dy = with_specials(shape, dtype), normal(shape, dtype, 1)
        for p, start in ((P, 0), (P, 7), (0.0, 0), (1.0, 3)):
            numbers, of_call = (activation, p, SEED, OFFSET), {"order": order, "start": start}
            y, saved = ops.activation_dropout_forward(x, *numbers, channels_last=True, **of_call)
            z, other = ops.activation_dropout_forward(np.moveaxis(x, -1, 1), *numbers, **of_call)
            assert_same_bits(y, np.moveaxis(z, 1, -1))
            dz = ops.activation_dropout_backward(np.moveaxis(dy, -1, 1), other)
            dx = ops.activation_dropout_backward(dy, saved)
            assert_same_bits(dx, np.moveaxis(dz, 1, -1))
            assert y.flags.c_contiguous
            assert dx.flags.c_contiguous


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("shape", "last"), [((3, 64), False), ((7, 5), False), ((2, 5, 6, 16), True), ((), False)])
def test_a_residual_is_added_before_the_only_rounding(shape, last, dtype):
    x, residual = normal(shape, dtype), normal(shape, dtype, 1)
    y, _ = ops.dropout_forward(x, P, SEED, OFFSET, residual=residual, channels_last=last)
    wide = np.float64 if dtype == np.float64 else np.float32
    mask = kept(shape, None) if last else ops.dropout_mask(x.size, P, SEED, OFFSET).reshape(shape)
    scaled = np.where(mask, x.astype(wide) * wide(1 / (1 - P)), wide(0))
    np.testing.assert_array_equal(y, (scaled + residual.astype(wide)).astype(dtype))
    ops.dropout_forward(x, P, SEED, OFFSET, residual=residual, channels_last=last, out=residual)
    np.testing.assert_array_equal(residual, y)


def test_what_is_dropped_may_be_anything():
    x, residual = np.full((2, 3, 8), np.nan, np.float32), np.ones((2, 3, 8), np.float32)
    y, _ = ops.dropout_forward(x, 1.0, SEED, OFFSET, residual=residual, channels_last=True)
    np.testing.assert_array_equal(y, residual)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"residual": np.ones((2, 3, 4))}, TypeError, "dtype"),
        ({"residual": np.ones((2, 3, 5), np.float32)}, ValueError, r"\[2, 3, 4\], got \[2, 3, 5\]"),
        ({"residual": np.ones((2, 3, 4), np.float32), "mask_axes": 2}, ValueError, "all axes"),
        ({"residual": np.ones((2, 3, 4), np.float32), "sample_ids": np.arange(2)}, ValueError, "sample_ids"),
        ({"channels_last": True, "sample_ids": np.arange(2)}, ValueError, "sample_ids"),
        ({"residual": [1.0]}, TypeError, "numpy.ndarray"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(options, error, message):
    x, out = normal((2, 3, 4), np.float32), np.full((2, 3, 4), 7, np.float32)
    with pytest.raises(error, match=message):
        ops.dropout_forward(x, P, SEED, OFFSET, out=out, **options)
    assert (out == 7).all()


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="at least 2 axes"):
        ops.dropout_forward(normal((4,), np.float32), P, SEED, OFFSET, channels_last=True)
    with pytest.raises(ValueError, match="at least 2 axes"):
        ops.activation_dropout_forward(normal((4,), np.float32), "gelu", P, SEED, OFFSET, channels_last=True)
    with pytest.raises(ValueError, match="mask_axes must be 1"):
        ops.dropout_forward(normal((2, 3, 4, 5), np.float32), P, SEED, OFFSET, mask_axes=3, channels_last=True)
    both = normal((5, 8), np.float32)
    with pytest.raises(ValueError, match="not overlap"):
        ops.dropout_forward(both[1:], P, SEED, OFFSET, residual=both[1:], out=both[:-1])
