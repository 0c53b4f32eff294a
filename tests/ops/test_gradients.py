"""Every backward against finite differences of its forward, in float64."""

import numpy as np
import pytest

import gpu_layers as gl
from tests.gradients import STEP, finite_differences
from tests.inputs import assert_within, normal, tie_free, to_channels_last


def check(forward, backward, x, tolerance):
    """``backward(dy)`` against the differences of ``sum(dy * forward(x))``.

    For a map that is linear within the steps the formula is exact, and the differences are off by their rounding:
    about ``2**-52 * sum|dy * y| / STEP``. Where the map is curved, its fifth derivative adds to the tolerance.
    """
    y = forward(x)
    dy = normal(y.shape, seed=9)
    expected = finite_differences(lambda moved: float((dy * forward(moved)).sum()), x)
    rounding = 2.0**-52 / STEP * (1 + np.abs(dy * y).sum())
    assert_within(backward(dy), expected, rounding + tolerance)
    assert np.abs(expected).max() > 1e-2


@pytest.mark.parametrize("p", [0.0, 0.3, 0.7])
def test_dropout(p):
    x = normal((5, 7))
    _, saved = gl.ops.dropout_forward(x, p, 1, 2, start=3)
    check(
        lambda moved: gl.ops.dropout_forward(moved, p, 1, 2, start=3)[0],
        lambda dy: gl.ops.dropout_backward(dy, saved),
        x,
        0,
    )


def test_relu():
    x = tie_free((5, 7)) + 0.5  # no kink within the steps
    _, saved = gl.ops.relu_forward(x)
    check(lambda moved: gl.ops.relu_forward(moved)[0], lambda dy: gl.ops.relu_backward(dy, saved), x, 0)


POOLS = {
    "2x2": {"kernel_size": (2, 2)},
    "overlapping": {"kernel_size": (3, 3), "stride": 1, "padding": 1},
    "odd": {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 0), "dilation": (1, 2), "ceil_mode": True},
}
each_window = pytest.mark.parametrize("window", POOLS.values(), ids=POOLS)
each_side = pytest.mark.parametrize("channels_last", [False, True])


@each_window
@each_side
def test_max_pool(window, channels_last):
    x = tie_free((2, 2, 5, 6))  # neighbours are 1 apart: no other maximum within the steps
    x = to_channels_last(x) if channels_last else x
    options = window | {"channels_last": channels_last}
    _, saved = gl.ops.max_pool_forward(x, **options)
    check(
        lambda moved: gl.ops.max_pool_forward(moved, **options)[0], lambda dy: gl.ops.max_pool_backward(dy, saved), x, 0
    )


@each_window
@each_side
@pytest.mark.parametrize("divisor", [{}, {"count_include_pad": False}, {"divisor_override": 5}], ids=str)
def test_avg_pool(window, channels_last, divisor):
    x = normal((2, 2, 5, 6))
    x = to_channels_last(x) if channels_last else x
    options = window | divisor | {"channels_last": channels_last}
    _, saved = gl.ops.avg_pool_forward(x, **options)
    check(
        lambda moved: gl.ops.avg_pool_forward(moved, **options)[0], lambda dy: gl.ops.avg_pool_backward(dy, saved), x, 0
    )


@each_side
@pytest.mark.parametrize("shape", [(6, 3), (3, 2, 5), (3, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("wanted", ["x", "gamma", "beta"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(shape, channels_last, wanted, training):
    x = normal(shape) * 2 + 1
    x = to_channels_last(x) if channels_last and len(shape) > 2 else x
    channels = x.shape[-1] if channels_last else x.shape[1]
    arrays = {"x": x, "gamma": normal((channels,), seed=1) + 2, "beta": normal((channels,), seed=2)}
    mean, var = normal((channels,), seed=3), np.exp(normal((channels,), seed=4))

    def forward(moved):
        changed = arrays | {wanted: moved}
        options = {"channels_last": channels_last, "eps": 0.1}
        if training:
            return gl.ops.batch_norm_forward(**changed, **options)
        return gl.ops.batch_norm_inference(mean=mean, var=var, **changed, **options)

    _, saved = forward(arrays[wanted])
    backward = gl.ops.batch_norm_backward if training else gl.ops.batch_norm_inference_backward
    # 1e-9 is STEP**4 / 30 = 3e-14 of a fifth derivative of 3e4: that of 1 / sqrt(var) for values this close together.
    check(
        lambda moved: forward(moved)[0],
        lambda dy: backward(dy, saved)[["x", "gamma", "beta"].index(wanted)],
        arrays[wanted],
        1e-9 if training and wanted == "x" else 0,
    )
