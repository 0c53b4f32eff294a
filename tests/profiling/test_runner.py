"""Cases run, checked and timed, on the emulated device; what goes wrong becomes a note."""

import os
from dataclasses import replace

import numpy as np
import pytest

from gpu_layers.catalogue import OPERATIONS
from gpu_layers.catalogue.activation import RELU
from gpu_layers.catalogue.batch_norm import BATCH_NORM
from gpu_layers.catalogue.batch_norm_max_pool import BATCH_NORM_RELU_MAX_POOL
from gpu_layers.catalogue.dropout import DROPOUT
from gpu_layers.catalogue.pooling import MAX_POOL
from profiling.bench import Effort, Runner, copy_bandwidth
from profiling.cases import Case, InputMaker, all_cases
from profiling.devices import EmulatedDevice
from profiling.implementations import (
    CompiledTorch,
    Copy,
    CuPy,
    Jax,
    NotThereError,
    Ours,
    Torch,
    TwoReads,
    error_ratio,
    expected,
    parts,
)
from profiling.traffic import listed_launches

SHORT = Effort(samples=3, seconds=0.01)
TOYS = list({str(c.toy()): c.toy() for c in all_cases(OPERATIONS, ("float32",))}.values())
# That a half type passes through each library as it should, once.
HALF_TOYS = [Case(operation, operation.passes[-1], (2, 8, 9, 10), "bfloat16") for operation in (BATCH_NORM, MAX_POOL)]


def runner(*peers, device=None):
    return Runner(device or EmulatedDevice(), peers, SHORT, block=2**12)


@pytest.mark.parametrize("case", TOYS + HALF_TOYS, ids=str)
def test_every_case_is_right_and_pytorch_and_the_expression_agree(case):
    row = runner(Copy, Torch, CuPy).run(case)
    assert row.correct, row.notes
    assert 0 <= row.error <= 1
    assert {"ours", "copy"} | ({"torch"} if case.operation.torch else set()) <= row.timings.keys()
    assert [note for note in row.notes if "other results" in note] == []
    assert all(timing.median > 0 and timing.samples == 3 for timing in row.timings.values())


@pytest.mark.parametrize("case", [case for case in TOYS if case.operation.jax], ids=str)
def test_jax_agrees(case):
    pytest.importorskip("jax", reason="JAX: not installed")
    row = runner(Jax).run(case)
    assert row.missing == {}
    assert row.notes == []
    assert row.timings["jax"].clock == "host"


@pytest.mark.slow
@pytest.mark.skipif(
    "GPU_LAYERS_SLOW_TESTS" not in os.environ, reason="slow: compiles for minutes; GPU_LAYERS_SLOW_TESTS=1 runs it"
)
@pytest.mark.parametrize("case", TOYS, ids=str)
def test_compiled_pytorch_agrees(case):
    row = runner(CompiledTorch).run(case)
    assert row.missing == {}
    assert row.notes == []


def wrong(case, change):
    operation = case.operation

    def forward(arrays, channels_last):
        y, saved = operation.forward(arrays, channels_last)
        return (change(y) if arrays["x"].dtype != np.float64 else y), saved

    return replace(case, operation=replace(operation, forward=forward))


def last_element_missing(y):
    y.reshape(-1)[-1] = np.nan
    return y


@pytest.mark.parametrize("change", [last_element_missing, lambda y: y + y * 1e-4, lambda y: y[:1]])
@pytest.mark.parametrize("operation", [DROPOUT, BATCH_NORM, MAX_POOL])
def test_wrong_results_are_not_timed(operation, change):
    row = runner(Torch).run(wrong(Case(operation, "forward", (2, 8, 9, 10), "float32"), change))
    assert row.correct is False
    assert row.timings == {}
    assert "WRONG" in row.notes[0] or "failed" in row.notes[0]


def test_an_exception_of_ours_is_a_failed_row():
    def forward(arrays, channels_last):
        raise RuntimeError("launch failed")

    case = Case(replace(RELU, forward=forward), "forward", (6, 40), "float32")
    row = runner().run(case)
    assert row.correct is False
    assert row.notes == ["failed: RuntimeError: launch failed"]


def test_a_peer_that_fails_is_missing_and_says_why():
    def torch(functional, tensors):
        raise NotImplementedError("no such kernel")

    class Absent(Torch):
        name = "absent"

        def __init__(self, case, device):
            raise NotThereError("absent is not installed")

    case = Case(replace(RELU, torch=torch), "forward", (6, 40), "float32")
    row = runner(Torch, Absent, CuPy).run(case, lambda peer: "not today" if peer is CuPy else None)
    assert row.correct
    assert set(row.timings) == {"ours"}
    assert row.missing == {
        "torch": "NotImplementedError: no such kernel",
        "absent": "absent is not installed",
        "cupy": "not today",
    }


def test_a_peer_that_computes_something_else_is_marked():
    case = Case(replace(RELU, torch=lambda functional, t: functional.gelu(t["x"])), "forward", (6, 40), "float32")
    assert runner(Torch).run(case).notes == ["torch gives other results"]


class SmallDevice(EmulatedDevice):
    def free_bytes(self):
        return 400_000


def test_shapes_are_reduced_where_memory_is_small():
    row = runner(device=SmallDevice()).run(Case(RELU, "forward", (64, 8, 9, 10), "float32"))
    assert row.correct
    assert row.asked == [64, 8, 9, 10]
    assert row.shape[0] < 64
    assert row.notes == ["reduced from 64x8x9x10: too little memory"]
    assert row.floor_bytes == 8 * row.shape[0] * 720 + row.shape[0] * 720 // 8
    row = runner(device=SmallDevice()).run(Case(RELU, "forward", (2, 8, 90, 100), "float32"))
    assert row.timings == {}
    assert "not run" in row.notes[0]


class CachingDevice(EmulatedDevice):
    l2_bytes = 100_000


def test_buffers_exceed_four_times_the_cache():
    case = Case(RELU, "forward", (6, 40), "float32")
    count = runner(device=CachingDevice())._buffers(case)
    assert count * 2 * 6 * 40 * 4 > 4 * 100_000
    assert runner()._buffers(case) == 2


def test_inputs_are_random_and_no_two_sets_are_equal():
    maker = InputMaker(EmulatedDevice(), block=5000)
    sets = [maker.inputs(Case(BATCH_NORM, "backward", (4, 30, 10, 10), "bfloat16")) for _ in range(3)]
    for arrays in sets:
        x = arrays["x"].astype(np.float64)
        assert abs(x.mean()) < 0.05
        assert 0.95 < x.std() < 1.05
        assert (x == 0).mean() < 0.01
        assert not np.array_equal(arrays["x"], arrays["dy"])
        assert arrays["gamma"].dtype == np.float32
    assert not np.array_equal(sets[0]["x"], sets[1]["x"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_what_a_maximum_is_taken_of_is_equal_or_apart(dtype):
    case = Case(BATCH_NORM_RELU_MAX_POOL, "backward", (4, 30, 10, 10), dtype)
    arrays = InputMaker(EmulatedDevice(), block=5000).inputs(case)
    # Normalised by mean 0 and standard deviation 1, as good as what a batch has.
    x, gamma, beta = (arrays[name].astype(np.float64) for name in ("x", "gamma", "beta"))
    assert 0.95 < x.std() < 1.05
    for channel in range(30):
        exact = np.unique(x[:, channel])
        rounded = (exact * gamma[channel] + beta[channel]).astype(arrays["x"].dtype)
        assert len(np.unique(rounded)) == len(exact) > 10


def test_a_gradient_that_is_rounded_on_its_way_has_a_larger_bound():
    case = Case(BATCH_NORM_RELU_MAX_POOL, "backward", (4, 3, 10, 10), "bfloat16")
    reference = np.array([4.0, -0.5])
    # In units of the distance of 1 and the next number.
    within = reference + np.array([8.0, 8.0]) * 2.0**-7
    assert error_ratio(case, "dx", within, reference) < 1.1
    assert error_ratio(case, "dx", reference + 0.25, reference) > 2
    assert error_ratio(replace(case, operation=BATCH_NORM), "dx", within, reference) > 2


def test_parts_reach_both_ends(monkeypatch):
    monkeypatch.setattr("profiling.implementations._PART", 100)
    assert [part.label for part in parts(Case(DROPOUT, "forward", (6, 40), "float32"))] == [
        "elements 0 to 100",
        "elements 140 to 240",
    ]
    assert [part.label for part in parts(Case(MAX_POOL, "forward", (5, 2, 4, 4), "float32"))] == [
        "images 0 to 3",
        "images 2 to 5",
    ]
    assert [part.label for part in parts(Case(BATCH_NORM, "forward", (5, 7, 4, 4), "float32", True))] == [
        "channels 0 to 1",
        "channels 6 to 7",
    ]


@pytest.mark.parametrize("case", TOYS, ids=str)
def test_a_part_is_computed_as_within_the_whole(case, monkeypatch):
    device = EmulatedDevice()
    inputs = InputMaker(device, block=2**12).inputs(case)
    ours = Ours(case, device)
    with device.activate():
        results = ours.results(ours.prepare(inputs)())
    monkeypatch.setattr("profiling.implementations._PART", 100)
    for part in parts(case):
        for name, reference in expected(case, part, inputs, np.asarray).items():
            assert error_ratio(case, name, part.take_result(name, results[name]), reference) <= 1


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_two_reads_are_other_kernels_with_the_same_bits(direction, channels_last):
    case = Case(BATCH_NORM, direction, (3, 8, 9, 10), "float32", channels_last)
    device = EmulatedDevice()
    arrays = InputMaker(device, block=2**12).inputs(case)
    results, kernels = [], []
    for cls in (Ours, TwoReads):
        implementation = cls(case, device)
        with device.activate():
            call = implementation.prepare(arrays)
            results.append(implementation.results(call()))
        with listed_launches() as launches:
            call()
        kernels.append([launch.kernel.name.split("<")[0] for launch in launches])
    assert ["persistent" in name for name in kernels[0]] == [True]
    assert len(kernels[1]) >= 2
    assert not any("persistent" in name for name in kernels[1])
    for name, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][name])


def test_two_reads_are_for_batch_norm_that_could_do_with_one():
    with pytest.raises(NotThereError, match="measured for plain batch norm"):
        TwoReads(Case(RELU, "forward", (6, 40), "float32"), EmulatedDevice())
    with pytest.raises(NotThereError, match="ours reads twice too"):
        TwoReads(Case(BATCH_NORM, "forward", (256, 64, 112, 112), "bfloat16", True), EmulatedDevice())


def test_copy_bandwidth():
    assert copy_bandwidth(EmulatedDevice(), 2**20, SHORT) > 0.1
