"""A residual and what dropout leaves of a branch, in one pass: its parts one after another, and their gradients."""

import numpy as np
import pytest

import gpu_layers as gl
from tests import philox_in_ints
from tests.gradients import finite_differences
from tests.inputs import (
    LAYOUTS,
    UNIT_ROUNDOFF,
    accumulation_dtype,
    assert_same_bits,
    assert_within,
    each_backend,
    each_dtype,
    integers,
    normal,
    unchanged,
)

SEED, OFFSET = 2**63 + 12345, 2**32 + 7
ACTIVATIONS = (None, "relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "identity")
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_order = pytest.mark.parametrize("order", ["after", "before"])
MASKS = {
    "elements": {},
    "shard": {"start": 2**33 + 3},
    "shared": {"shared_axes": (1,)},
    "samples": {"sample_ids": np.array([5, -1, 2**62], np.int64)},
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def run(x, residual, dy, p=0.5, **options):
    y, saved = gl.ops.dropout_add_forward(x, residual, p, SEED, OFFSET, **options)
    return y, *gl.ops.dropout_add_backward(dy, saved), saved


def in_parts(x, residual, dy, p, bias, activation, order, mask):
    """In float64: the bias, then activation and dropout by the operations of their own, then the sum."""
    x, residual, dy = (one.astype(np.float64) for one in (x, residual, dy))
    z = x + bias.astype(np.float64)
    phi = activation or "identity"

    def drop(values):
        return gl.ops.dropout_forward(values, p, SEED, OFFSET, **mask)

    def activate(values):
        return gl.ops.activation_dropout_forward(values, phi, 0.0, 1, 2)

    steps = (activate, drop) if order == "after" else (drop, activate)
    first, saved_first = steps[0](z)
    branch, saved_second = steps[1](first)
    backward = {drop: gl.ops.dropout_backward, activate: gl.ops.activation_dropout_backward}
    dz = backward[steps[0]](backward[steps[1]](dy, saved_second), saved_first)
    return residual + branch, dz, dz.sum(axis=tuple(range(dz.ndim - 1)))


@each_dtype
@each_activation
@each_order
@each_mask
def test_values_are_those_of_the_parts(dtype, activation, order, mask):
    x, residual, dy = (normal((3, 4, 11), dtype, seed=seed) for seed in range(3))
    bias = normal((11,), dtype, seed=3)
    with unchanged(x, residual, dy, bias):
        y, dx, dresidual, dbias, _ = run(x, residual, dy, bias=bias, activation=activation, order=order, **mask)
    expected_y, expected_dx, expected_dbias = in_parts(x, residual, dy, 0.5, bias, activation, order, mask)
    assert y.dtype == dx.dtype == dbias.dtype == dtype
    assert dresidual is dy
    # The bias is added in the accumulation dtype, magnified by a slope of up to 1.2 times a scale of 2; and y, dx and
    # dbias are rounded to the dtype. Of dbias 12 terms are added, of dx before it is rounded.
    wide = 2 * float(np.finfo(accumulation_dtype(dtype)).eps)
    stored = 0 if dtype.itemsize >= 4 else UNIT_ROUNDOFF[dtype]
    tiny = 2.0**-24 if dtype == np.float16 else 0
    assert_within(y, expected_y, 40 * wide + np.abs(expected_y) * stored + tiny)
    assert_within(dx, expected_dx, 40 * wide + np.abs(expected_dx) * stored + tiny)
    assert_within(dbias, expected_dbias, 12 * 80 * wide + np.abs(expected_dbias) * stored + tiny)


@each_backend
@pytest.mark.parametrize("features", [8, 11, 1])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@each_mask
def test_sums_of_whole_numbers_are_exact(backend, features, activation, mask):
    """With p = 1/2 nothing is rounded: the kernels' bits, and the sums in whatever order, are those of NumPy."""
    x, residual, dy = (integers((3, 70, features), np.float32, seed=seed) for seed in range(3))
    bias = integers((features,), np.float32, seed=3)
    with gl.use_backend(backend):
        y, dx, _, dbias, _ = run(x, residual, dy, bias=bias, activation=activation, **mask)
    keep = gl.ops.dropout_forward(np.ones_like(x), 0.5, SEED, OFFSET, **mask)[0] != 0
    z = x + bias
    slope = {None: np.ones_like(z), "relu": (z > 0).astype(z.dtype), "leaky_relu": np.where(z > 0, 1, np.float32(0.01))}
    slope = slope[activation].astype(np.float32)
    np.testing.assert_array_equal(y, residual + np.where(keep, z * slope * np.float32(2), 0))
    np.testing.assert_array_equal(dx, np.where(keep, dy * slope * np.float32(2), 0))
    # 0.01 is no whole number: 210 terms of up to 6.
    bound = 0 if activation != "leaky_relu" else 210 * 210 * 6 * 2.0**-24
    assert_within(dbias, dx.sum(axis=(0, 1), dtype=np.float64), bound)


@each_activation
@each_order
def test_backward_is_the_gradient(activation, order):
    x, residual, dy = (normal((4, 5), seed=seed) for seed in range(3))
    bias = normal((5,), seed=3)
    z = x + bias
    x = x + np.where(np.abs(z) < 0.05, 0.2, 0)  # no kink within the steps
    options = {"activation": activation, "order": order}
    _, dx, dresidual, dbias, _ = run(x, residual, dy, p=0.4, bias=bias, **options)

    def loss(x, residual, bias):
        y, _ = gl.ops.dropout_add_forward(x, residual, 0.4, SEED, OFFSET, bias=bias, **options)
        return float((y * dy).sum())

    # As of the activations alone (tests/ops/test_activation_dropout.py), and of a sum of four of them.
    assert_within(dx, finite_differences(lambda moved: loss(moved, residual, bias), x), 1e-10)
    assert_within(dresidual, finite_differences(lambda moved: loss(x, moved, bias), residual), 1e-10)
    assert_within(dbias, finite_differences(lambda moved: loss(x, residual, moved), bias), 4e-10)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, backend):
    x, residual, dy = (integers((5, 6, 16), np.float32, seed=seed) for seed in range(3))
    bias = integers((16,), np.float32, seed=3)
    with gl.use_backend(backend):
        expected = run(x, residual, dy, bias=bias, activation="relu")[:4]
        actual = run(layout(x), layout(residual), layout(dy), bias=layout(bias), activation="relu")[:4]
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@each_backend
@pytest.mark.parametrize("target", ["residual", "x", "strided", "overlapping"])
def test_out(target, backend):
    x, residual = normal((6, 8), np.float32), normal((6, 8), np.float32, seed=1)
    bias = normal((8,), np.float32, seed=2)
    with gl.use_backend(backend):
        expected, _ = gl.ops.dropout_add_forward(x, residual, 0.5, 1, 2, bias=bias)
        memory = np.zeros((13, 8), np.float32)
        memory[:6] = residual
        added = memory[:6] if target == "overlapping" else residual
        out = {"residual": added, "x": x, "strided": memory[::2][:6], "overlapping": memory[1:7]}[target]
        y, _ = gl.ops.dropout_add_forward(x, added, 0.5, 1, 2, bias=bias, out=out)
    assert y is out
    assert_same_bits(np.ascontiguousarray(y), expected)


def test_a_backward_that_needs_x_notices_that_it_was_written_over():
    x, residual = normal((6, 8), np.float32), normal((6, 8), np.float32, seed=1)
    y, saved = gl.ops.dropout_add_forward(x, residual, 0.5, 1, 2, activation="gelu", out=x)
    with pytest.raises(RuntimeError, match="x"):
        gl.ops.dropout_add_backward(y, saved)
    y, saved = gl.ops.dropout_add_forward(x, residual, 0.5, 1, 2, activation="relu", out=x)
    gl.ops.dropout_add_backward(y, saved)


@each_backend
def test_nothing_is_dropped_and_everything_is(backend):
    x, residual, dy = (integers((6, 8), np.float32, seed=seed) for seed in range(3))
    with gl.use_backend(backend):
        y, dx, _, dbias, _ = run(x, residual, dy, p=0.0, bias=x[0])
        np.testing.assert_array_equal(y, residual + x + x[0])
        np.testing.assert_array_equal(dx, dy)
        np.testing.assert_array_equal(dbias, dy.sum(axis=0))
        y, dx, _, dbias, _ = run(np.full_like(x, np.inf), residual, dy, p=1.0, bias=x[0])
        np.testing.assert_array_equal(y, residual)
        assert not dx.any()
        assert not dbias.any()


@each_backend
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (1,)])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_any_shape(shape, activation, backend):
    x = np.full(shape, 0.5, np.float32)
    with gl.use_backend(backend):
        y, dx, _, dbias, _ = run(
            x, x, x, p=0.0, activation=activation, bias=np.ones(shape[1], np.float32) if len(shape) == 2 else None
        )
    assert y.shape == dx.shape == shape
    if len(shape) == 2:
        assert dbias.tolist() == [0.0] * shape[1]


def test_what_is_saved():
    x, bias = normal((4, 8), np.float32), normal((8,), np.float32)
    for activation, keeps_x, keeps_bits in ((None, False, False), ("relu", False, True), ("gelu", True, False)):
        saved = run(x, x, x, bias=bias, activation=activation)[-1]
        assert (saved.x is x, saved.bias is bias, saved.gradient_bits is not None) == (keeps_x, keeps_x, keeps_bits)


def test_the_mask_is_that_of_dropout():
    y, *_ = run(np.ones((4, 25), np.float32), np.zeros((4, 25), np.float32), np.ones((4, 25), np.float32))
    np.testing.assert_array_equal(y.reshape(-1) != 0, philox_in_ints.kept(100, 0.5, SEED, OFFSET))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"residual": np.ones((2, 3), np.float32)}, ValueError, r"residual must have the input's shape \[2, 4\]"),
        ({"residual": np.ones((2, 4))}, TypeError, "residual must have the input's dtype float32, got float64"),
        ({"bias": np.ones(3, np.float32)}, ValueError, r"bias must have the shape \[4\], got \[3\]"),
        ({"bias": np.ones(4)}, TypeError, "bias must be float32 for float32 input, got float64"),
        ({"bias": [1.0] * 4}, TypeError, "expected a numpy.ndarray or cupy.ndarray, got list"),
        ({"activation": "swish"}, ValueError, "activation must be one of"),
        ({"order": "between"}, ValueError, "order must be one of"),
        ({"p": 2}, ValueError, "dropout probability has to be between 0 and 1"),
        ({"shared_axes": (2,)}, ValueError, "shared_axes must be in"),
        ({"sample_ids": np.arange(3)}, ValueError, r"sample_ids must have the shape \[2\]"),
        ({"out": np.ones((2, 3), np.float32)}, ValueError, r"out must have the result's shape \[2, 4\]"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    x = np.ones((2, 4), np.float32)
    arguments = {"residual": x.copy(), "p": 0.5, "seed": 1, "offset": 2} | change
    with unchanged(x), pytest.raises(error, match=message):
        gl.ops.dropout_add_forward(x, **arguments)


def test_a_bias_of_a_half_type_may_be_float32():
    x = normal((3, 8), np.float16)
    _, _, _, dbias, _ = run(x, x, x, bias=normal((8,), np.float32))
    assert dbias.dtype == np.float32
    with pytest.raises(TypeError, match="bias must be float16 or float32 for float16 input, got float64"):
        run(x, x, x, bias=np.ones(8))


def test_a_gradient_that_does_not_fit_is_refused():
    x = np.ones((2, 4), np.float32)
    for options in ({}, {"activation": "relu"}, {"bias": x[0]}, {"activation": "gelu"}):
        _, saved = gl.ops.dropout_add_forward(x, x, 0.5, 1, 2, **options)
        with pytest.raises(ValueError, match=r"dy must have the output's shape \[2, 4\], got \[3, 4\]"):
            gl.ops.dropout_add_backward(np.ones((3, 4), np.float32), saved)
