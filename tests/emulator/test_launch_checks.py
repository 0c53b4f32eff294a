"""What a driver refuses, or a GPU silently misreads, is an error before anything runs."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from gpu_layers import emulator
from gpu_layers.emulator.parameters import Kind

from .conftest import KERNELS

X = np.zeros(64, np.float32)
Y = np.zeros(64, np.float32)
ONE = np.float32(1)


@functools.cache
def module() -> emulator.EmulatedModule:
    return emulator.load(KERNELS / "launches.cu", ["scale", "every_type", "by_struct", "grid_barrier"])


def test_parameters_come_from_the_compiled_function():
    x, y, factor = module().parameters("scale")
    assert (x.c_type, x.size, x.kind, x.is_pointer, x.is_const) == ("const float*", 4, Kind.FLOAT, True, True)
    assert (y.c_type, y.dtype, y.is_pointer, y.is_const) == ("float*", np.dtype(np.float32), True, False)
    assert (factor.c_type, factor.dtype, factor.is_pointer) == ("float", np.dtype(np.float32), False)
    dtypes = [p.dtype for p in module().parameters("every_type")]
    assert dtypes == [
        np.dtype(t)
        for t in ("f8", "f2", ml_dtypes.bfloat16, "?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "i8", "f4", "u4")
    ]
    window, anything, vectors = module().parameters("by_struct")
    assert (window.size, window.kind, window.dtype) == (24, Kind.OTHER, None)
    assert (anything.kind, anything.is_pointer) == (Kind.VOID, True)
    assert (vectors.size, vectors.c_type) == (16, "const float4*")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([X, Y], "scale takes 3 arguments, got 2"),
        ([X, Y, ONE, ONE], "scale takes 3 arguments, got 4"),
        ([X.astype("f8"), Y, ONE], "'x' .const float.. takes an array of float32, got float64"),
        ([X.astype("i4"), Y, ONE], "'x' .const float.. takes an array of float32, got int32"),
        ([X.tolist(), Y, ONE], "'x' .const float.. takes a numpy.ndarray or None, got list"),
        ([ONE, Y, ONE], "'x' .const float.. takes a numpy.ndarray or None, got float32"),
        ([X, Y, np.float64(1)], "'factor' .float. takes one value of float32, got float64"),
        ([X, Y, np.int32(1)], "'factor' .float. takes one value of float32, got int32"),
        ([X, Y, 1.0], "'factor' .float. takes a NumPy scalar of float32, got float: its size would be a guess"),
        ([X, Y, X], r"'factor' .float. takes one value of float32, got float32 of shape \(64,\)"),
        ([X, Y, None], "'factor' .float. takes a NumPy scalar"),
    ],
)
def test_wrong_arguments_are_refused(values, says):
    with pytest.raises(TypeError, match=says):
        module().launch("scale", (1,), (64,), values, argument_names=("x", "y", "factor"))


def test_scalars_and_arrays_of_one_element_are_values():
    for factor in (np.float32(3), np.array(3, np.float32), np.array([3], np.float32)):
        y = np.zeros(64, np.float32)
        module().launch("scale", (1,), (64,), [np.ones(64, np.float32), y, factor])
        assert (y == 3).all()


def test_a_struct_of_the_wrong_size_is_refused():
    good = np.zeros((), np.dtype([("size", "i4", 3), ("scale", "f4"), ("stride", "i8")]))
    module().launch("by_struct", (1,), (1,), [good, X, X])
    packed = np.zeros((), np.dtype([("size", "i4", 3), ("stride", "i8")]))
    with pytest.raises(TypeError, match="takes one value of a dtype of 24 bytes"):
        module().launch("by_struct", (1,), (1,), [packed, X, X])


def test_pointers_to_vectors_and_void_take_arrays_that_make_them_up():
    window = np.zeros(24, np.uint8).view(np.dtype([("size", "i4", 3), ("scale", "f4"), ("stride", "i8")]))
    module().launch("by_struct", (1,), (1,), [window, Y.view(np.int8), X.view(np.uint16)])
    three_bytes = np.zeros(4, np.dtype([("a", "u1", 3)]))
    with pytest.raises(TypeError, match="takes an array of a dtype of 16 bytes"):
        module().launch("by_struct", (1,), (1,), [window, Y, three_bytes])


def test_a_read_only_array_is_not_written():
    frozen = np.zeros(64, np.float32)
    frozen.flags.writeable = False
    module().launch("scale", (1,), (64,), [frozen, Y, ONE])
    with pytest.raises(ValueError, match="may be written, but the array is read-only"):
        module().launch("scale", (1,), (64,), [X, frozen, ONE])


@pytest.mark.parametrize(
    ("grid", "block", "options", "says"),
    [
        ((1,), (1025,), {}, "block size x must be between 1 and 1024, got 1025"),
        ((1,), (32, 33), {}, r"at most 1024 threads, got \(32, 33, 1\): 1056"),
        ((1,), (1, 1, 65), {}, "block size z must be between 1 and 64, got 65"),
        ((1,), (0,), {}, "block size x must be between 1 and 1024, got 0"),
        ((0,), (1,), {}, "grid size x must be between 1 and 2147483647, got 0"),
        ((1 << 31,), (1,), {}, "grid size x must be between 1 and 2147483647, got 2147483648"),
        ((1, 65_536), (1,), {}, "grid size y must be between 1 and 65535"),
        ((1, 1, 65_536), (1,), {}, "grid size z must be between 1 and 65535"),
        ((), (1,), {}, "grid must have 1 to 3 sizes"),
        ((1,), (1, 1, 1, 1), {}, "block must have 1 to 3 sizes"),
        ((1,), (1,), {"shared_bytes": 232_449}, "between 0 and 232448 bytes, got 232449"),
        ((1,), (1,), {"shared_bytes": -1}, "between 0 and 232448 bytes, got -1"),
        ((1,), (1,), {"shared_bytes": 49_153, "max_shared_bytes": 49_152}, "between 0 and 49152 bytes"),
        ((265,), (1,), {"cooperative": True}, "at most 264, got 265"),
        ((5,), (1,), {"cooperative": True, "max_cooperative_blocks": 4}, "at most 4, got 5"),
    ],
)
def test_launches_that_a_driver_refuses(grid, block, options, says):
    with pytest.raises(ValueError, match=says):
        module().launch("scale", grid, block, [X, Y, ONE], **options)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match=r"launches.cu was not built with halve; it has scale, every_type"):
        module().launch("halve", (1,), (1,), [])


def test_grid_sync_needs_a_cooperative_launch():
    with pytest.raises(emulator.EmulationError, match="but the launch is not cooperative"):
        module().launch("grid_barrier", (2,), (4,), [])
    module().launch("grid_barrier", (264,), (4,), [], cooperative=True)


def test_too_much_static_shared_memory_is_noticed_in_checked_mode():
    checked = emulator.load(KERNELS / "launches.cu", ["too_much_shared"], mode="trace")
    with pytest.raises(ValueError, match="uses 65536 bytes of static shared memory: a kernel has at most 49152"):
        checked.launch("too_much_shared", (1,), (1,), [Y])


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="one of ascending, descending, random, got 'sideways'"):
        emulator.Schedule("sideways")


@pytest.mark.parametrize("mode", ["fast", "trace"])
def test_empty_arrays_and_null_pointers_are_arguments(mode):
    empty = np.zeros(0, np.float32)
    nothing = emulator.load(KERNELS / "launches.cu", ["by_struct"], mode=mode)
    window = np.zeros((), np.dtype([("size", "i4", 3), ("scale", "f4"), ("stride", "i8")]))
    nothing.launch("by_struct", (1,), (1,), [window, empty, None])


def test_an_array_that_is_off_by_a_byte_is_noticed():
    checked = emulator.load(KERNELS / "launches.cu", ["scale"], mode="trace")
    crooked = np.zeros(257, np.uint8)[1:].view(np.float32)
    with pytest.raises(emulator.EmulationError, match="byte 0 of argument 0 is no multiple of 4"):
        checked.launch("scale", (1,), (64,), [crooked, Y, ONE])


def test_threads_may_launch_at_once():
    """They take turns; each sees its own shared memory segment."""
    x = np.arange(64, dtype=np.float32)

    def work(factor: int) -> np.ndarray:
        y = np.zeros(64, np.float32)
        for _ in range(20):
            module().launch("scale", (1,), (64,), [x, y, np.float32(factor)])
        return y

    with ThreadPoolExecutor(4) as pool:
        for factor, y in enumerate(pool.map(work, range(8))):
            np.testing.assert_array_equal(y, factor * x)
