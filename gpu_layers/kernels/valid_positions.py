"""Launching ``valid_positions.cu``."""

from __future__ import annotations

import math

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import array_module, place_of
from gpu_layers.core.valid import WORD, word_count
from gpu_layers.kernels.arrays import empty, ready
from gpu_layers.kernels.dropout import DIVISOR, divisor
from gpu_layers.runtime.kernel import KernelTemplate
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.program import Launcher, Numbers, Operand, Operands

__all__ = ["valid_words"]

# ``kPackingThreads``, ``kMostAxes``.
_SOURCE, _THREADS, _MOST_AXES = "valid_positions.cu", 256, 3
_SIZES = np.dtype([("sizes", DIVISOR, (_MOST_AXES,)), ("axes", np.int64)], align=True)
_WORD = {"Word": "unsigned int"}
_OF_MASK = KernelTemplate(_SOURCE, "valid_positions_of_mask", [_WORD])
_OF_LENGTHS = KernelTemplate(_SOURCE, "valid_positions_of_lengths", [_WORD], {"PaddedSizes": _SIZES})
# Of ``FewLengths``: most of a kernel.
_FEW = (32, 256)
_OF_FEW = KernelTemplate(
    _SOURCE,
    "valid_positions_of_few_lengths",
    [{**_WORD, "Most": str(most)} for most in _FEW],
    {"PaddedSizes": _SIZES, **{f"FewLengths<{most}>": np.dtype([("values", np.uint64, (most,))]) for most in _FEW}},
)


def valid_words(shape: tuple[int, ...], lengths: np.ndarray | None, mask: Array | None, like: Array) -> Array:
    """``gpu_layers.reference.valid_words``, as a kernel."""
    if lengths is None:
        return _of_mask((mask,))
    if numbers := few_lengths(lengths):
        return _of_lengths((like, None), (shape,), numbers)
    with place_of(like):
        return _of_lengths((like, array_module(like).asarray(lengths)), (shape,))


def few_lengths(lengths: np.ndarray) -> tuple[int, ...]:
    """What a kernel takes by value, so that nothing is copied to the device; empty where they are too many."""
    for most in _FEW:
        if lengths.size <= most:
            return (*lengths.reshape(-1).tolist(), *(0,) * (most - lengths.size))
    return ()


@Launcher
def _of_lengths(operands: Operands, numbers: Numbers, shape: tuple[int, ...]) -> Array:
    like, lengths = operands
    return pack_lengths(like, shape, numbers if lengths is None else ready(lengths))


def pack_lengths(like: Operand, shape: tuple[int, ...], lengths: Operand | Numbers) -> Operand:
    """The words of lengths, which are an operand or :func:`few_lengths`."""
    count = word_count(shape)
    words, blocks = empty((count,), np.uint32, like), -(-count * WORD // _THREADS)
    kernel = _OF_FEW(**_WORD, Most=str(len(lengths))) if isinstance(lengths, tuple) else _OF_LENGTHS(**_WORD)
    launch(kernel, blocks, _THREADS, (lengths, words, padded_sizes(shape), math.prod(shape), count))
    return words


def padded_sizes(shape: tuple[int, ...]) -> np.ndarray:
    """``PaddedSizes``."""
    sizes = (1,) * (_MOST_AXES - len(shape[1:])) + shape[1:]
    return np.array(([divisor(max(size, 1)) for size in sizes], len(shape) - 1), _SIZES)


@Launcher
def _of_mask(operands: Operands, numbers: Numbers) -> Array:
    mask = ready(operands[0])
    count = word_count(mask.shape)
    words = empty((count,), np.uint32, mask)
    launch(_OF_MASK(**_WORD), -(-count * WORD // _THREADS), _THREADS, (mask.as_bytes(), words, mask.size, count))
    return words
