"""Inputs that the tests share: dtypes, awkward memory layouts, awkward values, and checks on raw bytes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpu_layers.runtime.backend import use_backend
from gpu_layers.runtime.limits import force_limits

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64))

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_backend = pytest.mark.parametrize("backend", ["reference", "emulated"])
each_rank = pytest.mark.parametrize("rank", [1, 2, 3])

#: Largest relative error of rounding to nearest: half the distance from 1 to the next number.
UNIT_ROUNDOFF = {dtype: float(ml_dtypes.finfo(dtype).eps) / 2 for dtype in DTYPES}


def accumulation_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def normal(shape: tuple[int, ...], dtype: object = np.float64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def integers(shape: tuple[int, ...], dtype: object = np.float64, low: int = -3, high: int = 3, seed: int = 0):
    """Small integers: full of ties, and their sums are exact in every dtype."""
    return np.random.default_rng(seed).integers(low, high, shape, endpoint=True).astype(dtype)


def tie_free(shape: tuple[int, ...], dtype: object = np.float64, seed: int = 0) -> np.ndarray:
    """Shuffled consecutive integers around 0: no two are equal, and neighbours are far apart."""
    size = int(np.prod(shape))
    values = (np.random.default_rng(seed).permutation(size) - size // 2).astype(dtype)
    assert np.unique(values.astype(np.float64)).size == size, "too many values to be distinct in this dtype"
    return values.reshape(shape)


def with_specials(shape: tuple[int, ...], dtype: object = np.float64, seed: int = 0) -> np.ndarray:
    """Ties, zeros of both signs, infinities of both signs and NaN, each about as often as ordinary values."""
    choices = np.array([-2, -1, 1, 2, 0.0, -0.0, np.inf, -np.inf, np.nan])
    return np.random.default_rng(seed).choice(choices, shape).astype(dtype)


def _every_other(x: np.ndarray) -> np.ndarray:
    view = np.full([2 * size + 1 for size in x.shape], 99, x.dtype)[tuple(slice(1, None, 2) for _ in x.shape)]
    view[...] = x
    return view


def _backwards(x: np.ndarray) -> np.ndarray:
    flip = (slice(None, None, -1),) * x.ndim
    return x[flip].copy()[flip]


def _off_by_a_byte(x: np.ndarray) -> np.ndarray:
    view = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def _in_records(x: np.ndarray) -> np.ndarray:
    """As a field of packed records that have a byte besides: off their boundaries, but for the first."""
    size = x.dtype.itemsize
    view = np.zeros((*x.shape, size + 1), np.uint8)[..., :size].view(x.dtype)[..., 0]
    view[...] = x
    return view


def _read_only(x: np.ndarray) -> np.ndarray:
    view = x.copy()
    view.flags.writeable = False
    return view


#: The same values in other memory: every one is a legal input.
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": lambda x: x.copy(order="C"),
    "fortran": lambda x: x.copy(order="F"),
    "every_other": _every_other,
    "backwards": _backwards,
    "off_by_a_byte": _off_by_a_byte,
    "in_records": _in_records,
    "read_only": _read_only,
}
WRITABLE_LAYOUTS = {name: layout for name, layout in LAYOUTS.items() if name != "read_only"}


def to_channels_last(x: np.ndarray) -> np.ndarray:
    """(N, C, *spatial) as a contiguous (N, *spatial, C)."""
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def to_channels_first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, message: str = "") -> None:
    """Equal type, dtype, shape and bytes: the sign of zero counts."""
    assert type(actual) is type(expected) is np.ndarray, message
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), message
    if actual.tobytes() != expected.tobytes():
        as_floats = [np.asarray(values, np.float64) for values in (actual, expected)]
        np.testing.assert_array_equal(*as_floats, err_msg=message)
        raise AssertionError(f"equal values, other bits (zeros of another sign, or NaN of another kind) {message}")


def assert_all_same_bits(actual: Any, expected: Any) -> None:
    """Of arrays by name, or one after the other."""
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys()
        actual, expected = [actual[name] for name in expected], expected.values()
    for place, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(one, other, f"at {place}")


def assert_same_values(actual: np.ndarray, expected: np.ndarray, message: str = "") -> None:
    """Equal dtype, shape and values; NaN equals NaN of any kind, but +0 does not equal -0."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), message
    a, b = (np.asarray(values, np.float64) for values in (actual, expected))
    np.testing.assert_array_equal(a, b, err_msg=message)
    numbers = ~np.isnan(a)
    np.testing.assert_array_equal(np.signbit(a)[numbers], np.signbit(b)[numbers], err_msg=f"signs of zeros {message}")


def assert_within(actual: np.ndarray, expected: np.ndarray, bound: np.ndarray | float, message: str = "") -> None:
    """``|actual - expected| <= bound``, elementwise, in float64."""
    error = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    assert error.shape == np.shape(expected), message
    excess = np.where(error <= bound, 0, 1)
    assert not excess.any(), (
        f"{int(excess.sum())} of {excess.size} differ by more than their bound; "
        f"largest error {error[excess > 0].max()} {message}"
    )


@contextmanager
def unchanged(*arrays: np.ndarray) -> Iterator[None]:
    """Fail if a byte of these arrays is another one afterwards."""
    before = [array.tobytes() for array in arrays]
    yield
    assert [array.tobytes() for array in arrays] == before


def memory_of(call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, int, int]:
    """The result of a call, the most bytes that it used at a time, and those that it left in use."""
    tracemalloc.start()
    try:
        result = call(*arguments, **options)
        kept, most = tracemalloc.get_traced_memory()
        return result, most, kept
    finally:
        tracemalloc.stop()


@contextmanager
def emulated(launched: list[str], **limits: Any) -> Iterator[None]:
    """Run emulated kernels in checked mode, within these limits, and add the names of those that are launched."""

    def record(kernel, trace):
        launched.append(kernel.name)

    with force_limits(**limits), use_backend("emulated", check=True, record=record):
        yield


class NoLaunch:
    """Takes no launch: for what must be refused before."""

    def launch(self, *launch):
        raise AssertionError("a kernel was launched")
