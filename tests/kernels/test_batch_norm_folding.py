"""Which kernel folds a batch into the running statistics: the one that finds its statistics, whatever the rule."""

import contextlib

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers import reference
from gpu_layers.core.running import RunningStatistics
from gpu_layers.emulator import ALL_SCHEDULES
from gpu_layers.kernels.batch_norm_plan import forward_plan
from gpu_layers.layers.batch_norm_max_pool import BatchNormMaxPool
from gpu_layers.ops.padding import valid_positions
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.limits import force_limits
from tests.inputs import assert_same_bits, normal

# Blocks that share a channel and those that do not, in one read and in two; more channels than a block has threads.
SHARED, WHOLE = ((6, 2, 48, 40), False), ((2, 300, 3, 5), False)
SHARED_ROWS, WHOLE_ROWS, ODD_ROWS = ((4, 16, 16, 40), True), ((4, 3, 3, 512), True), ((3, 5, 4, 301), True)
RULES = {
    "average": {"momentum": None},
    "finite": {"momentum": 0.3, "finite_only": True},
    "both": {"momentum": None, "finite_only": True},
}


def running(channels, values, momentum, finite_only=False, dtype=np.float32):
    mean, var = normal((channels,), dtype, 1), np.full(channels, 3, dtype)
    return RunningStatistics(mean, var, np.array(2), momentum, values, np.array(4), finite_only)


def copied(one):
    return one._replace(**{name: getattr(one, name).copy() for name in ("mean", "var", "batches", "skipped")})


def batches(shape, channels_last):
    """A finite one, and one whose last channel has an infinity."""
    finite = normal(shape, np.float32, 2) + np.float32(2)
    spoilt = finite.copy()
    spoilt[(-1,) * len(shape)] = np.inf
    return finite, spoilt, finite[::-1].copy()


@contextlib.contextmanager
def recorded():
    """The functions whose kernels are launched; every access is checked."""
    names = []
    with gl.use_backend("emulated", check=True, record=lambda kernel, _: names.append(kernel.name.split("<")[0])):
        yield names


def assert_folds(run, channels, values, inputs, rule):
    """``run(x, running)`` gives statistics, and folds them in as the reference does, in no more launches than usual."""
    with recorded() as usual:
        run(inputs[0], running(channels, values, 0.3))
    actual = running(channels, values, **RULES[rule])
    expected = copied(actual)
    for x in inputs:
        with recorded() as launched:
            statistics = run(x, actual)
        assert launched == usual
        with np.errstate(invalid="ignore"):
            reference.batch_norm_fold(statistics, expected)
        for ours, theirs in zip(actual.arrays, expected.arrays, strict=True):
            assert_same_bits(ours, theirs)
    assert actual.skipped == 4 + (1 if "finite_only" in RULES[rule] else 0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("two_reads", [False, True])
@pytest.mark.parametrize(("shape", "channels_last"), [SHARED, WHOLE, SHARED_ROWS, WHOLE_ROWS, ODD_ROWS], ids=str)
def test_a_forward_folds_a_batch_in(shape, channels_last, two_reads, rule):
    channels = shape[-1 if channels_last else 1]
    plan = forward_plan(shape, 4, channels_last)
    assert (plan.blocks_per_group > 1) == ((shape, channels_last) in (SHARED, SHARED_ROWS))
    assert (plan.slots is None) == ((shape, channels_last) == ODD_ROWS)

    def run(x, into):
        return backend_for(x).batch_norm_forward(x, None, None, 1e-5, channels_last, running=into)[1]

    with force_limits(two_reads=two_reads):
        assert_folds(run, channels, plan.count, batches(shape, channels_last), rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("two_reads", [False, True])
@pytest.mark.parametrize(("shape", "channels_last"), [SHARED, WHOLE, SHARED_ROWS], ids=str)
def test_a_padded_batch_is_folded_in_with_the_number_of_its_values(shape, channels_last, two_reads, rule):
    channels, spatial = shape[-1 if channels_last else 1], shape[1:3] if channels_last else shape[2:]
    inputs = batches(shape, channels_last)
    # The last sample, which one batch spoils, counts.
    lengths = [[min(1 + sample, size) for size in spatial] for sample in range(shape[0] - 1)] + [spatial]
    valid = valid_positions(inputs[0], lengths, None, channels_last)
    # Packed once, which the first forward does else.
    valid.words(inputs[0])

    def run(x, into):
        arguments = (x, None, None, 1e-5, channels_last, None, "identity", into, None, valid)
        return backend_for(x).batch_norm_forward(*arguments)[1]

    with force_limits(two_reads=two_reads):
        assert_folds(run, channels, valid.count, inputs, rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("is_told", [False, True])
@pytest.mark.parametrize("channels", [5, 300])
def test_merged_parts_are_folded_in(channels, is_told, rule):
    finite = abs(normal((3, 2 * channels), np.float32, 2))
    spoilt = finite.copy()
    counts = np.array([7.0, 0.0, 5.0]) if is_told else (7, 0, 5)
    spoilt[0, channels - 1] = np.inf

    def run(parts, into):
        return backend_for(parts).batch_norm_merge_parts(parts, counts, channels, into)[0]

    assert_folds(run, channels, 12, (finite, spoilt, finite), rule)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_parts_of_no_values_are_counted_and_change_nothing(momentum):
    into = running(3, 0, momentum)
    before = copied(into)
    with gl.use_backend("emulated", check=True):
        backend_for(into.mean).batch_norm_merge_parts(np.zeros((2, 6), np.float32), (0, 0), 3, into)
    assert into.batches == 3
    assert_same_bits(into.mean, before.mean)
    assert_same_bits(into.var, before.var)


@pytest.mark.parametrize("schedule", ALL_SCHEDULES, ids=str)
@pytest.mark.parametrize(("shape", "channels_last"), [SHARED, SHARED_ROWS, WHOLE_ROWS], ids=str)
def test_whichever_block_comes_last_folds_the_batch_in(shape, channels_last, schedule):
    (x, *_), channels = batches(shape, channels_last), shape[-1 if channels_last else 1]
    results = []
    for order in (None, schedule):
        into = running(channels, x.size // channels, None)
        options = {} if order is None else {"schedule": order}
        with gl.use_backend("emulated", **options):
            backend_for(x).batch_norm_forward(x, None, None, 1e-5, channels_last, running=into)
        results.append(into.arrays)
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: gl.BatchNorm2d(8, **options),
        lambda **options: gl.BatchNorm2d(8, activation="gelu", **options),
        lambda **options: gl.GhostBatchNorm2d(8, 2, **options),
        lambda **options: gl.SyncBatchNorm(8, **options),
        lambda **options: BatchNormMaxPool(gl.BatchNorm2d(8, **options), gl.MaxPool2d(2)),
    ],
    ids=["one read", "two reads", "ghost", "sync", "max pool"],
)
def test_layers_launch_no_kernel_more(make):
    def launched(layer, skips=False):
        layer.skip_nonfinite = skips
        with recorded() as names:
            layer(normal((4, 8, 6, 6), np.float32))
        assert layer.buffers["num_batches_tracked"] == 1
        return names

    usual = launched(make())
    assert launched(make(momentum=None)) == usual
    assert launched(make(), skips=True) == usual
