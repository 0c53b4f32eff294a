"""Machine code executed without a GPU: it writes the right bits, and its instructions are counted exactly."""

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("cupy")

from gpu_layers.catalogue import OPERATIONS
from gpu_layers.runtime.backend import use_executor
from gpu_layers.runtime.emulation import Emulation
from profiling.cases import Case, InputMaker, call_of
from profiling.devices import EmulatedDevice
from profiling.instructions import UnknownInstructionError
from profiling.machine import MachineError, execute
from profiling.model import compiled as project_kernel
from tests.inputs import BFLOAT16
from tests.profiling.sources import CHAIN, COPY, compiled

BLOCK = (256, 1, 1)


class _Both:
    """Emulates every launch, and executes its machine code on copies of its arrays."""

    def __init__(self):
        self.launches = 0

    def launch(self, kernel, grid, block, values, shared_bytes, cooperative):
        copies = [v.copy() if isinstance(v, np.ndarray) and v.ndim else v for v in values]
        Emulation().launch(kernel, grid, block, values, shared_bytes, cooperative)
        execute(project_kernel(kernel), grid, block, copies, dynamic_shared=shared_bytes)
        for parameter, ours, theirs in zip(kernel.parameters, copies, values, strict=True):
            if parameter.is_pointer and theirs is not None:
                assert ours.tobytes() == theirs.tobytes(), f"{kernel}: {parameter.name}"
        self.launches += 1


def _named(name):
    return next(operation for operation in OPERATIONS if operation.name == name)


# GELU in float32 is left out: the emulator takes the host's erf. float64 too: a fused sum there is not exact here.
@pytest.mark.parametrize(
    ("name", "dtype", "channels_last"),
    [
        ("dropout", "bfloat16", False),
        ("relu_dropout", "float32", False),
        ("activation_dropout", "float16", False),
        ("channel_dropout", "bfloat16", False),
        ("dropout_moments", "bfloat16", False),
        ("batch_norm", "bfloat16", False),
        ("batch_norm", "float32", True),
        ("batch_norm_relu_max_pool", "bfloat16", False),
        ("batch_norm_relu_max_pool", "float16", True),
        ("max_pool", "bfloat16", False),
        ("avg_pool", "float32", True),
        ("global_avg_pool", "bfloat16", False),
        ("lp_pool", "bfloat16", False),
        ("pyramid_max_pool", "bfloat16", False),
        ("pyramid_max_pool", "float16", True),
        ("fractional_max_pool", "bfloat16", False),
        ("fractional_max_pool", "float32", True),
    ],
)
def test_it_writes_the_bits_that_the_emulated_source_writes(name, dtype, channels_last):
    # Of what is fused the kernels are for whole vectors.
    shapes = {"dropout_moments": (7, 45), "batch_norm_relu_max_pool": (3, 16, 7, 16)}
    shape = shapes.get(name, (3, 10, 7, 9))
    operation = _named(name)
    for direction in operation.passes:
        case = Case(operation, direction, shape, dtype, channels_last)
        inputs = InputMaker(EmulatedDevice(), block=2**12).inputs(case)
        with use_executor(Emulation()):
            call = call_of(case, inputs)
        both = _Both()
        with use_executor(both):
            call()
        assert both.launches


def test_instructions_of_a_straight_line_are_those_of_its_warps(tmp_path):
    kernel = compiled(COPY, "copy", tmp_path)
    x, y = np.arange(3 * 4 * 512, dtype=np.uint32), np.zeros(3 * 4 * 512, np.uint32)
    execution = execute(kernel, (3, 1, 1), BLOCK, [x, y])
    assert (y == x).all()
    end = next(i for i, one in enumerate(kernel.instructions) if one.mnemonic == "EXIT")
    warps = 3 * 256 // 32
    assert (execution.executed[: end + 1] == warps).all()
    assert not execution.executed[end + 1 :].any()
    assert execution.warp_instructions == (end + 1) * warps
    # Both loads are on their way before the first store needs one of them; all of x is read once.
    assert (execution.trips, execution.cached_trips, execution.loaded_bytes) == (1, 0, pytest.approx(x.nbytes, abs=64))
    # Each line is read and written once.
    assert execution.pipe_cycles == 2 * x.nbytes // 128


def test_lanes_that_part_are_counted_one_way_after_the_other(tmp_path):
    source = """
    extern "C" __global__ void part(const int* rounds, int* y) {
        int sum = 0;
    #pragma unroll 1
        for (int round = 0; round < rounds[threadIdx.x]; ++round) sum += __float2int_rn(rsqrtf(sum + round + 1.0f)) + 1;
        y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, sum, 1);
    }"""
    kernel = compiled(source, "part", tmp_path)
    rounds, y = np.zeros(32, np.int32), np.zeros(32, np.int32)
    rounds[[3, 17, 30]] = 5, 2, 9
    execution = execute(kernel, (1, 1, 1), (32, 1, 1), [rounds, y])
    square_roots = [n for one, n in zip(kernel.instructions, execution.executed, strict=True) if "RSQ" in one.opcode]
    assert sum(square_roots) == 9  # as often as the lane with most rounds, for the whole warp
    # The neighbours have the sums, which only lanes that met again can hand over.
    assert np.nonzero(y)[0].tolist() == [2, 16, 31]


@pytest.mark.parametrize(("kind", "infinity"), [("f16x2", 0x7C00), ("bf16x2", 0x7F80)])
def test_the_smaller_of_a_pair_and_infinity(tmp_path, kind, infinity):
    source = f"""
    extern "C" __global__ void smaller(const unsigned int* x, unsigned int* y) {{
        asm("min.{kind} %0, %1, %2;" : "=r"(y[threadIdx.x]) : "r"(x[threadIdx.x]), "r"({infinity * 0x10001}u));
    }}"""
    sign, nan = 0x8000, infinity + 3
    x = np.array([infinity, infinity | sign, nan, nan | sign, 0, sign, 1, infinity - 1], np.uint16).view(np.uint32)
    y = np.zeros_like(x)
    execute(compiled(source, "smaller", tmp_path), (1, 1, 1), (x.size, 1, 1), [x, y])
    # A NaN is not taken.
    assert y.view(np.uint16).tolist() == [infinity, infinity | sign, infinity, infinity, 0, sign, 1, infinity - 1]


@pytest.mark.parametrize(("kind", "dtype"), [("f16x2", np.dtype(np.float16)), ("bf16x2", BFLOAT16)])
def test_sums_of_pairs_are_rounded_once(tmp_path, kind, dtype):
    source = f"""
    extern "C" __global__ void sums(const unsigned int* x, unsigned int* y) {{
        const unsigned int a = x[2 * threadIdx.x], b = x[2 * threadIdx.x + 1];
        asm("add.rn.{kind} %0, %1, %2;" : "=r"(y[threadIdx.x]) : "r"(a), "r"(b));
    }}"""
    limits = ml_dtypes.finfo(dtype)
    ulp, largest, smallest = (float(n) for n in (limits.eps, limits.max, limits.smallest_subnormal))
    sums = [
        (1, ulp / 2, 1),  # ties to even
        (1 + ulp, ulp / 2, 1 + 2 * ulp),
        (-0.0, -0.0, -0.0),
        (0.0, -0.0, 0.0),
        (largest, largest, np.inf),
        (smallest, smallest, 2 * smallest),
        (np.inf, -np.inf, np.nan),
        (np.nan, 1, np.nan),
    ]
    a, b, wanted = (np.array(column).astype(dtype) for column in zip(*sums, strict=True))
    # Halves of a word are two sums.
    x = np.stack([a.view(np.uint32), b.view(np.uint32)], axis=1).ravel()
    y = np.zeros(len(sums) // 2, np.uint32)
    execute(compiled(source, "sums", tmp_path), (1, 1, 1), (y.size, 1, 1), [x, y])
    got = y.view(dtype).astype(np.float64)
    np.testing.assert_array_equal(got, wanted.astype(np.float64))
    assert np.signbit(got[2])
    assert not np.signbit(got[3])


def test_bits_that_are_shifted_from_one_word_into_another(tmp_path):
    source = """
    extern "C" __global__ void shifted(const unsigned int* x, unsigned int* y) {
        const unsigned int low = x[0], high = x[1];
        y[0] = __funnelshift_r(low, high, 16), y[1] = __funnelshift_r(low, high, 8);
        y[2] = __funnelshift_l(low, high, 12), y[3] = static_cast<int>(high) >> 12;
        asm("prmt.b32 %0, %1, 0, 0x9988;" : "=r"(y[4]) : "r"(low));
    }"""
    x, y = np.array([0x89AB4DEF, 0xF1234567], np.uint32), np.zeros(5, np.uint32)
    execute(compiled(source, "shifted", tmp_path), (1, 1, 1), (1, 1, 1), [x, y])
    assert [f"{word:08x}" for word in y] == ["456789ab", "6789ab4d", "3456789a", "ffff1234", "0000ffff"]


def test_the_larger_of_two_doubles(tmp_path):
    source = """
    extern "C" __global__ void larger(const double* x, double* y) {
        const int i = threadIdx.x;
        y[i] = max(x[2 * i], x[2 * i + 1]);
    }"""
    nan = np.nan
    pairs = np.array([(1, 2), (2, 1), (-1, -2), (nan, 3), (3, nan), (nan, nan), (np.inf, 1), (-np.inf, -5)], np.float64)
    y = np.zeros(len(pairs))
    execute(compiled(source, "larger", tmp_path), (1, 1, 1), (len(pairs), 1, 1), [pairs.ravel(), y])
    np.testing.assert_array_equal(y, np.fmax(*pairs.T))


def test_barriers_and_shared_memory(tmp_path):
    source = """
    extern "C" __global__ void turn(const int* x, int* y) {
        __shared__ int kept[96];
        kept[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
        const int other = kept[95 - threadIdx.x];
        __syncthreads();
        kept[threadIdx.x] = other + 1;
        __syncthreads();
        y[threadIdx.x] = kept[(threadIdx.x + 1) % 96];
    }"""
    x, y = np.arange(96, dtype=np.int32), np.zeros(96, np.int32)
    execution = execute(compiled(source, "turn", tmp_path), (1, 1, 1), (96, 1, 1), [x, y])
    assert y.tolist() == [x[95 - (i + 1) % 96] + 1 for i in range(96)]
    assert execution.barriers == 3


def test_maxima_in_shared_memory(tmp_path):
    source = """
    extern "C" __global__ void last(const int* at, unsigned* y) {
        __shared__ unsigned kept[8];
        if (threadIdx.x < 8) kept[threadIdx.x] = 0;
        __syncthreads();
        atomicMax(&kept[at[threadIdx.x]], threadIdx.x + 1);
        __syncthreads();
        if (threadIdx.x < 8) y[threadIdx.x] = kept[threadIdx.x];
    }"""
    at, y = np.array([3, 1, 3, 3, 7, 1, *[5] * 58], np.int32), np.zeros(8, np.uint32)
    execute(compiled(source, "last", tmp_path), (1, 1, 1), (64, 1, 1), [at, y])
    assert y.tolist() == [0, 6, 0, 4, 0, 64, 0, 5]


_MEETING = """
extern "C" __global__ void meet(unsigned* arrived, unsigned* y) {
    if (threadIdx.x == 0) {
        atomicAdd(arrived, 1u);
        while (atomicAdd(arrived, 0u) < gridDim.x) __nanosleep(32);
    }
    __syncthreads();
    if (threadIdx.x == 0) y[blockIdx.x] = *(volatile unsigned*)arrived;
}"""


def test_blocks_that_wait_for_each_other(tmp_path):
    kernel = compiled(_MEETING, "meet", tmp_path)
    arrived, y = np.zeros(1, np.uint32), np.zeros(5, np.uint32)
    execution = execute(kernel, (5, 1, 1), (64, 1, 1), [arrived, y])
    assert y.tolist() == [5] * 5
    assert execution.arrivals == 1
    # Of a sample, the others are taken to have come.
    arrived[:] = 0
    assert execute(kernel, (500, 1, 1), (64, 1, 1), [arrived, np.zeros(500, np.uint32)], blocks=[0, 7]).arrivals == 1


def test_what_the_lanes_of_a_warp_and_the_threads_of_a_block_agree_on(tmp_path):
    source = """
    extern "C" __global__ void agree(const int* x, unsigned* y) {
        const int value = x[threadIdx.x];
        const unsigned found[] = {
            (unsigned)__any_sync(~0u, value == 40),  (unsigned)__all_sync(~0u, value < 64),
            __ballot_sync(~0u, value & 1),           (unsigned)__reduce_add_sync(~0u, value),
            (unsigned)__reduce_max_sync(~0u, value), (unsigned)__syncthreads_or(value == 40),
            (unsigned)__syncthreads_or(value == 64), (unsigned)__syncthreads_and(value < 64),
        };
        for (int i = 0; i < 8; ++i) y[8 * threadIdx.x + i] = found[i] + 10 * (i > 4 && found[i] != 0);
    }"""
    x, y = np.arange(64, dtype=np.int32) - 1, np.zeros((64, 8), np.uint32)
    execute(compiled(source, "agree", tmp_path), (1, 1, 1), (64, 1, 1), [x, y])
    sums = [sum(range(-1, 31)), sum(range(31, 63))]
    # Of -1, 0, 1, ... the odd ones are in the even lanes.
    assert (y[:32] == [0, 1, 0x55555555, sums[0], 30, 11, 0, 11]).all()
    assert (y[32:] == [1, 1, 0x55555555, sums[1], 62, 11, 0, 11]).all()


def test_blocks_that_meet_by_release_and_acquire(tmp_path):
    source = """
    extern "C" __global__ void meet(unsigned* arrived, unsigned* y) {
        if (threadIdx.x == 0) {
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
            unsigned seen = 0;
            while (seen < gridDim.x) {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
                if (seen < gridDim.x) __nanosleep(32);
            }
            y[blockIdx.x] = seen;
        }
    }"""
    kernel = compiled(source, "meet", tmp_path)
    arrived, y = np.zeros(1, np.uint32), np.zeros(500, np.uint32)
    execution = execute(kernel, (5, 1, 1), (32, 1, 1), [arrived, y])
    assert y[:6].tolist() == [5, 5, 5, 5, 5, 0]
    assert execution.arrivals == 1
    assert execute(kernel, (500, 1, 1), (32, 1, 1), [arrived, y], blocks=[0, 7]).arrivals == 1


def test_waits_for_memory_are_counted_one_after_the_other(tmp_path):
    kernel = compiled(CHAIN, "chain", tmp_path)
    following = np.roll(np.arange(32 * 64, dtype=np.int32), -64)  # far from what was read before
    execution = execute(kernel, (1, 1, 1), (32, 1, 1), [following, np.zeros(32, np.int32), np.int32(12)])
    assert execution.trips == 12


def test_what_was_asked_for_before_is_found_in_a_cache(tmp_path):
    source = """
    extern "C" __global__ void walk(const int* x, int* y, int rows) {
        int place = threadIdx.x;
        for (int row = 0; row < rows; ++row) {
            if (row + 1 < rows) asm volatile("prefetch.global.L2 [%0];" :: "l"(x + (row + 1) * 32 + threadIdx.x));
            place = x[row * 32 + place];
        }
        y[threadIdx.x] = place;
    }"""
    kernel = compiled(source, "walk", tmp_path)
    x, y = np.tile(np.arange(32, dtype=np.int32), 5), np.zeros(32, np.int32)
    execution = execute(kernel, (1, 1, 1), (32, 1, 1), [x, y, np.int32(5)])
    assert (execution.trips, execution.cached_trips) == (1, 4)
    # A line for each row and for the result, and the lanes that ask for four rows.
    assert execution.pipe_cycles == 5 + 1 + 4 * 32
    assert (y == np.arange(32)).all()


def test_what_no_gpu_survives(tmp_path):
    kernel = compiled(COPY, "copy", tmp_path)
    x = np.zeros(4 * 511, np.uint32)
    with pytest.raises(MachineError, match="outside all arrays"):
        execute(kernel, (1, 1, 1), BLOCK, [x, x.copy()])


def test_an_unknown_instruction_is_an_error_only_where_it_is_executed(tmp_path):
    source = """
    extern "C" __global__ void dot(const int* x, int* y, int wanted) {
        if (wanted) y[0] = __dp4a(x[0], x[1], 0);
    }"""
    kernel = compiled(source, "dot", tmp_path)
    x, y = np.ones(2, np.int32), np.zeros(1, np.int32)
    execute(kernel, (1, 1, 1), (1, 1, 1), [x, y, np.int32(0)])
    with pytest.raises(UnknownInstructionError, match="IDP"):
        execute(kernel, (1, 1, 1), (1, 1, 1), [x, y, np.int32(1)])
