"""Programs by the steps that they take on a GPU, on a stand-in whose GPUs are emulated: the bits of NumPy arrays."""

import gc
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers import kernels
from gpu_layers.core.batch_norm_saved import BatchNormSaved
from gpu_layers.core.mask import DropoutMask
from gpu_layers.core.running import RunningStatistics
from gpu_layers.core.valid import ValidPositions
from gpu_layers.core.window import sliding_window
from gpu_layers.kernels.batch_norm_plan import backward_plan, forward_plan
from gpu_layers.runtime import arrays, gpu, nvrtc
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.program import Launcher
from gpu_layers.runtime.steps import Launch, Slot
from tests.inputs import BFLOAT16, WRITABLE_LAYOUTS, assert_same_bits, normal
from tests.runtime.emulated_device import KERNELS, Array, EmulatedCupy
from tests.runtime.fake_cupy import nothing_loaded


@pytest.fixture
def cupy(monkeypatch):
    stand_in = EmulatedCupy()
    for module in (gpu, arrays):
        monkeypatch.setattr(module, "import_cupy", lambda: stand_in)
    monkeypatch.setattr(gpu, "architecture_for", nvrtc.Architecture)
    compiled = lambda source, names, architecture: SimpleNamespace(path=source, symbols={n: n for n in names})  # noqa: E731
    monkeypatch.setattr(gpu, "compiled_module", compiled)
    monkeypatch.setitem(arrays.KINDS, Array, arrays.CupyArrays())
    with nothing_loaded():
        yield stand_in


X = normal((6, 2, 48, 40), np.float32, 1)
DY = normal(X.shape, np.float32, 2)
OF_CHANNELS = {"gamma": normal((2,), np.float32, 3), "beta": normal((2,), np.float32, 4)}
RUNNING = {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32), "batches": np.zeros(1, np.int64)}


def dropout(x, out):
    mask = DropoutMask(2**31, 2**63 + 5, 2**64 - 1, 3)
    return [kernels.dropout_forward(x, mask, 2.0), kernels.dropout_forward(x, mask, 2.0, out=out), out]


def batch_norm(x, dy, gamma, beta, mean, var, batches, out, activation):
    running = RunningStatistics(mean, var, batches, 0.3, 6 * 48 * 40)
    forward = kernels.batch_norm_forward(x, gamma, beta, 1e-5, activation=activation, running=running, out=out)
    y, statistics = forward
    backward = kernels.batch_norm_backward(dy, BatchNormSaved(x, statistics, activation=activation))
    kernels.batch_norm_fold(statistics, RunningStatistics(mean, var, batches, None, 7))
    return [y, statistics, *backward[:3], mean, var, batches, out]


def max_pool(x, out):
    window = sliding_window((3, 3), (2, 2), (1, 1), (1, 1), (1, 1), False, (48, 40))
    y, taps = kernels.max_pool_forward(x, window)
    return [y, taps, kernels.max_pool_backward(y, taps, window, out=out), out]


def avg_pool_of_lengths(x, lengths):
    window = sliding_window((3, 2), (2, 2), (1, 1), (1, 0), (1, 0), False, (48, 40))
    y = kernels.avg_pool_forward(x, window, lengths=lengths)
    return [y, kernels.avg_pool_backward(y, window, lengths=lengths)]


def padded_batch_norm(x, gamma, beta, lengths):
    """Two forwards: positions are packed in the first."""
    valid = ValidPositions((6, 48, 40), lengths, None, 0, int(lengths.prod(1).sum()), kernels.valid_words)
    forwards = [kernels.batch_norm_forward(x, gamma, beta, 1e-5, valid=valid) for _ in range(2)]
    return [*forwards[0], *forwards[1], valid.words(x)]


LENGTHS = np.array([[48, 40], [9, 7], [0, 3], [5, 5], [48, 1], [47, 39]])
CASES = {
    "dropout": (dropout, {"x": X, "out": np.zeros_like(X)}),
    "batch norm": (
        lambda **of: batch_norm(**of, activation="relu"),
        {"x": X, "dy": DY, **OF_CHANNELS, **RUNNING, "out": np.zeros_like(X)},
    ),
    "batch norm, two reads": (
        lambda **of: batch_norm(**of, activation="gelu"),
        {"x": X, "dy": DY, **OF_CHANNELS, **RUNNING, "out": np.zeros_like(X)},
    ),
    "max pool": (max_pool, {"x": X.astype(BFLOAT16), "out": np.zeros(X.shape, BFLOAT16)}),
    "avg pool of lengths": (avg_pool_of_lengths, {"x": X, "lengths": LENGTHS}),
    "padded batch norm": (partial(padded_batch_norm, lengths=LENGTHS), {"x": X, **OF_CHANNELS}),
}


def _numpy_results(run, inputs):
    with gl.use_backend("emulated"):
        return [np.ascontiguousarray(one) for one in run(**inputs)]


def placed(cupy, values, layout=None):
    """On the current GPU, there as WRITABLE_LAYOUTS has it in the host's memory."""
    if layout in (None, "contiguous"):
        return cupy.asarray(values)
    if layout == "off_by_a_byte":
        wide = cupy.asarray(np.zeros(values.nbytes + 1, np.uint8))
        array = wide.view(lambda base: base[1:].view(values.dtype).reshape(values.shape))
    else:
        like = WRITABLE_LAYOUTS[layout](values)
        base = like
        while isinstance(base.base, np.ndarray):
            base = base.base
        place = like.ctypes.data - base.ctypes.data
        memory = cupy.asarray(np.zeros(base.nbytes, np.uint8))
        array = memory.view(lambda of: np.ndarray(like.shape, like.dtype, of, place, like.strides))
    array.values[...] = values
    return array


@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_numpy_arrays(cupy, name, layout):
    run, inputs = CASES[name]
    expected = _numpy_results(run, {key: values.copy() for key, values in inputs.items()})
    # Current is one GPU, and the arrays are on another one.
    for device, current in ((0, 0), (1, 1), (1, 0)):
        with cupy.cuda.Device(device):
            given = {key: placed(cupy, values, layout) for key, values in inputs.items()}
        with cupy.cuda.Device(current), cupy.stream(8 + current):
            # Memory is given back when it is used no more, and so are addresses.
            gc.collect()
            results = run(**given)
        assert {of for _, of in cupy.launched} == {device}
        cupy.launched.clear()
        for number, (one, other) in enumerate(zip(results, expected, strict=True)):
            assert one.data.device_id == device
            assert_same_bits(np.ascontiguousarray(one.values), other, f"{number} on {device}")


def test_the_cases_take_every_way(cupy):
    """Groups of blocks that wait for each other, and workspace of two reads; else the cases show little."""
    assert all(plan(X.shape, 4, False).blocks_per_group > 1 for plan in (forward_plan, backward_plan))
    for name in ("batch norm", "batch norm, two reads"):
        run, inputs = CASES[name]
        run(**{key: cupy.asarray(values) for key, values in inputs.items()})
    names = {kernel.split("<")[0] for kernel, _ in cupy.launched}
    assert {f"batch_norm_{one}_persistent" for one in ("forward", "backward")} <= names
    assert {f"batch_norm_merge_{one}" for one in ("statistics", "gradients")} <= names


def test_a_refused_launch_is_made_without_waiting_blocks(cupy):
    run, inputs = CASES["batch norm"]
    expected = _numpy_results(run, {key: values.copy() for key, values in inputs.items()})
    cupy.refuses = True
    for _ in range(2):
        results = run(**{key: cupy.asarray(values) for key, values in inputs.items()})
        for one, other in zip(results, expected, strict=True):
            assert_same_bits(one.values, other)
    assert not any("_persistent<" in name for name, _ in cupy.launched)


@pytest.mark.parametrize("name", CASES)
def test_a_known_call_asks_the_driver_for_launches_alone(cupy, monkeypatch, name):
    """So that it can be captured: nothing is loaded, nothing asked, and a launch is asynchronous."""
    run, inputs = CASES[name]
    given = {key: cupy.asarray(values) for key, values in inputs.items()}
    run(**given)

    def refuse(*_, **__):
        raise AssertionError("asked for while a graph may be captured")

    monkeypatch.setattr(cupy.cuda.driver, "occupancyMaxActiveBlocksPerMultiprocessor", refuse)
    monkeypatch.setattr(cupy, "RawModule", refuse)
    launched = len(cupy.launched)
    run(**given)
    assert len(cupy.launched) == 2 * launched


def test_arrays_of_two_gpus_are_refused(cupy):
    x = cupy.asarray(X)
    with cupy.cuda.Device(1):
        out = cupy.asarray(X)
    with pytest.raises(ValueError, match=r"must all be on one device, got \[0, 1\]"):
        kernels.relu_forward(x, out)
    assert not cupy.launched


def test_a_program_is_of_one_kind_of_arrays(cupy):
    """Their signatures are otherwise alike: True, of a NumPy array that may be written to, is 1, of a second GPU."""
    frozen = X.copy()
    frozen.flags.writeable = False
    mask = DropoutMask(2**31, 1, 2)
    with gl.use_backend("emulated"):
        expected = [kernels.dropout_forward(x, mask, 2.0) for x in (X, frozen)]
    for device, of_numpy in enumerate(expected):
        with cupy.cuda.Device(device):
            result = kernels.dropout_forward(cupy.asarray(X), mask, 2.0)
        assert type(result) is Array
        assert_same_bits(result.values, of_numpy)


def test_what_a_call_allocated_goes_with_its_results(cupy):
    run, inputs = CASES["batch norm, two reads"]
    given = {key: cupy.asarray(values) for key, values in inputs.items()}
    run(**given)
    gc.collect()
    held = len(cupy.memories)
    results = run(**given)
    gc.collect()
    own = {array.data.memory.ptr for array in results} - {array.data.memory.ptr for array in given.values()}
    assert len(cupy.memories) == held + len(own)


def test_what_the_library_computes_of_may_be_nobodys_result(cupy):
    @Launcher
    def relu_twice(operands, numbers):
        (x,) = operands
        y = kernels.arrays.empty(x.shape, x.dtype, x)
        bits = kernels.arrays.empty((-(-x.size // 8),), np.uint8, x)
        launch(KERNELS["relu_forward<float>"], 1, 256, (x, y, bits, x.size))
        return x.program.compute(lambda xp, of: xp.ascontiguousarray(of), [y], x.shape, x.dtype)

    assert_same_bits(relu_twice((cupy.asarray(X),)).values, np.maximum(X, 0))


def test_small_arrays_share_memory_and_large_ones_do_not(cupy):
    @Launcher
    def allocated(operands, numbers):
        sizes = ((3, 5), (64, 1024), (7,), (0,), (2, 2))
        return tuple([operands[0].program.allocate(shape, np.float32, zeroed=shape[0] == 7) for shape in sizes])

    memset, cleared = cupy.cuda.runtime.memsetAsync, []
    cupy.cuda.runtime.memsetAsync = lambda *given: (cleared.append(given[2]), memset(*given))
    for _ in range(2):
        first, large, zeros, empty, last = allocated((cupy.asarray(X),))
        assert first.data.memory is zeros.data.memory is empty.data.memory is last.data.memory
        assert large.data.memory is not first.data.memory
        assert not zeros.values.any()
        assert np.isnan(first.values).all()
        assert np.isnan(last.values).all()
        assert all(array.data.ptr % 256 == 0 for array in (first, large, zeros, last))
        assert len({array.data.ptr for array in (first, zeros, last)}) == 3
    assert cleared == [256] * 2


def test_what_programs_are_of():
    """Of the kind, as read of an array; what a record may not see is no part of it."""
    kind, stand_in = arrays.CupyArrays(), EmulatedCupy()
    base = stand_in.asarray(np.zeros(64, np.uint8))
    alike = [base.view(lambda of, at=at: of[at : at + 16].view(np.float32).reshape(2, 2)) for at in (0, 16)]
    other = [
        alike[0].view(lambda of: of.T),
        alike[0].view(lambda of: of.view(np.int32)),
        alike[0].view(lambda of: of.reshape(4)),
        base.view(lambda of: of[4:20].view(np.float32).reshape(2, 2)),
    ]
    with stand_in.cuda.Device(1):
        other.append(stand_in.asarray(np.zeros((2, 2), np.float32)))
    signatures = [kind.read((array,))[0] for array in (alike[0], *other)]
    assert kind.read((alike[1], None)) == ((*signatures[0], None), [alike[1].data.ptr, 0])
    assert len(set(signatures)) == len(signatures)
    assert [kind.is_ready(array) for array in (*alike, *other)] == [True, True, False, True, True, False, True]


def test_calls_of_threads_do_not_mix_their_arguments(cupy, monkeypatch):
    """A launch lets other threads run, until the driver has copied what it was given."""
    kernel = KERNELS["advance_rng_state<unsigned long long>"]
    step = Launch(kernel, (1, 1, 1), (1, 1, 1), (Slot(0), Slot(1), Slot(2)), 0, False)
    draws = [[cupy.asarray(np.full(3, number, np.uint64)) for _ in range(3)] for number in (1, 2)]
    slots = [[array.data.ptr for array in of] for of in draws]
    launch, threads = cupy._launch, []

    def launch_while_another_begins(*arguments):
        if not threads:
            threads.append(threading.Thread(target=start, args=(None, slots[1], None)))
            threads[0].start()
            threads[0].join()
        launch(*arguments)

    monkeypatch.setattr(cupy, "_launch", launch_while_another_begins)
    start = gpu.bound_launches([step], 3, 0)
    start(None, slots[0], None)
    threads[0].join()
    for number, (rng_state, following, taken) in enumerate(draws, 1):
        assert taken.values.tolist() == rng_state.values.tolist() == [number] * 3
        assert following.values.tolist() == [number, number + 1, number]
