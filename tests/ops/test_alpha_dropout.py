"""Alpha dropout: PyTorch's affine form, the contract's mask, mean and variance kept."""

import math

import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests import philox_in_ints
from tests.inputs import (
    accumulation_dtype,
    assert_same_bits,
    assert_same_values,
    assert_within,
    each_dtype,
    normal,
    unchanged,
    with_specials,
)
from tests.torch_bridge import from_torch, to_torch

SEED, OFFSET = 99, 2**33
ALPHA = 1.6732632423543772848170429916717 * 1.0507009873554804934193349852946  # of SELU, times its scale


def affine(x, p):
    """What kept elements become, and what dropped ones are, in float64."""
    a = ((1 - p) * (1 + p * ALPHA**2)) ** -0.5
    return a * x.astype(np.float64) + ALPHA * a * p, -ALPHA * a + ALPHA * a * p


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout"])
def test_the_affine_form_is_torchs(p, name):
    x = normal((40, 30, 4))
    torch.manual_seed(0)
    theirs = from_torch(getattr(torch.nn.functional, name)(to_torch(x), p, training=True))
    kept, dropped = affine(x, p)
    # Some ten roundings of numbers up to 5.
    is_dropped = np.abs(theirs - dropped) < 1e-14
    assert abs(is_dropped.mean() - p) < 0.2
    assert_within(theirs, np.where(is_dropped, dropped, kept), 1e-14)


@each_dtype
@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9, 1 - 2.0**-20])
@pytest.mark.parametrize("mask_axes", [1, 2, None])
def test_values(dtype, p, mask_axes):
    x, dy = normal((6, 5, 7), dtype), normal((6, 5, 7), dtype, seed=1)
    with unchanged(x, dy):
        y, saved = gl.ops.alpha_dropout_forward(x, p, SEED, OFFSET, start=1, mask_axes=mask_axes)
        dx = gl.ops.alpha_dropout_backward(dy, saved)
    shape = x.shape[:mask_axes]
    keep = philox_in_ints.kept(math.prod(shape), p, SEED, OFFSET, 1)
    keep = np.broadcast_to(keep.reshape(shape + (1,) * (3 - len(shape))), x.shape)
    kept, dropped = affine(x, p)
    # Scale and shift, product and sum: four roundings of the accumulation dtype; then one of the dtype.
    wide = accumulation_dtype(dtype)
    size = np.abs(kept) + 2 * np.abs(x.astype(np.float64)) * saved.scale + 2 * abs(dropped)
    bound = size * (4 * np.finfo(wide).eps + float(np.finfo(np.float16).eps if dtype == np.float16 else 0))
    bound += size * (2.0**-8 if dtype.itemsize == 2 and dtype != np.float16 else 0)
    assert_within(y, np.where(keep, kept, dropped), bound)
    # The gradient of the constants is 0; the product is rounded once.
    scaled = (dy.astype(wide) * wide.type(saved.scale)).astype(dtype)
    assert_same_bits(dx, np.where(keep, scaled, dtype.type(0)))


@each_dtype
def test_a_dropped_element_is_the_constant_whatever_it_was(dtype):
    x = with_specials((400,), dtype)
    y, saved = gl.ops.alpha_dropout_forward(x, 0.5, SEED, OFFSET)
    dropped = y[~philox_in_ints.kept(400, 0.5, SEED, OFFSET)]
    assert dropped.size > 150
    assert np.unique(dropped.view(f"u{dropped.itemsize}")).size == 1
    assert float(dropped[0]) == pytest.approx(affine(x, 0.5)[1], rel=2.0**-7)
    dx = gl.ops.alpha_dropout_backward(x, saved)[~philox_in_ints.kept(400, 0.5, SEED, OFFSET)]
    assert dx.tobytes() == bytes(dx.nbytes)


@each_dtype
@pytest.mark.parametrize("forward", [gl.AlphaDropout, gl.FeatureAlphaDropout])
def test_p_0_is_the_identity_and_p_1_gives_zeros(dtype, forward):
    x = with_specials((30, 10), dtype)
    layer = forward(0)
    assert_same_values(layer(x), x)
    assert_same_values(layer.backward(x), x)
    layer = forward(1)
    assert_same_bits(layer(x), np.zeros(x.shape, dtype))
    assert_same_bits(layer.backward(x), np.zeros(x.shape, dtype))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_mean_and_variance_are_kept(p):
    x = normal((10**6,))
    y, _ = gl.ops.alpha_dropout_forward(x, p, SEED, OFFSET)
    # Six deviations of the mean (1 / 10**3) and of the variance (the fourth moment is at most that of the largest
    # part, here below 30).
    assert abs(y.mean()) < 6e-3
    assert abs(y.var() - 1) < 6 * math.sqrt(30 / 10**6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"p": -0.1}, ValueError, r"dropout probability has to be between 0 and 1, but got -0\.1"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"offset": 0.0}, TypeError, "offset must be an integer"),
        ({"start": 2**64 - 2}, ValueError, "start must be in"),
        ({"mask_axes": 2}, ValueError, r"mask_axes must be in 1 \.\. 1"),
        ({"out": np.zeros(3)}, TypeError, "out must have the result's dtype"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    x = np.ones(3, np.float32)
    with unchanged(x), pytest.raises(error, match=message):
        gl.ops.alpha_dropout_forward(x, **({"p": 0.5, "seed": 1, "offset": 2} | change))
