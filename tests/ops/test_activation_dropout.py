"""Activation and dropout in one pass: PyTorch's activations, the contract's mask, both orders."""

from decimal import Decimal, localcontext

import ml_dtypes
import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests import philox_in_ints
from tests.gradients import finite_differences
from tests.inputs import (
    DTYPES,
    accumulation_dtype,
    assert_same_bits,
    assert_same_values,
    assert_within,
    each_dtype,
    normal,
    unchanged,
    with_specials,
)
from tests.torch_bridge import ACTIVATIONS, from_torch, to_torch

SEED, OFFSET = 2**63 + 12345, 2**32 + 7
TORCH = {name: phi for name, phi in ACTIVATIONS.items() if name}
EXACT = ("relu", "leaky_relu", "identity")
HOMOGENEOUS = EXACT
each_activation = pytest.mark.parametrize("activation", TORCH)
each_order = pytest.mark.parametrize("order", ["after", "before"])


def run(x, dy, activation, p, order, start=0):
    y, saved = gl.ops.activation_dropout_forward(x, activation, p, SEED, OFFSET, order=order, start=start)
    return y, gl.ops.activation_dropout_backward(dy, saved), saved


def by_torch(x, dy, activation, p, order, start=0):
    """The same in float64 by PyTorch, with the mask of plain integers; the scale is the accumulation dtype's."""
    wide = accumulation_dtype(x.dtype)
    scale = float(wide.type(1 / (1 - p))) if p < 1 else 0.0
    keep = torch.from_numpy(philox_in_ints.kept(x.size, p, SEED, OFFSET, start).reshape(x.shape))
    leaf = to_torch(x.astype(np.float64)).requires_grad_()
    inputs = torch.where(keep, leaf * scale, 0.0) if order == "before" else leaf
    y = TORCH[activation](inputs)
    y = torch.where(keep, y * scale, 0.0) if order == "after" else y
    y.backward(to_torch(dy.astype(np.float64)))
    return from_torch(y), from_torch(leaf.grad)


def bound(expected, dtype):
    """Both compute in float64; then the scaled input (magnified by a slope of up to 1.2 times values of up to 20), and
    the result, are rounded to the accumulation dtype, and the result to the dtype."""
    wide = accumulation_dtype(dtype)
    # PyTorch's own derivative of silu, s (1 + x (1 - s)), is off by a rounding of 1 - s, times x and the gradient:
    # 100, 30.
    error = np.abs(expected) * float(np.finfo(wide).eps) * 4 + 25 * float(np.finfo(wide).eps) + 4e-13
    roundoff = {2: 2.0**-8 if dtype != np.float16 else 2.0**-11}.get(dtype.itemsize, 0)
    return error + np.abs(expected) * roundoff + (2.0**-24 if dtype == np.float16 else 0)


@each_dtype
@each_activation
@each_order
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
def test_values_are_torchs(dtype, activation, order, p):
    x, dy = normal((9, 7, 5), dtype) * dtype.type(3), normal((9, 7, 5), dtype, seed=1)
    with unchanged(x, dy):
        y, dx, _ = run(x, dy, activation, p, order, start=2**34 - 5)
    expected_y, expected_dx = by_torch(x, dy, activation, p, order, start=2**34 - 5)
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    assert_within(y, expected_y, bound(expected_y, dtype))
    assert_within(dx, expected_dx, bound(expected_dx, dtype))


@each_activation
@each_order
def test_backward_is_the_gradient(activation, order):
    x = normal((5, 7)) + 0.01 * np.sign(normal((5, 7)))
    x[np.abs(x) < 0.01] = 0.5  # no kink within the steps
    dy = normal((5, 7), seed=2)
    _, dx, _ = run(x, dy, activation, 0.4, order)

    def loss(moved):
        return float(
            (gl.ops.activation_dropout_forward(moved, activation, 0.4, SEED, OFFSET, order=order)[0] * dy).sum()
        )

    # A sum of some 30 numbers of size 2; the fifth derivative, up to 60 * scale**5, times STEP**4 / 30.
    assert_within(dx, finite_differences(loss, x), 1e-10)


@each_dtype
@each_activation
def test_a_dropped_element_is_plus_zero_after_and_phi_of_zero_before(dtype, activation):
    x = with_specials((400,), dtype)
    dropped = ~philox_in_ints.kept(400, 0.5, SEED, OFFSET)
    y, dx, _ = run(x, x, activation, 0.5, "after")
    assert y[dropped].tobytes() == dx[dropped].tobytes() == bytes(y[dropped].nbytes)
    y, dx, _ = run(x, x, activation, 0.5, "before")
    constant = dtype.type(0.5 if activation == "sigmoid" else 0)
    assert y[dropped].tobytes() == np.full(dropped.sum(), constant, dtype).tobytes()
    assert dx[dropped].tobytes() == bytes(y[dropped].nbytes)


@each_activation
@each_order
def test_p_1(activation, order):
    x = with_specials((100,), np.float32)
    y, dx, _ = run(x, x, activation, 1.0, order)
    constant = np.float32(0.5 if activation == "sigmoid" and order == "before" else 0)
    assert_same_bits(y, np.full(100, constant))
    assert_same_bits(dx, np.zeros(100, np.float32))


@each_dtype
@pytest.mark.parametrize("activation", HOMOGENEOUS)
def test_both_orders_are_one_function_where_phi_is_positively_homogeneous(dtype, activation):
    # With a scale of 2 nothing is rounded.
    x, dy = normal((300,), dtype), normal((300,), dtype, seed=1)
    results = [run(x, dy, activation, 0.5, order)[:2] for order in ("after", "before")]
    for after, before in zip(*results, strict=True):
        assert_same_values(after + dtype.type(0), before + dtype.type(0))


@pytest.mark.parametrize("activation", [name for name in TORCH if name not in HOMOGENEOUS])
def test_the_orders_differ_otherwise(activation):
    x = normal((300,))
    after, before = (run(x, x, activation, 0.5, order)[0] for order in ("after", "before"))
    assert np.abs(after - before).max() > 0.1


@each_dtype
@each_order
def test_relu_saves_one_bit_an_element(dtype, order):
    x = with_specials((13, 7), dtype)
    _, _, saved = run(x, x, "relu", 0.5, order)
    assert saved.x is None
    assert (saved.gradient_bits.dtype, saved.gradient_bits.shape) == (np.uint8, (12,))
    bits = np.unpackbits(saved.gradient_bits, bitorder="little")
    kept = philox_in_ints.kept(91, 0.5, SEED, OFFSET)
    np.testing.assert_array_equal(bits[:91].astype(bool), kept & ~(x.astype(np.float64).reshape(-1) <= 0))
    assert not bits[91:].any()


@each_activation
def test_what_is_saved(activation):
    x = normal((20,))
    _, _, saved = run(x, x, activation, 0.5, "after")
    assert (saved.x is x) == (activation not in ("relu", "identity"))
    assert (saved.gradient_bits is not None) == (activation == "relu")


@each_activation
@each_order
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_any_shape(activation, order, shape):
    x = np.array(np.broadcast_to(np.float32(0.5), shape))
    y, dx, _ = run(x, x, activation, 0.0, order)
    assert y.shape == dx.shape == shape
    if x.size:
        assert float(y.reshape(-1)[0]) == pytest.approx(float(TORCH[activation](torch.tensor(0.5))), rel=1e-6)


def _gelu_and_slope(x):
    """To 40 digits: the normal distribution far below 0 by its continued fraction (Abramowitz and Stegun, 26.2.14)."""
    with localcontext() as context:
        context.prec, context.Emin = 40, -9999
        size = -Decimal(float(x))
        fraction = size
        for number in range(1000, 0, -1):
            fraction = size + number / fraction
        density = (-size * size / 2).exp() / (2 * Decimal("3.14159265358979323846264338327950288419716940")).sqrt()
        return -size * density / fraction, density / fraction - size * density


@pytest.mark.parametrize(
    ("dtype", "lowest", "backend", "most"),
    [
        # In halves of a unit: the reference rounds float32 once. Its own erfc and exp are within a unit, with two
        # products and a sum.
        (np.float32, -12.9, "reference", 2),
        (np.float64, -36, "reference", 8),
        # CUDA's erfc is within 4 units in float, 5 in double; a product more, or two in the slope. In double the errors
        # of x / sqrt(2) and of x**2 / 2 are magnified.
        (np.float32, -12.9, "emulated", 11),
        (np.float64, -36, "emulated", 13 + 2 * 36**2),
    ],
)
def test_gelu_keeps_its_precision_far_below_zero(dtype, lowest, backend, most):
    # 1 + erf would cancel: at -8 nothing of it is left in float32. What x / sqrt(2) and x**2 / 2 are rounded by, erfc
    # and exp magnify by up to x**2.
    x = np.linspace(-3.5, lowest, 57).astype(dtype)
    with gl.use_backend(backend):
        y, dx, _ = run(x, np.ones_like(x), "gelu", 0.0, "after")
    exact = [_gelu_and_slope(value) for value in x]
    for results, values in zip((y, dx), zip(*exact, strict=True), strict=True):
        errors = [abs(Decimal(float(a)) / b - 1) for a, b in zip(results, values, strict=True)]
        assert max(errors) <= most * np.finfo(dtype).eps / 2


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_of_what_is_far_beyond(dtype, backend):
    most = float(ml_dtypes.finfo(dtype).max)
    x = np.array([-most, -100, -40, -0.0, 0, 40, 100, most, np.inf], dtype)
    with gl.use_backend(backend):
        y, dx, _ = run(x, np.ones_like(x), "gelu", 0.0, "after")
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    np.testing.assert_array_equal(dx[:-1].astype(np.float64), [0, 0, 0, 0.5, 0.5, 1, 1, 1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, "activation must be one of 'relu', .*'identity', got 'swish'"),
        ({"activation": None}, ValueError, "activation must be one of .* got None"),
        ({"order": "between"}, ValueError, "order must be one of 'after', 'before', got 'between'"),
        ({"order": 1}, ValueError, "order must be one of 'after', 'before', got 1"),
        ({"p": 1.5}, ValueError, r"^dropout probability has to be between 0 and 1, but got 1\.5$"),
        ({"p": "1"}, TypeError, "dropout probability must be a number, got str"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"offset": 2**64}, ValueError, "offset must be in"),
        ({"start": 2**64 - 2}, ValueError, "start must be in"),
    ],
)
@pytest.mark.parametrize("activation", ["gelu", "identity"])
def test_bad_arguments_are_refused(activation, change, error, message):
    x = np.ones(3, np.float32)
    arguments = {"activation": activation, "p": 0.5, "seed": 1, "offset": 2} | change
    with unchanged(x), pytest.raises(error, match=message):
        gl.ops.activation_dropout_forward(x, **arguments)
