"""Which positions of a padded batch count: an argument of both backends."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_layers.core.array import Array


@dataclass(frozen=True)
class ValidPositions:
    """The positions that count.

    Attributes
    ----------
    mask : array of bool, shape (N, *spatial)
        True where a position counts.
    words : array of uint32
        The same on the device of the batch, a bit a position, the lowest first; a word more than that takes.
    first : int
        Of the positions that count, counted over the batch; 0 if there are none.
    count : int
        How many there are.
    """

    mask: Array
    words: Array
    first: int
    count: int
