"""The positions of a padded batch that count, as bits."""

from __future__ import annotations

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.valid import mask_of_lengths, word_count

__all__ = ["valid_words"]


def valid_words(shape: tuple[int, ...], lengths: Array, mask: Array, like: Array) -> np.ndarray:
    """Pack the positions that count into bits.

    Parameters
    ----------
    shape : tuple of int
        (N, *spatial).
    lengths : ndarray of int64, shape (N, spatial axes), or None
        Sizes of the samples: positions below them count.
    mask : ndarray of bool of that shape, or None
        Where there are no lengths: True where a position counts.
    like : array
        On whose device the result is.

    Returns
    -------
    ndarray of uint32
        Bit p % 32 of word p // 32 is position p, counted over the batch; a last word is 0.
    """
    mask = mask_of_lengths(lengths, shape) if mask is None else mask
    words = np.zeros(word_count(shape), np.uint32)
    bits = np.packbits(mask.reshape(-1), bitorder="little")
    words.view(np.uint8)[: bits.size] = bits
    return words
