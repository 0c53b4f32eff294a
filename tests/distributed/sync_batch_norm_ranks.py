"""Run by several processes: each compares its part with one process that has the whole batch."""

import copy
import pickle
import sys
import warnings

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.distributed import MpiCommunicator, SingleProcess, default_communicator, shard
from tests.inputs import BFLOAT16, assert_same_bits, assert_within, normal

processes = default_communicator()
assert processes.size == int(sys.argv[1])
assert isinstance(processes, MpiCommunicator if processes.size > 1 else SingleProcess)
rank, size = processes.rank, processes.size


def added(values):
    return processes.gather(values).sum(axis=0)


def layers(kind, options, dtype):
    statistics = "float64" if dtype == np.float64 else "float32"
    made = [gl.SyncBatchNorm(3, dtype=statistics, **options), getattr(gl, kind)(3, dtype=statistics, **options)]
    for layer in made:
        for seed, values in enumerate(layer.parameters.values()):
            values[...] = normal((3,), seed=seed)
    return made


def check(kind, shape, bounds, dtype, bound, **options):
    """Two training steps and evaluation; rank r has the samples from bounds[r] to bounds[r + 1]."""
    sync, whole = layers(kind, options, dtype)
    own = slice(bounds[rank], bounds[rank + 1])
    for step in range(3):
        for layer in (sync, whole):
            layer.train(step < 2)
        x, residual, dy = (normal(shape, seed=3 * step + i) * (i + 1) + i for i in range(3))
        x, residual, dy = (one.astype(dtype) for one in (x, residual, dy))
        y, expected = sync(x[own], residual[own]), whole(x, residual)
        # 1e-12 is the promise for float64: values of order 1 to 10, under a thousand of them.
        assert_within(y, expected[own], bound, f"y {kind} {step}")
        results, whole_gradients = sync.backward(dy[own]), whole.backward(dy)
        for ours, theirs in zip(results, whole_gradients, strict=True):
            assert ours.dtype == dtype
            assert_within(ours, theirs[own], bound, f"dx {kind} {step}")
        for name, gradient in whole.gradients.items():
            assert_within(added(sync.gradients[name].astype(np.float64)), gradient, 50 * bound, name)
        for name, value in whole.buffers.items():
            assert_within(sync.buffers[name], value, bound, name)
            # The same bits everywhere.
            for other in processes.gather(sync.buffers[name]):
                assert_same_bits(np.asarray(other), sync.buffers[name])


def even(samples):
    return [samples * part // size for part in range(size + 1)]


#: Unequal parts; with more than one process the second has none.
uneven = [0, *np.cumsum([5, 0, 1, 3][:size])]
last = int(uneven[-1])
with np.errstate(all="raise"):
    for activation in (None, "relu", "gelu"):
        check("BatchNorm2d", (8, 3, 4, 5), even(8), np.float64, 1e-12, activation=activation)
    check("BatchNorm1d", (last, 3, 7), uneven, np.float64, 1e-12)
    check("BatchNorm1d", (last, 3), uneven, np.float64, 1e-12, affine=False)
    check("BatchNorm2d", (last, 4, 5, 3), uneven, np.float64, 1e-12, channels_last=True, momentum=None)
    check("BatchNorm2d", (8, 3, 4, 5), even(8), np.float32, 1e-4)
    # Two roundings of a value below 32; one comes from another sum.
    check("BatchNorm2d", (8, 3, 4, 5), even(8), np.float16, 2 * 32 * 2.0**-11)
    check("BatchNorm2d", (8, 3, 4, 5), even(8), BFLOAT16, 2 * 32 * 2.0**-8)
    if size < 4:
        with gl.use_backend("emulated"):
            check("BatchNorm2d", (8, 3, 4, 5), even(8), np.float32, 1e-4, activation="relu")
            check("BatchNorm1d", (last, 3, 7), uneven, np.float64, 1e-12, activation="gelu")
            check("BatchNorm2d", (last, 4, 5, 3), uneven, BFLOAT16, 2 * 32 * 2.0**-8, channels_last=True)

# Far from 0: what is merged does not cancel.
far = 1e6 + normal((64, 3))
layer = gl.SyncBatchNorm(3, momentum=1.0, dtype="float64")
layer(far[shard(64, processes)])
assert_within(layer.buffers["running_var"], far.var(axis=0, ddof=1), 1e-9)

# An empty batch everywhere, one value in all processes, and one value in this one.
layer(np.ones((0, 3)))
assert layer.buffers["num_batches_tracked"] == 2
with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
    layer(far[:1] if rank == 0 else far[:0])
if size > 1:
    layer(far[rank : rank + 1])
    assert_within(layer.buffers["running_mean"], far[:size].mean(axis=0), 1e-9)

# Padded batches, switches, and statistics over a data set.
x, lengths = normal((8, 3, 6)), np.array([6, 0, 3, 1, 2, 6, 5, 4])
own = shard(8, processes)
sync, whole = layers("BatchNorm1d", {}, np.float64)
assert_within(sync(x[own], lengths=lengths[own]), whole(x, lengths=lengths)[own], 1e-12)
assert_within(sync.backward(x[own]), whole.backward(x)[own], 1e-12)
sync.use_batch_statistics = False
sync(x[own])
whole(x)
assert_within(sync.buffers["running_mean"] * 0.9, whole.buffers["running_mean"] * 0.9, 1e-12)
gl.recalibrate(sync, [x[own], 2 * x[own]])
gl.recalibrate(whole, [x, 2 * x])
for name, value in whole.buffers.items():
    assert_within(sync.buffers[name], value, 1e-12, name)

# Without running statistics evaluation is that of each process's own batch, as in PyTorch.
alone = gl.SyncBatchNorm(3, track_running_stats=False, dtype="float64").eval()
assert_same_bits(alone(x), gl.BatchNorm1d(3, track_running_stats=False, dtype="float64")(x))

# Dropout of a shard is the shard of dropout: the masks do not depend on the number of processes.
for make in (
    lambda: gl.Dropout(0.4, generator=gl.Generator(1)),
    lambda: gl.Dropout1d(0.4, generator=gl.Generator(1)),
    lambda: gl.DropPath(0.4, generator=gl.Generator(1)),
    lambda: gl.FeatureAlphaDropout(0.4, generator=gl.Generator(1)),
    lambda: gl.ActivationDropout("gelu", 0.4, generator=gl.Generator(1)),
):
    local, whole = make(), make()
    for _ in range(2):
        local.first_sample = own.start
        assert_same_bits(local(x[own]), whole(x)[own].copy())
        assert_same_bits(local.backward(x[own]), whole.backward(x)[own].copy())

# Copies speak through the communicator of the original; from a file they get the default one, and say so.
odd = MpiCommunicator(processes._comm.Split(rank % 2)) if size > 1 else SingleProcess()
sync, copied = gl.SyncBatchNorm(3, dtype="float64", communicator=odd), None
sync(x[own])
for copied in (copy.copy(sync), copy.deepcopy(gl.Sequential(sync))[0]):
    assert copied.communicator is odd
    assert_same_bits(copied(x[own]), sync(x[own]))
    assert_same_bits(copied.backward(x[own]), sync.backward(x[own]))
content = pickle.dumps(gl.Sequential(sync))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loaded = pickle.loads(content)[0]
assert loaded.communicator is processes or size == 1
told = [f"a pickled layer had a MpiCommunicator of {odd.size} processes"] if size > 1 else []
assert [str(one.message)[: len(told[0])] for one in caught] == told * len(caught)
assert bool(caught) == (size > 1)
ours = pickle.loads(pickle.dumps(gl.SyncBatchNorm(3, dtype="float64", communicator=processes)))
assert ours.communicator is processes or size == 1
for one in (loaded, ours):
    one.load_state_dict(gl.BatchNorm1d(3, dtype="float64").state_dict())
    assert_within(one(x[own]), gl.BatchNorm1d(3, dtype="float64")(x)[own], 1e-12)

print(f"process {rank} of {size} is done")
