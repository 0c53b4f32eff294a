"""Everything that device code may use gives the values CUDA documents, under every schedule."""

from __future__ import annotations

import functools
import math

import ml_dtypes
import numpy as np
import pytest

from gpu_layers import emulator

from .conftest import KERNELS

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

NAMES = [
    "built_in_variables",
    "struct_by_value",
    "name_expression<float, 4, true, int>",
    "name_expression<double, 1, false, long long>",
    "nested_template<Twice<float>, float>",
    "plain_c_name",
    "module_variables",
    "block_votes",
    "async_copies",
    "scan",
    "poison",
    "last_byte_of_shared",
    "shuffles<int>",
    "shuffles<float>",
    "shuffles<double>",
    "shuffles<__half>",
    "shuffles<unsigned long long>",
    "votes",
    "partial_warp",
    "tiles",
    "atomics",
    "spin_lock",
    "last_block_done",
    "grid_sync",
    "integers",
    "floats",
    "doubles",
    "half_round_trip<__half>",
    "half_round_trip<__nv_bfloat16>",
    "half_functions<__half>",
    "half_functions<__nv_bfloat16>",
    "half_pairs",
    "vector_types",
]


@functools.cache
def module(mode: str) -> emulator.EmulatedModule:
    return emulator.load(KERNELS / "features.cu", NAMES, mode=mode)


@pytest.fixture(params=["fast", "trace"])
def run(request, schedule):
    """Launches a kernel in one mode under one schedule."""

    def launch(name, grid, block, values, **options):
        return module(request.param).launch(name, grid, block, values, schedule=schedule, **options)

    return launch


def test_built_in_variables(run):
    grid, block = (3, 2, 2), (4, 3, 2)
    out = np.zeros((2, 2, 3, 2, 3, 4, 10), np.uint32)
    run("built_in_variables", grid, block, [out])
    bz, by, bx, tz, ty, tx = np.indices(out.shape[:-1])
    np.testing.assert_array_equal(out[..., 0], tx)
    np.testing.assert_array_equal(out[..., 1], ty)
    np.testing.assert_array_equal(out[..., 2], tz)
    np.testing.assert_array_equal(out[..., 3], bx)
    np.testing.assert_array_equal(out[..., 4], by)
    np.testing.assert_array_equal(out[..., 5], bz)
    assert (out[..., 6] == 20304).all()
    assert (out[..., 7] == 20203).all()
    assert (out[..., 8] == 32).all()
    np.testing.assert_array_equal(out[..., 9], tx + 4 * (ty + 3 * tz))


def test_a_struct_is_passed_by_value(run):
    window = np.zeros((), np.dtype([("size", "i4", 3), ("scale", "f4"), ("stride", "i8")]))
    window["size"], window["scale"], window["stride"] = (3, 4, 5), 0.5, 1 << 40
    out = np.zeros(5)
    run("struct_by_value", (1,), (1,), [window, out])
    np.testing.assert_array_equal(out, [3, 4, 5, 0.5, 1 << 40])


def test_name_expressions_with_every_kind_of_argument(run):
    x = np.arange(1001, dtype=np.float32)
    y = np.zeros_like(x)
    run("name_expression<float, 4, true, int>", (1,), (32,), [x, y, np.int32(1001)])
    np.testing.assert_array_equal(y, -x)
    u = x.astype(np.float64)
    v = np.zeros_like(u)
    run("name_expression<double, 1, false, long long>", (1,), (32,), [u, v, np.int64(1001)])
    np.testing.assert_array_equal(v, u)
    run("nested_template<Twice<float>, float>", (1,), (1001,), [x, y])
    np.testing.assert_array_equal(y, 2 * x)
    out = np.zeros(5, np.int32)
    run("plain_c_name", (1,), (5,), [out])
    np.testing.assert_array_equal(out, np.arange(5))


def test_constants_and_device_variables(run):
    out, calls, again = np.zeros(8, np.float32), np.zeros(1, np.int32), np.zeros(1, np.int32)
    run("module_variables", (1,), (8,), [out, calls])
    run("module_variables", (1,), (8,), [out, again])
    np.testing.assert_array_equal(out, [1, 2, 4, 8] * 2)
    assert again[0] == calls[0] + 1


def test_block_votes(run):
    out = np.zeros(3, np.int32)
    run("block_votes", (1,), (100,), [np.arange(100, dtype=np.int32), out])
    np.testing.assert_array_equal(out, [97, 1, 0])


def test_a_scan_through_dynamic_shared_memory(run):
    x = np.random.default_rng(0).integers(0, 100, 1024).astype(np.int32)
    y = np.zeros_like(x)
    run("scan", (1,), (1024,), [x, y], shared_bytes=4096)
    np.testing.assert_array_equal(y, np.cumsum(x) - x)


def test_asynchronous_copies(run):
    x = np.random.default_rng(0).integers(0, 1000, 128).astype(np.int32)
    y = np.zeros(32, np.int32)
    run("async_copies", (1,), (32,), [x, y])
    np.testing.assert_array_equal(y, x[:32] + x[1:64:2] + x[3::4] + x[64:96])


def test_shared_memory_is_poisoned_for_every_block(schedule):
    is_nan = np.zeros(4, np.int32)
    module("fast").launch("poison", (3,), (4,), [is_nan], shared_bytes=16, schedule=schedule)
    assert (is_nan == 3).all()


def test_all_the_shared_memory_there_is(run):
    out = np.zeros(1, np.int32)
    run("last_byte_of_shared", (1,), (1,), [out, np.int32(232_448)], shared_bytes=232_448)
    assert out[0] == 7


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("int", "i4"), ("float", "f4"), ("double", "f8"), ("__half", "f2"), ("unsigned long long", "u8")],
)
def test_shuffles(run, name, dtype):
    x = np.random.default_rng(0).integers(0, 200, 32).astype(dtype)
    out = np.zeros((8, 32), dtype)
    run(f"shuffles<{name}>", (1,), (32,), [x, out])
    lane = np.arange(32)
    sources = [
        np.full(32, 5),
        lane // 8 * 8 + 3,
        np.where(lane >= 2, lane - 2, lane),
        np.where(lane % 8 >= 2, lane - 2, lane),
        np.where(lane + 3 < 32, lane + 3, lane),
        np.where(lane % 16 + 3 < 16, lane + 3, lane),
        lane ^ 9,
        lane ^ 1,
    ]
    np.testing.assert_array_equal(out, x[np.array(sources)])


def test_votes_and_reductions(run):
    x = np.arange(32, dtype=np.int32)
    out = np.zeros((7, 32), np.uint32)
    run("votes", (1,), (32,), [x, out])
    low = x < 8
    divisible = sum(1 << i for i in range(0, 32, 3))
    np.testing.assert_array_equal(out[0], np.where(low, divisible & 0xFF, divisible & 0xFFFFFF00))
    np.testing.assert_array_equal(out[1], low)
    np.testing.assert_array_equal(out[2], low)
    np.testing.assert_array_equal(out[3], [0xF << (i // 4 * 4) for i in range(32)])
    assert (out[4] == 31 * 16).all()
    assert (out[5].view(np.int32) == -10).all()
    np.testing.assert_array_equal(out[6], np.where(low, 7, 31))


def test_a_full_mask_in_a_warp_that_is_not_full(run):
    x = np.arange(7, 57, dtype=np.int32)
    y = np.zeros(50, np.int32)
    run("partial_warp", (1,), (50,), [x, y, np.int32(40)])
    np.testing.assert_array_equal(y, [7] * 32 + [39] * 8 + [0] * 10)


def test_tiles_of_a_warp(run):
    x = np.arange(64, dtype=np.int32)
    y = np.zeros(64, np.int32)
    run("tiles", (1,), (64,), [x, y])
    sums = x.reshape(8, 8).sum(1) + 1000 * np.arange(8)
    np.testing.assert_array_equal(y, np.repeat(sums, 8))


def test_atomics(schedule):
    i = np.zeros(4, np.int32)
    u = np.array([0, 0xFFFFFFFF, 0, 0], np.uint32)
    w, f, d, h = np.zeros(3, np.uint64), np.zeros(1, np.float32), np.zeros(1), np.zeros(1, np.float16)
    module("fast").launch("atomics", (1,), (100,), [i, u, w, f, d, h], schedule=schedule)
    np.testing.assert_array_equal(i, [4950, 99, -99, -100])
    np.testing.assert_array_equal(u, [0xFFFFFFFF, 0, 0, 0])
    np.testing.assert_array_equal(w, [100, 42, 99 * 99])
    assert (f[0], d[0], h[0]) == (50.0, 25.0, 100.0)


def test_a_plain_read_in_a_compare_and_swap_loop_is_a_race():
    values = [np.zeros(4, t) for t in (np.int32, np.uint32, np.uint64, np.float32, np.float64, np.float16)]
    with pytest.raises(emulator.EmulationError, match=r"byte 16 of argument 2, which .* read"):
        module("trace").launch("atomics", (1,), (100,), values, initialised=range(6))


def test_a_spinning_thread_lets_the_others_run(run):
    lock, value = np.zeros(1, np.int32), np.zeros(1, np.int32)
    run("spin_lock", (2,), (40,), [lock, value], initialised=(0, 1))
    assert value[0] == 80


def test_last_block_done(run):
    x = (np.arange(12 * 64) % 3 == 0).astype(np.int32)
    partial, ticket, y = np.zeros(12, np.int32), np.zeros(1, np.uint32), np.zeros(1, np.int32)
    run("last_block_done", (12,), (64,), [x, partial, ticket, y], initialised=(2,))
    assert y[0] == x.sum()


def test_grid_sync_keeps_each_blocks_shared_memory(run):
    x = np.random.default_rng(0).integers(0, 9, 7 * 32).astype(np.int32)
    partial, y = np.zeros(7, np.int32), np.zeros(7 * 32, np.int32)
    run("grid_sync", (7,), (32,), [x, partial, y], shared_bytes=128, cooperative=True)
    np.testing.assert_array_equal(y, x * x.sum() + np.arange(7 * 32))


def test_integer_functions(run):
    a, b = 0xDEADBEEF, 0x00012345
    out = np.zeros(16, np.uint32)
    run("integers", (1,), (1,), [np.array([a, b], np.uint32), out])
    wide = (a << 32 | b) * 0x9E3779B97F4A7C15 >> 64
    expected = [
        a.bit_count(), 32 - b.bit_length(), 1, int(f"{a:032b}"[::-1], 2), a * b >> 32, wide & 0xFFFFFFFF, wide >> 32,
        (b & 0xFFFF) << 16 | a & 0xFFFF, (b << 8 | a >> 24) & 0xFFFFFFFF, b, a, 0xFFFFFFFF, 3, 32, 63, 41,
    ]  # fmt: skip
    assert [int(value) for value in out] == expected


def test_float_functions(run):
    a, b = np.float32(0.7), np.float32(3.3)
    out = np.zeros(16, np.float32)
    run("floats", (1,), (1,), [np.array([a, b, np.nan], np.float32), out])
    a64, b64 = float(a), float(b)
    exact = [a64 * b64 + 1, a64**-0.5, math.exp(a64), math.tanh(a64), math.erf(a64), a, b, a64 / b64, 1.0, -a, 1 / a64]
    np.testing.assert_allclose(out[:11], exact, rtol=2**-22)  # 2 ulp: the C library's own error
    np.testing.assert_array_equal(out[11:15], [0, -3, 0, np.float32(2**31 - 1)])
    assert out[0] == np.float32(a64 * b64 + 1)
    assert out[15] == a * b + np.float32(1)


def test_double_functions(run):
    x, out = np.array([0.7, 3.3]), np.zeros(6)
    run("doubles", (1,), (1,), [x, out])
    expected = [0.7 * 3.3 + 1, 0.7**-0.5, math.exp(0.7), 3.3, np.nextafter(0.7, 1), 3.3]
    np.testing.assert_allclose(out, expected, rtol=2**-51)


@pytest.mark.parametrize(("name", "dtype"), [("__half", np.dtype("f2")), ("__nv_bfloat16", BFLOAT16)])
def test_half_types_round_to_nearest_even(run, name, dtype):
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.standard_normal(900), rng.standard_normal(100) * 1e-7, [0, -0.0, np.inf, -np.inf, 65504, 65520, 1e38]]
    ).astype(np.float32)
    y, back = np.zeros(x.size, dtype), np.zeros(x.size, np.float32)
    run(f"half_round_trip<{name}>", (1,), (x.size,), [x, y, back])
    with np.errstate(over="ignore"):
        expected = x.astype(dtype)
    np.testing.assert_array_equal(y.view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(back, expected.astype(np.float32))


@pytest.mark.parametrize(("name", "dtype"), [("__half", np.dtype("f2")), ("__nv_bfloat16", BFLOAT16)])
def test_half_functions(run, name, dtype):
    rng = np.random.default_rng(0)
    n = 512
    a, b, c = (rng.standard_normal(n).astype(dtype) for _ in range(3))
    a[0] = np.nan
    out = np.zeros((5, n), dtype)
    run(f"half_functions<{name}>", (1,), (n,), [a, b, c, out, np.int32(n)])
    wide_a, wide_b, wide_c = (v.astype(np.longdouble) for v in (a, b, c))
    exact = wide_a * wide_b + wide_c
    error = np.abs(out[0].astype(np.longdouble) - exact)
    spacing = np.abs(np.spacing(out[0, 1:]).astype(np.longdouble))
    assert np.isnan(out[0, 0].astype(np.float32))
    assert (error[1:] <= spacing / 2).all()  # rounded once
    np.testing.assert_allclose(out[1].astype(float), np.exp(c.astype(float)), rtol=float(ml_dtypes.finfo(dtype).eps))
    assert np.isnan(out[2, 0].astype(np.float32))
    np.testing.assert_array_equal(out[2, 1:], np.maximum(a, b)[1:])
    np.testing.assert_array_equal(out[3, 1:], np.floor(a)[1:])
    np.testing.assert_array_equal(out[4, 1:], (a.astype(np.float32) + b.astype(np.float32)).astype(dtype)[1:])


def test_pairs_of_halves(run):
    x = np.array([1.5, -2.0, np.nan, 3.0], np.float16)
    u = np.array([1.5, -2.0, 0.5, 3.0], BFLOAT16)
    y, v = np.zeros_like(x), np.zeros_like(u)
    run("half_pairs", (1,), (2,), [x, y, u, v])
    np.testing.assert_array_equal(y, np.array([3, 0, np.nan, 6], np.float16))
    np.testing.assert_array_equal(v.astype(float), [3.25, 6, 1.25, 11])


def test_vector_loads_and_stores(run):
    x = np.arange(64, dtype=np.float32)
    h = np.arange(128).astype(BFLOAT16)
    y, g = np.zeros_like(x), np.zeros_like(h)
    run("vector_types", (1,), (16,), [x, y, h, g])
    np.testing.assert_array_equal(y.reshape(16, 4), x.reshape(16, 4) + np.array([1, 0, 0, -1]))
    np.testing.assert_array_equal(g, -h)
