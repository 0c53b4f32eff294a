"""Launching ``valid_positions.cu``."""

from __future__ import annotations

import math

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.valid import WORD, word_count
from gpu_layers.kernels.arrays import empty, ready
from gpu_layers.kernels.dropout import DIVISOR, divisor
from gpu_layers.runtime.kernel import KernelTemplate
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.program import Launcher, Numbers, Operands

__all__ = ["valid_words"]

# ``kPackingThreads``, ``kMostAxes``.
_SOURCE, _THREADS, _MOST_AXES = "valid_positions.cu", 256, 3
_SIZES = np.dtype([("sizes", DIVISOR, (_MOST_AXES,)), ("axes", np.int64)], align=True)
_WORD = {"Word": "unsigned int"}
_OF_MASK = KernelTemplate(_SOURCE, "valid_positions_of_mask", [_WORD])
_OF_LENGTHS = KernelTemplate(_SOURCE, "valid_positions_of_lengths", [_WORD], {"PaddedSizes": _SIZES})


def valid_words(shape: tuple[int, ...], lengths: Array | None, mask: Array | None) -> Array:
    """``gpu_layers.reference.valid_words``, as a kernel."""
    return _words((mask,) if lengths is None else (lengths,), (shape, lengths is not None))


@Launcher
def _words(operands: Operands, numbers: Numbers, shape: tuple[int, ...], by_lengths: bool) -> Array:
    given, count = ready(operands[0]), word_count(shape)
    words, blocks = empty((count,), np.uint32, given), -(-count * WORD // _THREADS)
    if by_lengths:
        sizes = (1,) * (_MOST_AXES - len(shape[1:])) + shape[1:]
        padded = np.array(([divisor(max(size, 1)) for size in sizes], len(shape) - 1), _SIZES)
        launch(_OF_LENGTHS(**_WORD), blocks, _THREADS, (given, words, padded, math.prod(shape), count))
    else:
        launch(_OF_MASK(**_WORD), blocks, _THREADS, (given.as_bytes(), words, given.size, count))
    return words
