"""The model of time: a copy is a copy, and what is too much of anything is slower by as much."""

import math
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("cupy")

from gpu_layers.catalogue import OPERATIONS
from profiling.cases import Case
from profiling.devices import GPUS
from profiling.machine import execute
from profiling.model import (
    ACCESS,
    ACCESSED,
    CACHED,
    IDLE,
    ISSUE,
    ISSUED,
    LAUNCH,
    MEMORY,
    WAITING,
    Counted,
    compiled,
    copy_seconds,
    count_launch,
    launch_time,
    predict,
    timed,
)
from profiling.traffic import Launch, launches_of
from tests.profiling import sources

H200 = GPUS["H200"]
THREADS = (256, 1, 1)


def counted(source, name, folder, blocks, values, moved, threads=THREADS):
    """A launch of a kernel of the tests' own; a few of its blocks are executed."""
    kernel, grid = sources.compiled(source, name, folder), (blocks, 1, 1)
    chosen = range(min(blocks, 8))
    execution = execute(kernel, grid, threads, values, blocks=chosen)
    return Counted(Launch(None, grid, threads, 0, False, {}, values), kernel, moved, execution)


def arrays(count):
    return [np.zeros(count, np.uint32), np.zeros(count, np.uint32)]


def copied(folder, blocks):
    size = 16 * 512 * blocks
    return counted(sources.COPY, "copy", folder, blocks, arrays(size // 4), 2 * size), 2 * size


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_a_plain_copy_is_a_copy(gpu, tmp_path):
    launch, size = copied(tmp_path, 24_000)  # 393 MB
    prediction = timed([launch], size, gpu)
    # Its reads take as long as a part of the memory's time, and the two do not overlap wholly.
    assert prediction.fraction == pytest.approx(1.0, abs=0.03)
    assert prediction.limit == MEMORY
    assert prediction.seconds == pytest.approx(size / gpu.copy_rate, rel=0.08)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_an_addition_shaped_as_pytorchs_keeps_the_memory_busy(gpu, tmp_path):
    """A point outside of this project: large additions of PyTorch run at the memory's rate.

    Triton's tutorial on vector addition has its own kernel and PyTorch's level there, from 16 million elements on. The
    model leaves out what a copy is not: a third stream of addresses.
    """
    blocks = 100_000
    values = [np.zeros(512 * blocks, np.float32) for _ in range(3)]
    launch = counted(
        sources.ADD, "add", tmp_path, blocks, [*values, np.int32(512 * blocks)], 12 * 512 * blocks, (128, 1, 1)
    )
    prediction = timed([launch], 12 * 512 * blocks, gpu)
    assert prediction.limit == MEMORY
    assert 0.9 <= prediction.fraction <= 1.02


def test_the_rates_are_those_that_are_documented():
    # 132 multiprocessors x 128 lanes x 1.98 GHz, over 4.26 and 3.0 TB/s.
    assert GPUS["H200"].instructions_per_byte == pytest.approx(7.85, abs=0.01)
    assert GPUS["H100"].instructions_per_byte == pytest.approx(11.1, abs=0.1)
    # Little: 48 KB of each of 132 multiprocessors, at 4.26 TB/s.
    assert H200.latency == pytest.approx(1.49e-6, rel=0.01)


@pytest.mark.parametrize("rounds", [200, 400])
def test_instructions_take_their_time(rounds, tmp_path):
    blocks = 20 * 132 * 8
    values = [*arrays(4 * 256 * blocks), np.int32(rounds)]
    launch = counted(sources.WORK, "work", tmp_path, blocks, values, 2 * 16 * 256 * blocks)
    time = launch_time(launch, H200)
    assert time.limit == ISSUE
    # A round is 3 instructions or more, and all lanes work.
    assert launch.thread_instructions > 3 * rounds * 256 * blocks
    expected = launch.thread_instructions / (ISSUED * 132 * 128 * 1.98e9)
    assert time.seconds == pytest.approx(LAUNCH + expected, rel=0.01)


def test_accesses_take_their_time(tmp_path):
    """Each lane's value lies in a line of its own, and all lines are read again and again."""
    source = """
    extern "C" __global__ void gather(const int* x, int* y, int rounds) {
        int sum = 0;
        for (int round = 0; round < rounds; ++round) sum += x[(threadIdx.x * 32 + round) % 8192];
        y[blockIdx.x * blockDim.x + threadIdx.x] = sum;
    }"""
    blocks, rounds = 132 * 8, 64
    values = [np.zeros(8192, np.int32), np.zeros(256 * blocks, np.int32), np.int32(rounds)]
    launch = counted(source, "gather", tmp_path, blocks, values, 0)
    assert launch.execution.pipe_cycles == launch.execution.blocks * (256 * rounds + 8)
    time = launch_time(launch, H200)
    assert time.limit == ACCESS
    cycles = 8 * (256 * rounds + 8)
    assert cycles / (ACCESSED * 1.98e9) < time.seconds - LAUNCH < 1.3 * cycles / (ACCESSED * 1.98e9)


def test_idle_lanes_are_issued_too(tmp_path):
    values = [*arrays(4 * 256), np.int32(100)]
    whole = counted(sources.WORK, "work", tmp_path, 1, values, 0, (32, 1, 1))
    single = counted(sources.WORK, "work", tmp_path, 1, values, 0, (1, 1, 1))
    assert single.thread_instructions == whole.thread_instructions


def test_reads_one_after_the_other_take_their_time(tmp_path):
    following = np.roll(np.arange(32 * 64, dtype=np.int32), -64)
    values = [following, np.zeros(32, np.int32), np.int32(100)]
    launch = counted(sources.CHAIN, "chain", tmp_path, 1, values, 0, (32, 1, 1))
    # 64 steps around; a few share sectors with others. Then everything has been read before.
    execution = launch.execution
    assert execution.trips + execution.cached_trips == 100
    time = launch_time(launch, H200)
    assert time.limit == WAITING
    idle = execution.trips * IDLE * H200.latency + execution.cached_trips * CACHED
    assert time.seconds == pytest.approx(LAUNCH + idle, rel=1e-3)


def test_a_last_round_of_few_blocks_takes_a_whole_round(tmp_path):
    launch, _ = copied(tmp_path, 132)
    held = launch.resident(H200) * 132

    def blocks(count):
        other = replace(launch, launch=replace(launch.launch, grid=(count, 1, 1)), moved=16_384.0 * count)
        return launch_time(other, H200).seconds

    whole, one_more = blocks(4 * held) - LAUNCH, blocks(4 * held + 1) - LAUNCH
    assert one_more == pytest.approx(whole + IDLE * H200.latency, rel=0.05)


def test_a_memory_that_is_busy_answers_later(tmp_path):
    # Of one block in flight a multiprocessor asks for 8 KB at a time, of the 48 KB that keep the memory busy.
    launch, size = copied(tmp_path, 132 * 50)
    narrow = replace(launch, launch=replace(launch.launch, shared_bytes=200 * 1024))
    assert narrow.resident(H200) == 1
    time = launch_time(narrow, H200)
    assert time.limit == WAITING
    rounds, memory = 50, size / 50 / H200.copy_rate
    # t = idle + (loaded - idle) * memory / t
    idle, loaded = IDLE * H200.latency, H200.latency
    t = (idle + math.sqrt(idle**2 + 4 * (loaded - idle) * memory)) / 2
    assert rounds * t < time.seconds - LAUNCH < 1.1 * rounds * t


def test_a_call_is_the_sum_of_its_launches(tmp_path):
    launch, size = copied(tmp_path, 24_000)
    two = timed([launch, launch], size, H200)
    assert two.seconds == pytest.approx(2 * launch_time(launch, H200).seconds)
    assert two.fraction == pytest.approx(1 / 2, rel=0.03)


def _launches(name, shape, dtype="bfloat16", channels_last=False, direction="forward"):
    operation = next(one for one in OPERATIONS if one.name == name)
    return launches_of(Case(operation, direction, shape, dtype, channels_last), filled=True)


@pytest.mark.parametrize(
    ("name", "shape", "channels_last"),
    [
        ("dropout", (1024, 1021), False),
        ("batch_norm_inference", (24, 40, 31, 29), False),
        ("max_pool", (16, 48, 41, 37), True),
        ("lp_pool", (8, 16, 39, 33), False),
    ],
)
def test_a_sample_of_blocks_counts_as_all_of_them_do(name, shape, channels_last):
    for launch in _launches(name, shape, channels_last=channels_last):
        sample = count_launch(launch, 0.0)
        whole = execute(
            compiled(launch.kernel), launch.grid, launch.block, launch.values, dynamic_shared=launch.shared_bytes
        )
        assert sample.execution.blocks < whole.blocks, "the shape is too small to show anything"
        assert sample.thread_instructions == pytest.approx(32 * whole.warp_instructions, rel=0.05)
        assert sample.execution.barriers == pytest.approx(whole.barriers, rel=0.1)


def test_an_operation_of_the_benchmark():
    prediction = predict("relu", (2048, 1024))
    # 8 MB, and a bit an element, take 2 us, in which a launch and a read count.
    n = 2048 * 1024
    assert prediction.copy_seconds == copy_seconds(2 * 2 * n + n // 8)
    assert 0.5 < prediction.fraction <= 1.01
    assert prediction.gpu is H200
    slower = predict("relu", (2048, 1024), gpu="H100")
    assert slower.seconds > prediction.seconds


def test_bad_usage():
    with pytest.raises(ValueError, match="there is no operation 'relu6' forward: there are dropout"):
        predict("relu6", (8, 8))
    with pytest.raises(ValueError, match="there is no operation 'batch_norm_inference' backward"):
        predict("batch_norm_inference", (8, 8), direction="backward")
    with pytest.raises(ValueError, match="gpu must be one of A100, H100, H200, B200, got 'V100'"):
        predict("relu", (8, 8), gpu="V100")
