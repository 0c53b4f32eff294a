"""Second derivatives: of batch norm against PyTorch and against differences; those of linear maps are the maps."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests.gradients import finite_differences
from tests.inputs import (
    LAYOUTS,
    assert_all_same_bits,
    assert_same_bits,
    assert_within,
    each_backend,
    normal,
    to_channels_last,
    unchanged,
)
from tests.ops.test_gradients import POOLS
from tests.torch_bridge import from_torch, to_torch

EPS = 1e-5
ACTIVATIONS = {None: lambda z: z, "relu": torch.relu, "leaky_relu": torch.nn.functional.leaky_relu}
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_side = pytest.mark.parametrize("channels_last", [False, True])
SHAPES = [(4, 3, 5, 7), (6, 8), (2, 16, 8), (2, 4, 3, 2, 5)]
GIVEN = ("ddx", "ddgamma", "ddbeta")


def made(shape, channels_last, residual):
    """Inputs by name; normal numbers, none so near a kink that another order of the sums decides."""
    arrays = {name: normal(shape, seed=seed) for seed, name in enumerate(("x", "dy", "ddx", "ddresidual", "residual"))}
    if not residual:
        del arrays["residual"], arrays["ddresidual"]
    if channels_last:
        arrays = {name: to_channels_last(array) for name, array in arrays.items()}
    for seed, name in enumerate(("gamma", "beta", "ddgamma", "ddbeta")):
        arrays[name] = normal((shape[1],), seed=10 + seed)
    return arrays


def ours(arrays, activation, channels_last, given=GIVEN):
    residual = arrays.get("residual")
    _, saved = gl.ops.batch_norm_forward(
        arrays["x"],
        arrays["gamma"],
        arrays["beta"],
        eps=EPS,
        residual=residual,
        activation=activation,
        channels_last=channels_last,
    )
    of = {name: arrays.get(name) if name in given else None for name in GIVEN}
    return gl.ops.batch_norm_double_backward(*of.values(), arrays["dy"], saved, ddresidual=arrays.get("ddresidual"))


def by_torch(arrays, activation, channels_last, given=GIVEN):
    leaves = {name: to_torch(array).requires_grad_() for name, array in arrays.items()}
    x = leaves["x"].movedim(-1, 1) if channels_last else leaves["x"]
    z = torch.nn.functional.batch_norm(x, None, None, leaves["gamma"], leaves["beta"], True, 0.1, EPS)
    z = z.movedim(1, -1) if channels_last else z
    if "residual" in leaves:
        z = z + leaves["residual"]
    inputs = [leaves[name] for name in ("x", "gamma", "beta", "residual") if name in leaves]
    first = torch.autograd.grad(ACTIVATIONS[activation](z), inputs, leaves["dy"], create_graph=True)
    weights = [leaves[name] for name in (*GIVEN, "ddresidual") if name in leaves]
    total = sum(
        (one * weight).sum()
        for name, one, weight in zip((*GIVEN, "ddresidual"), first, weights, strict=False)
        if name in (*given, "ddresidual")
    )
    gradients = torch.autograd.grad(total, [leaves["dy"], leaves["x"], leaves["gamma"]], allow_unused=True)
    zeros = (torch.zeros_like(leaves[name]) for name in ("dy", "x", "gamma"))
    return [from_torch(zero if one is None else one) for one, zero in zip(gradients, zeros, strict=True)]


def assert_close(actual, expected):
    # Sums of up to 140 products of numbers up to 10, with inverse deviations of up to 3: 1e-12 of the largest.
    for one, other in zip(actual, expected, strict=True):
        assert_within(one, other, 1e-12 * max(1, np.abs(other).max()))


@each_backend
@each_activation
@each_side
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_torchs(shape, residual, channels_last, activation, backend):
    arrays = made(shape, channels_last, residual)
    with gl.use_backend(backend), unchanged(*arrays.values()):
        actual = ours(arrays, activation, channels_last)
    assert_close(actual, by_torch(arrays, activation, channels_last))


@each_backend
@pytest.mark.parametrize("given", [("ddx",), ("ddgamma",), ("ddbeta",), ()], ids=str)
def test_each_term_by_itself(given, backend):
    arrays = made((4, 3, 5, 7), False, False)
    with gl.use_backend(backend):
        actual = ours(arrays, "relu", False, given)
    expected = by_torch(arrays, "relu", False, given) if given else [np.zeros_like(one) for one in actual]
    assert_close(actual, expected)


@each_activation
@each_side
def test_it_is_the_gradient_of_the_backward(activation, channels_last):
    arrays = made((3, 2, 4, 3), channels_last, False)

    def total(**moved):
        changed = arrays | moved
        _, saved = gl.ops.batch_norm_forward(
            changed["x"], changed["gamma"], changed["beta"], eps=EPS, activation=activation, channels_last=channels_last
        )
        gradients = gl.ops.batch_norm_backward(changed["dy"], saved)
        return float(sum((one * arrays[name]).sum() for name, one in zip(GIVEN, gradients, strict=True)))

    actual = ours(arrays, activation, channels_last)
    for name, gradient in zip(("dy", "x", "gamma"), actual, strict=True):
        expected = finite_differences(lambda moved, name=name: total(**{name: moved}), arrays[name])
        # As of the first derivatives: rounding of a sum of 72 numbers over the step, and a fifth derivative.
        assert_within(gradient, expected, 1e-8 * max(1, np.abs(expected).max()))


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, backend):
    arrays = made((4, 3, 5, 7), False, True)
    with gl.use_backend(backend):
        expected = ours(arrays, "relu", False)
        actual = ours({name: layout(array) for name, array in arrays.items()}, "relu", False)
    assert_all_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_other_dtypes_are_computed_in_float32(dtype):
    arrays = made((4, 3, 5, 7), False, False)
    rounded = {
        name: array.astype(dtype if array.ndim == 4 else np.float32).astype(np.float64)
        for name, array in arrays.items()
    }
    expected = by_torch(rounded, None, False)
    given = {name: array.astype(dtype if array.ndim == 4 else np.float32) for name, array in rounded.items()}
    for backend in ("reference", "emulated"):
        with gl.use_backend(backend):
            actual = ours(given, None, False)
        for one, other in zip(actual, expected, strict=True):
            # 140 additions in float32, of up to 100 in all; and the rounding of the result.
            bound = 140 * 2.0**-24 * 100 + np.abs(other) * (2.0**-11 if one.dtype == np.float16 else 0)
            assert_within(one, other, bound)


@each_backend
def test_an_empty_batch(backend):
    x, c = np.ones((0, 3, 4), np.float32), np.ones(3, np.float32)
    with gl.use_backend(backend):
        _, saved = gl.ops.batch_norm_forward(x, c, c)
        ddy, dx, dgamma = gl.ops.batch_norm_double_backward(x, c, c, x, saved)
    assert ddy.shape == dx.shape == x.shape
    assert dgamma.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dy": np.ones((4, 3))}, TypeError, "dy must have the output's dtype float32"),
        ({"ddx": np.ones((4, 2), np.float32)}, ValueError, r"ddx must be float32 of shape \[4, 3\], got float32 of sh"),
        ({"ddgamma": np.ones(3)}, TypeError, r"ddgamma must be float32 of shape \[3\], got float64"),
        ({"ddbeta": np.ones(4, np.float32)}, ValueError, r"ddbeta must be float32 of shape \[3\]"),
        ({"ddresidual": np.ones((4, 3), np.float32)}, ValueError, "the forward had no residual"),
        ({"activation": "gelu"}, ValueError, "second derivatives need the activation identity or relu or leaky_relu"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    x, c = normal((4, 3), np.float32), np.ones(3, np.float32)
    _, saved = gl.ops.batch_norm_forward(x, c, c, activation=change.get("activation"))
    change = {name: value for name, value in change.items() if name != "activation"}
    arguments = {"ddx": x, "ddgamma": c, "ddbeta": c, "dy": x, "saved": saved} | change
    with pytest.raises(error, match=message):
        gl.ops.batch_norm_double_backward(**arguments)


WINDOWS = {**POOLS, "lengths": {"kernel_size": (2, 2), "lengths": [[5, 6], [2, 0]]}}


@each_backend
@each_side
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_max_pool_gather_is_the_transpose_of_the_backward_and_takes_the_chosen(window, channels_last, backend):
    x, t = normal((2, 3, 5, 6)), normal((2, 3, 5, 6), seed=1)
    if channels_last:
        x, t = to_channels_last(x), to_channels_last(t)
    with gl.use_backend(backend), unchanged(x, t):
        y, saved = gl.ops.max_pool_forward(x, **window, channels_last=channels_last)
        gathered = gl.ops.max_pool_gather(t, saved)
        dy = normal(y.shape, seed=2)
        dx = gl.ops.max_pool_backward(dy, saved)
        if "lengths" not in window:
            assert_same_bits(gl.ops.max_pool_gather(x, saved), y)
    indices = gl.ops.max_pool_indices(saved)
    planes = (to_channels_first_planes(one, channels_last) for one in (t, indices, gathered))
    flat, at, got = planes
    np.testing.assert_array_equal(got, np.where(at >= 0, np.take_along_axis(flat, np.maximum(at, 0), 2), 0))
    # <gather(t), dy> = <t, backward(dy)>: sums of fewer than 200 products of up to 10.
    assert (gathered * dy).sum() == pytest.approx((t * dx).sum(), abs=200 * 10 * 2.0**-52)


def to_channels_first_planes(array, channels_last):
    array = np.moveaxis(array, -1, 1) if channels_last else array
    return array.reshape(*array.shape[:2], -1)


def test_max_pool_gather_unbatched_and_into_an_array():
    x = normal((3, 5, 6))
    _, saved = gl.ops.max_pool_forward(x, (2, 2))
    out = np.empty((3, 2, 3))
    assert gl.ops.max_pool_gather(x, saved, out=out) is out
    assert_same_bits(out, gl.ops.max_pool_gather(x, saved))
    with pytest.raises(ValueError, match=r"x must have the input's shape \[3, 5, 6\], got \[3, 6, 5\]"):
        gl.ops.max_pool_gather(normal((3, 6, 5)), saved)
    with pytest.raises(TypeError, match="x must have the input's dtype float64, got float32"):
        gl.ops.max_pool_gather(x.astype(np.float32), saved)


def test_dropout_and_average_pooling_are_their_own_second_derivatives():
    x, v = normal((2, 3, 4, 6)), normal((2, 3, 4, 6), seed=1)
    _, saved = gl.ops.dropout_forward(x, 0.5, 1, 2)
    # The backward of dropout is the map v -> m v / q, whose transpose is itself.
    assert_same_bits(gl.ops.dropout_backward(v, saved), gl.ops.dropout_forward(v, 0.5, 1, 2)[0])
    y, saved = gl.ops.avg_pool_forward(x, (2, 2))
    dy = normal(y.shape, seed=2)
    # The transpose of the backward of average pooling is the forward.
    left = (gl.ops.avg_pool_backward(dy, saved) * v).sum()
    assert left == pytest.approx((dy * gl.ops.avg_pool_forward(v, (2, 2))[0]).sum(), abs=1e-13)
