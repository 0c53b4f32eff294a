"""Philox4x32-10: the counter-based generator of all dropout masks.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)
_ROUNDS = 10
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)
#: Step between seeds of neighbouring streams: 2**64 / golden ratio, odd: its multiples all differ.
SEED_STEP = 0x9E3779B97F4A7C15
# Second word of the counter that seeds of samples come from. No decision of a mask has it: its block number is below
# 2**62, and so this word below 2**30.
_SAMPLE_DOMAIN = 0x80000000


def philox4x32_10(counter: Sequence[Any] | np.ndarray, key: tuple[Any, Any]) -> np.ndarray:
    """Encrypt counters.

    Parameters
    ----------
    counter : ndarray of uint32, shape (4, n), or sequence of four
        Words of 32 bits of n counters, the least significant first: an array for each of them, or, but for the first,
        one number for all counters.
    key : tuple of two int, or of two ndarrays of uint64, shape (n,)
        Two 32-bit words, for all counters or for each.

    Returns
    -------
    ndarray of uint32, shape (n, 4)
        Four random words for each counter.
    """
    # 32-bit words live in 64-bit lanes, so that a product holds both of its halves.
    words = [np.asarray(word, dtype=np.uint64) for word in counter]
    c0, c1, c2, c3, product_0, product_1 = (np.empty(words[0].size, np.uint64) for _ in range(6))
    key_0, key_1 = (word if isinstance(word, np.ndarray) else np.uint64(word) for word in key)
    before = words
    for _ in range(_ROUNDS):
        np.multiply(before[0], _MULTIPLIER_0, out=product_0)
        np.multiply(before[2], _MULTIPLIER_1, out=product_1)
        # c0, c1, c2, c3 = hi(p1) ^ c1 ^ k0, lo(p1), hi(p0) ^ c3 ^ k1, lo(p0)
        np.right_shift(product_1, _SHIFT_32, out=c0)
        np.bitwise_xor(c0, before[1], out=c0)
        np.bitwise_xor(c0, key_0, out=c0)
        np.bitwise_and(product_1, _LOW_32, out=c1)
        np.right_shift(product_0, _SHIFT_32, out=c2)
        np.bitwise_xor(c2, before[3], out=c2)
        np.bitwise_xor(c2, key_1, out=c2)
        np.bitwise_and(product_0, _LOW_32, out=c3)
        before = [c0, c1, c2, c3]
        key_0, key_1 = (key_0 + _WEYL_0) & _LOW_32, (key_1 + _WEYL_1) & _LOW_32
    found = np.empty((c0.size, 4), dtype=np.uint32)
    for lane, word in enumerate(before):
        found[:, lane] = word
    return found


def random_words(seed: int, offset: int, start: int, count: int) -> np.ndarray:
    """Random words of the elements ``g = start .. start + count - 1`` of one call.

    Element ``g`` has word ``g & 3`` of the block whose counter is ``(g >> 2, offset)``, under the key ``seed``.

    Parameters
    ----------
    seed, offset, start : int
        In ``0 .. 2**64 - 1``.
    count : int
        How many words.

    Returns
    -------
    ndarray of uint32, shape (count,)
    """
    counter = _counters(start, count, offset)
    words = philox4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1)
    return words[start & 3 :][:count]


def _counters(start: int, count: int, offset: int) -> list[Any]:
    """Words of the counters of the blocks with the elements ``start .. start + count - 1``."""
    first_block, last_block = start >> 2, ((start + count + 3) >> 2) - 1
    low = np.arange(last_block - first_block + 1, dtype=np.uint64)
    low += np.uint64(first_block)
    high: Any = first_block >> 32
    if last_block >> 32:
        high = low >> _SHIFT_32
        low &= _LOW_32
    return [low, high, offset & 0xFFFFFFFF, offset >> 32]


@lru_cache(maxsize=64)
def sample_seed(seed: int, sample_id: int = 0) -> int:
    """The seed of one sample's own masks, different for each of the ``2**64`` numbers that a sample may have.

    It is ``base + sample_id * SEED_STEP (mod 2**64)``, where base is the first two words of the block with counter
    ``(0, 0x80000000, 0, 0)`` under the key ``seed``: a counter that no mask uses.
    """
    counter = np.array([[0], [_SAMPLE_DOMAIN], [0], [0]], np.uint32)
    words = philox4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32))[0]
    return (int(words[0]) + (int(words[1]) << 32) + sample_id * SEED_STEP) % 2**64


def sample_words(seed: int, offset: int, sample_ids: np.ndarray, start: int, count: int) -> np.ndarray:
    """Random words of the elements ``start .. start + count - 1`` of samples with masks of their own.

    Parameters
    ----------
    seed, offset, start, count : int
        As in :func:`random_words`.
    sample_ids : ndarray of int64, shape (n,)

    Returns
    -------
    ndarray of uint32, shape (n, count)
        Row i is ``random_words(sample_seed(seed, sample_ids[i]), offset, start, count)``.
    """
    low, high, *numbers = _counters(start, count, offset)
    blocks = low.size
    seeds = sample_ids.astype(np.uint64) * np.uint64(SEED_STEP) + np.uint64(sample_seed(seed))
    of_block = np.repeat(seeds, blocks)
    counter = [np.tile(low, seeds.size), np.tile(high, seeds.size) if np.ndim(high) else high, *numbers]
    words = philox4x32_10(counter, (of_block & _LOW_32, of_block >> _SHIFT_32))
    return words.reshape(seeds.size, 4 * blocks)[:, start & 3 :][:, :count]
