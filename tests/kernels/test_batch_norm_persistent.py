"""Batch norm in one read: what it loads, that its bits are those of two reads, and when it steps back."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.emulator import ALL_SCHEDULES
from gpu_layers.kernels.batch_norm_plan import backward_plan, forward_plan
from gpu_layers.runtime.limits import force_limits
from tests.inputs import DTYPES, assert_all_same_bits, emulated, normal

# Groups of several blocks in both passes: planes of an odd size and of whole vectors; rows whose last tile is not full.
SHAPES = [((3, 3, 61, 71), False), ((6, 2, 48, 40), False), ((4, 16, 16, 40), True), ((601, 48), True)]
each_shape = pytest.mark.parametrize(("shape", "channels_last"), SHAPES, ids=str)


def inputs(shape, channels_last, dtype):
    x, dy, residual = (normal(shape, dtype, seed=seed) for seed in (1, 2, 3))
    channels = shape[-1] if channels_last else shape[1]
    gamma, beta = (normal((channels,), np.float64 if dtype == np.float64 else np.float32, seed=s) for s in (4, 5))
    return x, dy, residual, gamma, beta


def passes(arrays, channels_last, activation, with_residual):
    x, dy, residual, gamma, beta = arrays
    options = {
        "residual": residual if with_residual else None,
        "activation": activation,
        "channels_last": channels_last,
    }
    y, saved = gl.ops.batch_norm_forward(x, gamma, beta, **options)
    return [y, saved.mean, saved.var, saved.inv_std, *gl.ops.batch_norm_backward(dy, saved)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "with_residual"), [(None, False), ("relu", True), ("leaky_relu", False)])
@each_shape
def test_one_read_and_two_reads_give_the_same_bits(shape, channels_last, activation, with_residual, dtype):
    arrays, launched = inputs(shape, channels_last, dtype), []
    itemsize = np.dtype(dtype).itemsize
    plans = [plan(shape, itemsize, channels_last) for plan in (forward_plan, backward_plan)]
    assert all(plan.slots is not None and plan.blocks_per_group > 1 for plan in plans)
    with emulated(launched):
        once = passes(arrays, channels_last, activation, with_residual)
    persistent = ["_persistent<" in name for name in launched]
    # The gradient of a leaky ReLU is not exact in the type of dy: its backward reads twice.
    assert persistent == ([True, True] if activation != "leaky_relu" else [True, False, False, False])
    # No group of blocks fits.
    with gl.use_backend("emulated"), force_limits(max_blocks=1):
        twice = passes(arrays, channels_last, activation, with_residual)
    assert_all_same_bits(once, twice)
    # One group, which takes the channels in turn: what one of them leaves in shared memory meets the next.
    groups = max(plan.blocks_per_group for plan in plans)
    with gl.use_backend("emulated", check=True), force_limits(max_blocks=groups):
        in_turn = passes(arrays, channels_last, activation, with_residual)
    assert_all_same_bits(once, in_turn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channels_last"), [((3, 5, 9, 11), False), ((5, 7, 4), False), ((9, 160), True)])
def test_a_block_takes_channels_in_turn(shape, channels_last, dtype):
    """No other block waits for it: nothing but its own barriers keeps one channel's sums from the next one's."""
    arrays = inputs(shape, channels_last, dtype)
    plans = [plan(shape, np.dtype(dtype).itemsize, channels_last) for plan in (forward_plan, backward_plan)]
    assert all(plan.slots is not None and plan.blocks_per_group == 1 and plan.tiles > 2 for plan in plans)
    with gl.use_backend("emulated"):
        expected = passes(arrays, channels_last, "relu", True)
    for schedule in (ALL_SCHEDULES[0], ALL_SCHEDULES[-1]):
        with gl.use_backend("emulated", check=True, schedule=schedule), force_limits(max_blocks=1):
            assert_all_same_bits(expected, passes(arrays, channels_last, "relu", True))


@each_shape
def test_no_schedule_changes_a_bit(shape, channels_last):
    arrays = inputs(shape, channels_last, np.float32)
    results = []
    for schedule in ALL_SCHEDULES:
        with gl.use_backend("emulated", schedule=schedule):
            results.append(passes(arrays, channels_last, "relu", True))
    for other in results[1:]:
        assert_all_same_bits(results[0], other)


@each_shape
def test_every_input_is_loaded_once(shape, channels_last):
    arrays, traces = inputs(shape, channels_last, np.float32), []
    with gl.use_backend("emulated", check=True, record=lambda kernel, trace: traces.append(trace)):
        passes(arrays, channels_last, "relu", True)
    forward, backward = traces
    x, channels = arrays[0], arrays[3].size
    # Besides, the blocks of a channel load its first value: all threads of planes, of rows those that have the channel,
    # and again the one that writes what they found.
    threads = forward_plan(shape, x.dtype.itemsize, channels_last).blocks_per_group * channels
    threads *= forward_plan(shape, x.dtype.itemsize, channels_last).block[1] + 1 if channels_last else 256
    assert forward.total("x", "load").bytes == x.nbytes + threads * x.dtype.itemsize
    for trace, name in ((forward, "residual"), (backward, "residual"), (backward, "x"), (backward, "dy")):
        assert trace.total(name, "load").bytes == x.nbytes, name
    for trace, name in ((forward, "y"), (backward, "dx"), (backward, "dresidual")):
        assert trace.total(name, "store").bytes == x.nbytes, name


# Several blocks a channel; planes that rows of threads have in turn, where some threads have a vector more of each.
@pytest.mark.parametrize("shape", [(70, 70, 5, 8), (66, 133, 3, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [((3, 3), 2, 1), ((2, 2), 2, 0)])
def test_max_pooling_of_what_is_kept_gives_the_bits_of_two_reads(shape, dtype, kernel, stride, padding):
    x, launched = normal(shape, dtype), []
    x[0, :, ::3, ::2], x[1, 0, 1, 7], x[1, 1, 2, 0] = 0.5, np.nan, -np.inf
    gamma, beta = (normal((shape[1],), np.float64 if dtype == np.float64 else np.float32, seed=s) for s in (4, 5))

    def pass_of(activation):
        y, saved = gl.ops.batch_norm_max_pool_forward(x, gamma, beta, kernel, stride, padding, activation=activation)
        return [y, saved.pool.argmax, saved.norm.mean, saved.norm.var, saved.norm.inv_std]

    for activation in ("relu", "leaky_relu", None):
        with emulated(launched):
            once = pass_of(activation)
        with gl.use_backend("emulated"), force_limits(two_reads=True):
            twice = pass_of(activation)
        assert_all_same_bits(once, twice)
        # One group, which takes the channels in turn.
        groups = forward_plan(shape, x.dtype.itemsize, False).blocks_per_group
        with emulated(launched, max_blocks=groups):
            in_turn = pass_of(activation)
        assert_all_same_bits(once, in_turn)
    assert len(launched) == 6
    assert all(name.startswith("batch_norm_max_pool_forward_persistent<") for name in launched)
