"""Checked mode counts what a GPU's memory system would do: compared with numbers worked out by hand."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from gpu_layers import emulator
from gpu_layers.emulator import errors
from gpu_layers.emulator.trace import Footprint, Traffic

from .conftest import KERNELS, marked_line

NAMES = [
    "copy_vectors",
    "copy_strided",
    "copy_in_a_loop",
    "shared_stride<float>",
    "shared_stride<double>",
    "shared_stride<float4>",
    "shared_broadcast",
    "count_atomically",
    "scale_in_place",
    "accumulate",
    "inlined",
    "copy_structs",
]


@functools.cache
def module() -> emulator.EmulatedModule:
    return emulator.load(KERNELS / "traffic.cu", NAMES, mode="trace")


def floats(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.float32)


def test_a_coalesced_copy_of_vectors(schedule):
    n = 4 * 256 * 3
    x, y = floats(n), np.zeros(n, np.float32)
    trace = module().launch(
        "copy_vectors", (3,), (256,), [x, y, np.int32(n)], argument_names=("x", "y", "n"), schedule=schedule
    )
    np.testing.assert_array_equal(x, y)
    warps = 3 * 8
    # A warp moves 32 * 16 = 512 bytes: 16 sectors, 4 lines.
    expected = Traffic(accesses=768, bytes=n * 4, requests=warps, sectors=16 * warps, lines=4 * warps)
    assert trace.total("x", "load") == expected
    assert trace.total("y", "store") == expected
    assert trace.total("x", "store") == trace.total("y", "load") == Traffic()
    assert trace.widths() == {16: 2 * 768}
    assert (trace.bytes_loaded, trace.bytes_stored, trace.sectors) == (n * 4, n * 4, 2 * 16 * warps)
    assert trace.footprints == {
        "x": Footprint(bytes_loaded=n * 4, sectors_loaded=n // 8),
        "y": Footprint(bytes_stored=n * 4, sectors_stored=n // 8),
    }
    assert {str(line.place) for line in trace.lines} == {marked_line("traffic.cu", "copy_vectors")}
    assert marked_line("traffic.cu", "copy_vectors") in trace.table()


@pytest.mark.parametrize(("stride", "sectors", "lines"), [(1, 4, 1), (2, 8, 2), (8, 32, 8), (32, 32, 32)])
def test_a_strided_copy(stride, sectors, lines):
    x, y = floats(32 * stride), np.zeros(32, np.float32)
    trace = module().launch("copy_strided", (1,), (32,), [x, y, np.int32(stride)], argument_names=("x", "y", "s"))
    assert trace.total("x", "load") == Traffic(32, 128, 1, sectors, lines)
    assert trace.total("y", "store") == Traffic(32, 128, 1, 4, 1)
    assert trace.footprints["x"].bytes_loaded == 128
    assert trace.footprints["x"].sectors_loaded == sectors


@pytest.mark.parametrize(("offset", "sectors", "lines"), [(0, 4, 1), (1, 5, 2), (8, 4, 2), (32, 4, 1)])
def test_a_view_keeps_its_distance_from_an_aligned_array(offset, sectors, lines):
    """The emulator lays out arrays as a GPU's allocator would: 512-byte aligned, views inside of them."""
    x = floats(256)[offset : offset + 32]
    trace = module().launch(
        "copy_strided", (1,), (32,), [x, np.zeros(32, np.float32), np.int32(1)], argument_names=("x", "y", "s")
    )
    assert trace.total("x", "load") == Traffic(32, 128, 1, sectors, lines)


def test_each_turn_of_a_loop_is_a_request(schedule):
    n = 10 * 64 + 40
    x, y = floats(n), np.zeros(n, np.float32)
    trace = module().launch(
        "copy_in_a_loop", (1,), (64,), [x, y, np.int32(n)], argument_names=("x", "y", "n"), schedule=schedule
    )
    # 10 full turns of 2 warps; then a full warp and one of 8 lanes (32 bytes: 1 sector).
    assert trace.total("x", "load") == Traffic(n, 4 * n, 22, 21 * 4 + 1, 22)


@pytest.mark.parametrize(
    ("name", "dtype", "width", "stride", "wavefronts", "conflicts"),
    [
        ("float", np.float32, 4, 1, 1, 0),
        ("float", np.float32, 4, 2, 2, 1),
        ("float", np.float32, 4, 3, 1, 0),
        ("float", np.float32, 4, 8, 8, 7),
        ("float", np.float32, 4, 32, 32, 31),
        ("double", np.float64, 8, 1, 2, 0),
        ("double", np.float64, 8, 2, 4, 2),
        ("float4", np.float32, 16, 1, 4, 0),
        ("float4", np.float32, 16, 2, 8, 4),
    ],
)
def test_bank_conflicts(name, dtype, width, stride, wavefronts, conflicts):
    out = np.zeros(32 * width // np.dtype(dtype).itemsize, dtype)
    trace = module().launch(f"shared_stride<{name}>", (1,), (32,), [out, np.int32(stride)])
    expected = Traffic(32, 32 * width, 1, wavefronts=wavefronts, bank_conflicts=conflicts)
    assert trace.total("shared", "load") == expected
    assert trace.total("shared", "store") == expected
    assert trace.bank_conflicts == 2 * conflicts


def test_a_broadcast_is_no_conflict():
    trace = module().launch("shared_broadcast", (1,), (32,), [np.zeros(32, np.float32)])
    assert trace.total("shared", "load") == Traffic(32, 128, 1, wavefronts=1)
    assert trace.shared_bytes == 128


def test_atomics_are_counted_apart():
    counters = np.zeros(2, np.int32)
    trace = module().launch("count_atomically", (4,), (64,), [counters], initialised=[0])
    np.testing.assert_array_equal(counters, [128, 128])
    assert trace.total("argument 0", "atomic") == Traffic(256, 1024, 8, 8, 8)
    assert trace.total("argument 0", "load") == Traffic()


def test_one_array_passed_twice_stays_one():
    x = floats(64)
    trace = module().launch("scale_in_place", (2,), (32,), [x, x, np.float32(2)], argument_names=("x", "y", "factor"))
    np.testing.assert_array_equal(x, 2 * floats(64))
    assert trace.total("x", "load").bytes == trace.total("y", "store").bytes == 256


def test_arrays_that_overlap_race_where_they_do():
    """y is x shifted by one: the neighbour's input is overwritten, or not, depending on who runs first."""
    x = floats(65)
    with pytest.raises(errors.RaceError):
        module().launch("scale_in_place", (2,), (32,), [x[1:], x[:-1], np.float32(2)])
    with pytest.raises(errors.RaceError):
        module().launch("scale_in_place", (2,), (32,), [x[:-1], x[1:], np.float32(2)])
    np.testing.assert_array_equal(x, floats(65))  # a failed launch leaves the caller's arrays alone


@pytest.mark.parametrize("initialised", [[1], ["y"]])
def test_an_array_that_is_read_and_written(initialised):
    x, y = floats(64), np.ones(64, np.float32)
    names = ("x", "y")
    module().launch("accumulate", (1,), (64,), [x, y], initialised=initialised, argument_names=names)
    np.testing.assert_array_equal(y, x + 1)
    with pytest.raises(errors.UninitialisedError, match="byte 0 of argument 1 'y' was never written"):
        module().launch("accumulate", (1,), (64,), [x, y], argument_names=names)
    with pytest.raises(ValueError, match=r"initialised must be among .*, got 'z'"):
        module().launch("accumulate", (1,), (64,), [x, y], initialised=["z"], argument_names=names)


def test_inlined_code_is_named_with_the_line_that_uses_it():
    x, y = floats(32), np.zeros(32, np.float32)
    trace = module().launch("inlined", (1,), (32,), [x, y], argument_names=("x", "y"))
    inner, outer = marked_line("traffic.cu", "load_through inner"), marked_line("traffic.cu", "load_through outer")
    assert [str(line.place) for line in trace.lines if line.argument == "x"] == [f"{inner} (from {outer})"]
    with pytest.raises(errors.OutOfBoundsError, match=f"{inner} .from {outer}"):
        module().launch("inlined", (1,), (32,), [x[:31], y])


def test_structs_move_in_the_pieces_their_alignment_allows():
    pair = np.dtype([("first", "f4"), ("second", "f4")])
    wide = np.dtype([("values", "f4", 8)])
    x, u = np.zeros(32, pair), np.zeros(32, wide)
    x["first"], x["second"], u["values"] = 1, 2, np.arange(8)
    y, v = np.zeros_like(x), np.zeros_like(u)
    trace = module().launch("copy_structs", (1,), (32,), [x, y, u, v], argument_names=("x", "y", "u", "v"))
    np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(u, v)
    assert trace.total("x", "load").bytes == 256
    assert trace.total("u", "load").bytes == 1024
    assert trace.widths("u") == {16: 64}


def test_traces_add_up():
    x, y = floats(32), np.zeros(32, np.float32)
    one = module().launch("copy_strided", (1,), (32,), [x, y, np.int32(1)], argument_names=("x", "y", "s"))
    two = one + module().launch("copy_strided", (1,), (32,), [x, y, np.int32(1)], argument_names=("x", "y", "s"))
    assert two.kernels == ("copy_strided", "copy_strided")
    assert two.total("x") == Traffic(64, 256, 2, 8, 2)
    assert two.footprints["x"].bytes_loaded == 256
    assert len(two.lines) == len(one.lines)
