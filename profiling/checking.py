"""Whether results are right, by parts of them that can be computed again in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_layers.catalogue.case import Arrays, epsilon
from gpu_layers.catalogue.operation import BACKWARD, FORWARD
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.runtime.backend import use_backend
from profiling.cases import DTYPES, Case

# Elements of a part: a fraction of a second in float64.
_PART = 2**20
# Roundings of the accumulation dtype: sums here are trees whose leaves are sums of some hundred values, of which
# rounding errors, of either sign, add up to far less than this.
_ROUNDINGS = 64


@dataclass(frozen=True)
class Part:
    """A piece of a case that is computed alone.

    Attributes
    ----------
    label : str
    take : callable
        The piece of an array like x or y.
    take_channels : callable
        The piece of an array with one value a channel.
    start : int
        Flat index of its first element.
    """

    label: str
    take: Callable[[Any], Any]
    take_channels: Callable[[Any], Any]
    start: int = 0

    def take_result(self, name: str, array: Any) -> Any:
        """The piece of a result, by its name: gradients of parameters have one value a channel."""
        return (self.take_channels if name in ("dgamma", "dbeta") else self.take)(array)


def parts(case: Case) -> Iterator[Part]:
    """The first and the last piece of a case: a kernel that does not reach the end is found."""
    kind, shape = case.operation.independent, case.input_shape
    if kind == "elements":
        size = math.prod(shape)
        for begin in sorted({0, max(0, size - _PART)}):
            piece = slice(begin, min(begin + _PART, size))
            yield Part(f"elements {piece.start} to {piece.stop}", _Flat(piece), _whole, begin)
    elif kind == "images":
        count = max(1, min(shape[0], _PART // math.prod(shape[1:])))
        for begin in sorted({0, shape[0] - count}):
            piece = slice(begin, begin + count)
            start = begin * math.prod(shape[1:])
            yield Part(f"images {piece.start} to {piece.stop}", _Along(0, piece), _whole, start)
    else:
        axis = len(shape) - 1 if case.channels_last else 1
        count = max(1, min(shape[axis], _PART // (math.prod(shape) // shape[axis])))
        for begin in sorted({0, shape[axis] - count}):
            piece = slice(begin, begin + count)
            yield Part(f"channels {piece.start} to {piece.stop}", _Along(axis, piece), _Along(0, piece))


@dataclass(frozen=True)
class _Flat:
    piece: slice

    def __call__(self, array: Any) -> Any:
        return array.reshape(-1)[self.piece]


@dataclass(frozen=True)
class _Along:
    axis: int
    piece: slice

    def __call__(self, array: Any) -> Any:
        return array[(slice(None),) * self.axis + (self.piece,)]


def _whole(array: Any) -> Any:
    return array


def expected(case: Case, part: Part, inputs: Arrays, to_numpy: Callable[[Any], np.ndarray]) -> dict[str, np.ndarray]:
    """The reference's results for a part, in float64: ``y``, or ``dx`` and, if there are any, ``dgamma``, ``dbeta``,
    ``dresidual``."""
    arrays: Arrays = {"start": part.start}
    for name, value in inputs.items():
        if name != "start":
            take = part.take if name in ("x", "dy", *case.operation.like_x) else part.take_channels
            arrays[name] = to_numpy(take(value)).astype(np.float64)
    operation = case.operation
    with use_backend("reference"):
        y, saved = operation.forward(arrays, case.channels_last)
        if case.direction == FORWARD:
            return {"y": y}
        assert operation.backward is not None
        return named(operation.backward(arrays["dy"], saved))


def named(result: Any) -> dict[str, Any]:
    """What a backward returned, by name."""
    if isinstance(result, (tuple, list)):
        return dict(zip(("dx", "dgamma", "dbeta", "dresidual"), result, strict=False))
    return {"dx": result}


def error_ratio(case: Case, name: str, actual: np.ndarray, reference: np.ndarray) -> float:
    """Largest error of a result, as a part of what rounding allows; infinity for a wrong shape.

    One rounding to the dtype of the result, and some of the accumulation, relative to the largest value. Of a gradient
    that is rounded between two steps there is one rounding to the dtype more, in each of the values that are summed;
    twice the largest of them, for what it is multiplied by.
    """
    if actual.shape != reference.shape:
        return math.inf
    dtype = DTYPES[case.dtype]
    accumulate = accumulation_dtype(case.dtype)
    between = 2 * epsilon(dtype) if case.operation.rounds_gradient and case.direction == BACKWARD else 0.0
    if name in ("dgamma", "dbeta"):
        # Sums of random signs, which may cancel to nearly nothing: their errors are those of a sum of count
        # normally distributed values.
        allowed = (_ROUNDINGS * epsilon(accumulate) + between) * math.sqrt(case.sizes.inputs / case.shape[1])
        bound = np.full(reference.shape, allowed)
    else:
        largest = float(np.max(np.abs(reference), initial=1.0))
        bound = epsilon(dtype) * np.abs(reference) + (_ROUNDINGS * epsilon(accumulate) + between) * largest
    error = np.abs(actual.astype(np.float64) - reference)
    ratios = np.where(np.isnan(error), np.inf, error / bound)
    return float(np.max(ratios, initial=0.0))


def roughly_equal(case: Case, actual: np.ndarray, reference: np.ndarray) -> bool:
    """Whether another library computed the same thing, maybe in the arithmetic of the dtype itself."""
    if actual.shape != reference.shape:
        return False
    largest = float(np.max(np.abs(reference), initial=1.0))
    # Half types: some ten roundings of what may be the largest value.
    limit = max(16 * epsilon(DTYPES[case.dtype]), 1e-3) * largest
    return bool(np.all(np.abs(actual.astype(np.float64) - reference) <= limit))
