"""Groups of samples normalised each by its own statistics; running statistics of the whole batch."""

from itertools import pairwise

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.runtime.backend import use_executor
from tests.inputs import (
    BFLOAT16,
    NoLaunch,
    assert_same_bits,
    assert_within,
    normal,
    to_channels_first,
    to_channels_last,
    unchanged,
)

BOUND = 1e4 * 2.0**-53


def make(group_size, kind="GhostBatchNorm2d", **options):
    options = {"dtype": "float64"} | options
    layer = getattr(gl, kind)(3, group_size, **options) if group_size else getattr(gl, kind[5:])(3, **options)
    for seed, values in enumerate(layer.parameters.values()):
        values[...] = normal((3,), seed=seed)
    return layer


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=str)
@pytest.mark.parametrize(("samples", "bounds"), [(6, (0, 3, 6)), (7, (0, 3, 6, 7)), (8, (0, 3, 6, 8)), (2, (0, 2))])
def test_each_group_is_a_batch_of_its_own(samples, bounds, dtype, backend):
    layer = make(3, dtype="float32", activation="relu")
    x, residual, dy = (normal((samples, 3, 4, 2), dtype, seed=seed) for seed in range(3))
    with gl.use_backend(backend), unchanged(x, residual, dy):
        y = layer(x, residual)
        dx, dresidual = layer.backward(dy)
        sums = {"weight": 0.0, "bias": 0.0}
        for start, stop in pairwise(bounds):
            alone, part = make(0, dtype="float32", activation="relu"), slice(start, stop)
            assert_same_bits(y[part].copy(), alone(x[part], residual[part]))
            for actual, expected in zip((dx, dresidual), alone.backward(dy[part]), strict=True):
                assert_same_bits(actual[part].copy(), expected)
            sums = {name: total + alone.gradients[name].astype(np.float64) for name, total in sums.items()}
    for name, total in sums.items():
        assert_same_bits(layer.gradients[name], total.astype(np.float32))


@pytest.mark.parametrize("group_size", [1, 3, 7, 100])
def test_running_statistics_are_those_of_the_whole_batch(group_size):
    ghost, plain = make(group_size), make(0)
    for seed in range(3):
        x = normal((7, 3, 4, 2), seed=seed) + np.arange(7).reshape(-1, 1, 1, 1)
        ghost(x)
        plain(x)
        for name, value in plain.buffers.items():
            assert_within(ghost.buffers[name], value, BOUND * 10)
    assert_within(ghost.eval()(x), plain.eval()(x), BOUND)
    moments = ghost.batch_moments(x)
    assert_within(moments.mean, x.mean(axis=(0, 2, 3)), BOUND)


def test_the_last_axis_is_the_second():
    x, dy = normal((7, 3, 4, 2)), normal((7, 3, 4, 2), seed=1)
    first, last = make(3), make(3, channels_last=True)
    assert_within(to_channels_first(last(to_channels_last(x))), first(x), BOUND)
    assert_within(to_channels_first(last.backward(to_channels_last(dy))), first.backward(dy), BOUND)


@pytest.mark.parametrize(
    ("samples", "group_size", "bounds"),
    [(7, 3, (0, 3, 7)), (5, 1, (0, 2, 5)), (3, 2, (0, 3)), (2, 5, (0, 2)), (4, 2, (0, 2, 4))],
)
def test_a_single_value_joins_a_neighbour(samples, group_size, bounds):
    layer, x = make(group_size, "GhostBatchNorm1d"), normal((samples, 3))
    y = layer(x)
    for start, stop in pairwise(bounds):
        assert_same_bits(y[start:stop].copy(), make(0, "GhostBatchNorm1d")(x[start:stop]))


def test_groups_of_a_padded_batch():
    lengths = np.array([1, 0, 7, 2, 3, 0, 1])
    x, dy = normal((7, 3, 7)), normal((7, 3, 7), seed=1)
    layer = make(2, "GhostBatchNorm1d")
    y = layer(x, lengths=lengths)
    dx = layer.backward(dy)
    # Samples 0 and 1 have one value between them, and so has sample 6: they join their neighbours.
    for group in ([0, 1, 2, 3], [4, 5, 6]):
        alone = make(0, "GhostBatchNorm1d")
        assert_same_bits(y[group], alone(x[group], lengths=lengths[group]))
        assert_same_bits(dx[group], alone.backward(dy[group]))


def test_empty_and_single_batches():
    layer = make(2, "GhostBatchNorm1d")
    assert layer(np.ones((0, 3))).shape == layer.backward(np.ones((0, 3))).shape == (0, 3)
    assert layer.buffers["num_batches_tracked"] == 1
    with pytest.raises(
        ValueError, match=r"Expected more than 1 value per channel when training, got input size \[1, 3"
    ):
        layer(np.ones((1, 3)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bounds": (0, 3, 6)}, ValueError, r"^bounds must ascend from 0 to the input's 7 samples, got \(0, 3, 6\)$"),
        ({"bounds": (1, 7)}, ValueError, "bounds must ascend from 0"),
        ({"bounds": (0, 5, 3, 7)}, ValueError, "bounds must ascend from 0"),
        ({"bounds": ()}, ValueError, "bounds must ascend from 0"),
        ({"bounds": (0, 8)}, ValueError, r"^bounds must be in 0 \.\. 7, got 8$"),
        ({"bounds": (0, 3.0, 7)}, TypeError, "^bounds must be an integer, got float$"),
        # The last group's single value is found before the first group is normalised.
        ({"bounds": (0, 3, 6, 7)}, ValueError, r"^Expected more than 1 value per channel when training, .* \[1, 3\]$"),
        ({"bounds": (0, 3, 7), "residual": np.ones((8, 3))}, ValueError, "^residual must have the input's shape"),
        ({"bounds": (0, 3, 7), "residual": np.ones((7, 3), np.float32)}, TypeError, "^residual must have the input"),
        ({"bounds": (0, 3, 7), "eps": 0.0}, ValueError, "^batch_norm eps must be positive, but got 0.0$"),
        ({"bounds": (0, 3, 7), "activation": "elu"}, ValueError, "^activation must be one of"),
    ],
)
def test_bad_input_is_refused_before_anything_is_launched(options, error, message):
    with use_executor(NoLaunch()), pytest.raises(error, match=message):
        gl.ops.ghost_batch_norm_forward(normal((7, 3)), None, None, **options)


def test_a_kernel_adds_the_gradients_of_all_groups():
    layer, launched = make(2, dtype="float32"), []
    with gl.use_backend("emulated", check=True, record=lambda kernel, _: launched.append(kernel.name.split("<")[0])):
        y = layer(normal((6, 3, 4, 2), np.float32))
        launched.clear()
        layer.backward(y)
    assert launched == ["batch_norm_backward_persistent"] * 3 + ["batch_norm_add_gradients"]


def test_groups_that_begin_at_odd_addresses_are_copied():
    """Three samples of 3 x 5 float32 are 180 bytes: no multiple of 16."""
    layer, (x, residual, dy) = make(3, dtype="float32"), (normal((7, 3, 5, 1), np.float32, seed=i) for i in range(3))
    with gl.use_backend("emulated", check=True):
        results = (layer(x, residual), *layer.backward(dy))
    alone = make(0, dtype="float32")
    with gl.use_backend("emulated"):
        assert_same_bits(results[0][3:6].copy(), alone(x[3:6].copy(), residual[3:6].copy()))
        for one, other in zip(results[1:], alone.backward(dy[3:6].copy()), strict=True):
            assert_same_bits(one[3:6].copy(), other)


def test_state_and_repr_are_batch_norms():
    layer = make(4)
    layer.load_state_dict(make(0).state_dict())
    assert repr(layer) == repr(make(0)).replace("BatchNorm2d(3, ", "GhostBatchNorm2d(3, group_size=4, ")
    for bad, error in ((0, ValueError), (2.0, TypeError), (None, TypeError)):
        with pytest.raises(error, match="group_size must be"):
            gl.GhostBatchNorm2d(3, bad)
