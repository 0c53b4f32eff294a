"""Batch norm over processes: real ones, started by mpirun."""

import copy
import dataclasses
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.distributed import Communicator, MpiCommunicator, NcclCommunicator, SingleProcess, shard
from gpu_layers.ops import sync_batch_norm
from tests.distributed.processes import run_processes
from tests.inputs import assert_all_same_bits, assert_same_bits, normal

HERE = Path(__file__).parent


@pytest.mark.parametrize("count", [1, 2, 4])
def test_all_processes_together_are_one_with_the_whole_batch(count):
    done = run_processes(count, "-W", "error", "-m", "mpi4py", HERE / "sync_batch_norm_ranks.py", count)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(count):
        assert f"process {rank} of {count} is done" in done.stdout


@pytest.mark.parametrize("how", ["killed", "raises", "sleeps", "with mpi4py"])
def test_a_process_that_is_lost_is_an_error_for_the_others(how):
    began = time.monotonic()
    runner = ("-m", "mpi4py") if how == "with mpi4py" else ()
    done = run_processes(2, *runner, HERE / "lost_ranks.py", "raises" if runner else how)
    assert done.returncode != 0, done.stdout
    assert time.monotonic() - began < 60
    if how in ("raises", "with mpi4py"):
        assert "this process has a bug" in done.stderr
    if how == "sleeps":
        assert "process 0 of 2 waited 2 s for the others: one has ended, or has not come to the same" in done.stdout


def test_without_other_processes_it_is_batch_norm():
    x, dy = normal((5, 3, 4)), normal((5, 3, 4), seed=1)
    sync, plain = gl.SyncBatchNorm(3, dtype="float64"), gl.BatchNorm1d(3, dtype="float64")
    assert isinstance(sync.communicator, SingleProcess)
    assert_same_bits(sync(x), plain(x))
    assert_same_bits(sync.backward(dy), plain.backward(dy))
    assert_same_bits(sync(x, lengths=[4, 0, 1, 2, 3]), plain(x, lengths=[4, 0, 1, 2, 3]))
    for name, value in plain.buffers.items():
        assert_same_bits(sync.buffers[name], value)
    assert_same_bits(sync.eval()(x), plain.eval()(x))
    assert repr(sync) == repr(plain).replace("BatchNorm1d", "SyncBatchNorm")
    sync.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="expected 2D or 3D or 4D or 5D input"):
        sync(x[0, 0])
    with pytest.raises(ValueError, match=r"dy must have the output's shape \[5, 3, 4\]"):
        sync.backward(dy[:2])


class Between(Communicator):
    """The second of three processes; what the others send is given, in the dtype in which this one sends."""

    rank, size = 1, 3

    def __init__(self, before, after):
        self.before, self.after = before, after

    def gather(self, values):
        return np.stack([np.asarray(self.before, values.dtype), values, np.asarray(self.after, values.dtype)])


@pytest.mark.parametrize("floor", ["reference", "emulated"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_sums_of_all_processes_are_added_in_float64(dtype, floor):
    """Those of the others are large and cancel: float32, whose numbers at 1e8 are 8 apart, would forget the own."""
    # Mean 0, and a variance of 1/4, which eps makes 1: xhat is x.
    x, dy = np.array([[-0.5], [0.5]], dtype), np.array([[0], [2]], dtype)
    with gl.use_backend(floor):
        _, saved = gl.ops.sync_batch_norm_forward(x, None, None, SingleProcess(), eps=0.75)
        # dgamma and dbeta of the own part are 1 and 2, and so are the sums.
        saved = dataclasses.replace(saved, communicator=Between([[1e8], [-1e8]], [[-1e8], [1e8]]))
        dx, dgamma, dbeta = gl.ops.sync_batch_norm_backward(dy, saved)
    np.testing.assert_array_equal(np.concatenate([dgamma, dbeta]), [1, 2])
    # dy - 2 / 2 - xhat / 2
    np.testing.assert_array_equal(dx, [[-0.75], [0.75]])


class Twice(SingleProcess):
    """The first of two processes with the same values."""

    size = 2

    def gather(self, values):
        return np.stack([values, values])


@pytest.mark.parametrize(("values", "waits"), [(0, 1), (1, 1), (2, 0), (5, 0)])
def test_the_host_reads_how_many_values_there_are_only_where_it_may_be_a_single_one(monkeypatch, values, waits):
    read = []
    monkeypatch.setattr(sync_batch_norm, "to_host", lambda counts: read.append(counts) or counts)
    layer = gl.SyncBatchNorm(2, communicator=Twice())
    layer(normal((values, 2), np.float32))
    assert len(read) == waits
    assert layer.buffers["num_batches_tracked"] == 1
    assert layer._saved_by_forward()[1].count == 2 * values


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("values", [0, 5])
def test_statistics_of_several_processes_may_wait(values, backend):
    at_once, later = (gl.SyncBatchNorm(2, communicator=Twice()) for _ in range(2))
    later.deferred = True
    with gl.use_backend(backend):
        for layer in (at_once, later):
            layer(normal((values, 2), np.float32))
        later.commit()
    assert_all_same_bits(later.buffers, at_once.buffers)


class Recorded:
    """What an engine of CuPy is asked for, answered as though a second process had twice the values."""

    def all_gather(self, own, everything, count):
        assert own.flags.c_contiguous
        assert count == own.size
        everything[0], everything[1] = own, 2 * own


def test_the_engine_of_nccl_is_asked_for_all_elements():
    processes = NcclCommunicator(Recorded(), 0, 2)
    np.testing.assert_array_equal(processes.gather(np.ones((2, 3))[:, ::2]), [np.ones((2, 2)), np.full((2, 2), 2)])
    assert processes.gather(np.ones((0, 3))).shape == (2, 0, 3)
    with pytest.raises(TypeError, match="NCCL gathers float32 and float64 here, got int64"):
        processes.gather(np.ones(3, int))
    for arguments, error in ((("0", 2), TypeError), ((2, 2), ValueError), ((0, 0), ValueError)):
        with pytest.raises(error):
            NcclCommunicator(Recorded(), *arguments)


@pytest.mark.parametrize("samples", [0, 1, 2, 7, 8])
def test_shards_are_the_batch_in_order(samples):
    class Numbered(SingleProcess):
        def __init__(self, rank):
            self.rank, self.size = rank, 3

    parts = [shard(samples, Numbered(rank)) for rank in range(3)]
    assert [i for part in parts for i in range(samples)[part]] == list(range(samples))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


class Silent(SingleProcess):
    def gather(self, values):
        raise AssertionError("something was exchanged")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"residual": np.ones((5, 4))}, ValueError, "^residual must have the input's shape"),
        ({"eps": -1.0}, ValueError, "^batch_norm eps must be positive"),
        ({"activation": "elu"}, ValueError, "^activation must be one of"),
        ({"gamma": np.ones(2)}, ValueError, "^gamma should contain 3 elements not 2$"),
        ({"beta": np.ones(3, np.float32)}, TypeError, "^beta must be float64 for float64 input, got float32$"),
        ({"communicator": 2}, TypeError, "^communicator must be a gpu_layers.distributed.Communicator, got int$"),
    ],
)
def test_bad_input_is_refused_before_anything_is_exchanged(options, error, message):
    options = {"gamma": None, "beta": None, "communicator": Silent(), **options}
    with pytest.raises(error, match=message):
        gl.ops.sync_batch_norm_forward(normal((5, 3)), **options)


class Answering(SingleProcess):
    """One of two processes, to which an engine answers in a wrong way."""

    size = 2

    def __init__(self, answer):
        self.answer = answer

    def gather(self, values):
        return self.answer(values)


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda values: np.stack([values] * 3), r"got ndarray of float64 and shape \[3, 7\]$"),
        (lambda values: values, r"got ndarray of float64 and shape \[7\]$"),
        (lambda values: np.stack([values] * 2).astype(np.float32), r"got ndarray of float32 and shape \[2, 7\]$"),
        (lambda values: [values, values], r"got list of None and shape \[\]$"),
    ],
)
@pytest.mark.parametrize("floor", ["reference", "emulated"])
def test_what_an_engine_answers_is_checked(floor, answer, got):
    """What has another shape would be merged as if it were that of other channels."""
    asked = r"Answering.gather must return the arrays of 2 processes: ndarray of float64 and shape \[2, 7\], "
    with gl.use_backend(floor), pytest.raises(TypeError, match=asked + got):
        gl.ops.sync_batch_norm_forward(normal((5, 3)), None, None, Answering(answer))


class Pair(SingleProcess):
    """Two processes with the same values, over a connection that cannot be copied."""

    def __init__(self):
        self.size, self.connection = 2, threading.Lock()

    def gather(self, values):
        return np.stack([values, values])


@pytest.mark.parametrize("communicator", [Pair(), NcclCommunicator(threading.Lock(), 1, 2)], ids=["own", "nccl"])
def test_copies_share_the_communicator_and_pickles_take_the_default_one(communicator):
    layer = gl.SyncBatchNorm(3, communicator=communicator)
    for copied in (copy.copy(layer), copy.deepcopy(layer), copy.deepcopy(gl.Sequential(gl.Sequential(layer)))[0][0]):
        assert copied.communicator is communicator
        assert copied is not layer
    content = pickle.dumps([layer, gl.Sequential(layer)])
    name = type(communicator).__name__
    with pytest.warns(UserWarning, match=f"a pickled layer had a {name} of 2 processes.* SingleProcess of 1"):
        loaded, _ = pickle.loads(content)
    assert type(loaded.communicator) is SingleProcess
    assert_all_same_bits(loaded.state_dict(), layer.state_dict())


def test_what_was_the_default_one_stays_so_without_a_word():
    layer = pickle.loads(pickle.dumps(gl.SyncBatchNorm(3)))
    assert layer.communicator.size == 1
    x = normal((4, 3), np.float32)
    y = layer(x)
    assert_same_bits(copy.deepcopy(layer).backward(x), layer.backward(x))
    assert_same_bits(y, gl.SyncBatchNorm(3)(x))


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"communicator must be a gpu_layers.distributed.Communicator, got int"):
        gl.SyncBatchNorm(3, communicator=2)
    for timeout, error in ((0, ValueError), (-1, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="timeout must be"):
            MpiCommunicator(object(), timeout=timeout)
    for missing in ("gather", "abort"):
        with pytest.raises(TypeError, match=f"Communicator defines no {missing}"):
            getattr(gl.distributed.Communicator(), missing)(*([None] if missing == "gather" else []))
    with pytest.raises(SystemExit):
        SingleProcess().abort()


def test_a_missing_mpi_is_explained():
    code = """
import sys
sys.modules["mpi4py.MPI"] = None
import gpu_layers as gl
try:
    gl.SyncBatchNorm(3)
except RuntimeError as error:
    assert "several processes need mpi4py" in str(error) and "gpu-layers[mpi]" in str(error), error
else:
    raise AssertionError("no error")
"""
    environment = {"OMPI_COMM_WORLD_SIZE": "2", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
