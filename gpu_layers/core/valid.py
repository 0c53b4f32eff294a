"""Which positions of a padded batch count: an argument of both backends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import to_host

#: Positions of a word.
WORD = 32


@dataclass(eq=False)
class ValidPositions:
    """The positions that count.

    Attributes
    ----------
    shape : tuple of int
        (N, *spatial).
    lengths : ndarray of int64, shape (N, spatial axes), or None
        Sizes of the samples, if they were given.
    given : array of bool of that shape, or None
        The mask, if there are no lengths.
    first : int
        Of the positions that count, counted over the batch; 0 if there are none.
    count : int
        How many there are.
    pack : callable
        ``valid_words`` of the backend.
    packed : array or None
        Once they have been asked for, :meth:`words`.
    """

    shape: tuple[int, ...]
    lengths: np.ndarray | None
    given: Array
    first: int
    count: int
    pack: Callable[..., Array]
    packed: Array = None

    def words(self, x: Array) -> Array:
        """A bit a position, the lowest first, in uint32, and a word more than that takes; on the device of a batch."""
        if self.packed is None:
            self.packed = self.pack(self.shape, self.lengths, self.given, x)
        return self.packed

    @cached_property
    def mask(self) -> Array:
        """True where a position counts: an array of bool; in the host's memory, if there are lengths."""
        return self.given if self.lengths is None else mask_of_lengths(self.lengths, self.shape)

    @cached_property
    def before(self) -> tuple[int, ...]:
        """How many there are before each sample, and in all samples."""
        inside = tuple(range(1, len(self.shape)))
        counts = to_host(self.mask).sum(inside, np.int64) if self.lengths is None else self.lengths.prod(1)
        return (0, *np.cumsum(counts).tolist())


def word_count(shape: tuple[int, ...]) -> int:
    """Words of the positions of a shape, and one more."""
    return -(-math.prod(shape) // WORD) + 1


def mask_of_lengths(lengths: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """True where a position is below the lengths of its sample, (N, *spatial)."""
    mask = np.ones(shape, bool)
    for axis, size in enumerate(shape[1:]):
        after = (1,) * (len(shape) - axis - 2)
        own = lengths[:, axis].reshape(-1, *(1,) * (len(shape) - 1))
        mask &= np.arange(size).reshape(size, *after) < own
    return mask
