"""Inputs of the verification: always the same, and awkward on purpose."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_layers.core.array import DTypeLike
from gpu_layers.runtime.backend import use_executor

#: One element; less than a vector; vectors and no rest, vectors and a rest; more than the 4,096 elements of a half-type
#: block.
ELEMENTWISE_SIZES = (1, 3, 32, 37, 9001)


def generator(*what: object) -> np.random.Generator:
    """Random numbers that depend on what they are for, not on what was drawn before."""
    return np.random.default_rng(zlib.crc32(repr(what).encode()))


def normal(shape: tuple[int, ...], dtype: DTypeLike, *what: object, mean: float = 0.0) -> np.ndarray:
    """Normally distributed values of standard deviation 1."""
    return np.asarray(generator(shape, *what).standard_normal(shape) + mean).astype(dtype)


def with_special_values(x: np.ndarray) -> np.ndarray:
    """The array with NaN, infinities, zeros of both signs and a subnormal at scattered places."""
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40], np.float64).astype(x.dtype)
    places = generator("special", x.size).permutation(x.size)[: special.size]
    x.reshape(-1)[places] = special[: places.size]
    return x


def negative_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """-0 everywhere: a sum of such values that begins with +0 is +0, a value that is only moved is not."""
    return np.full(shape, -0.0).astype(dtype)


def with_several_nan(x: np.ndarray) -> np.ndarray:
    """The array with NaN at every third place, and an infinity of either sign: several NaN in most windows."""
    places = generator("NaN", x.size).permutation(x.size)
    x.reshape(-1)[places[: x.size // 3]] = np.nan
    x.reshape(-1)[places[-2:]] = np.array([np.inf, -np.inf]).astype(x.dtype)
    return x


def with_ties(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Small whole numbers, many of them equal."""
    return generator("ties", shape).integers(-3, 4, shape).astype(dtype)


class NoLaunches:
    """Takes launches, and does nothing: what remains is the host's work."""

    def launch(self, *launch: object) -> None:
        """Nothing."""


def launched_nowhere(run: Callable[[], object]) -> Any:
    """Shapes and dtypes of an operation's results: neither a kernel nor the reference runs."""
    with use_executor(NoLaunches()):
        return run()
