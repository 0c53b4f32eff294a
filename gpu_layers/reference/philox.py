"""Philox4x32-10: the counter-based generator behind every dropout mask.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)


def philox4x32_10(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Encrypt counters.

    Parameters
    ----------
    counter : ndarray of uint32, shape (4, n)
        One counter a column, least significant word first.
    key : tuple of two int
        Two 32-bit words.

    Returns
    -------
    ndarray of uint32, shape (n, 4)
        Four random words for each counter.
    """
    # 32-bit words live in 64-bit lanes, so that a product holds both of its halves.
    c0, c1, c2, c3 = (np.array(word, dtype=np.uint64) for word in counter)
    product_0, product_1 = np.empty_like(c0), np.empty_like(c0)
    key_0, key_1 = key
    for _ in range(_ROUNDS):
        np.multiply(c0, _MULTIPLIER_0, out=product_0)
        np.multiply(c2, _MULTIPLIER_1, out=product_1)
        # c0, c1, c2, c3 = hi(p1) ^ c1 ^ k0, lo(p1), hi(p0) ^ c3 ^ k1, lo(p0)
        np.right_shift(product_1, _SHIFT_32, out=c0)
        np.bitwise_xor(c0, c1, out=c0)
        np.bitwise_xor(c0, np.uint64(key_0), out=c0)
        np.bitwise_and(product_1, _LOW_32, out=c1)
        np.right_shift(product_0, _SHIFT_32, out=c2)
        np.bitwise_xor(c2, c3, out=c2)
        np.bitwise_xor(c2, np.uint64(key_1), out=c2)
        np.bitwise_and(product_0, _LOW_32, out=c3)
        key_0 = (key_0 + _WEYL_0) & 0xFFFFFFFF
        key_1 = (key_1 + _WEYL_1) & 0xFFFFFFFF
    words = np.empty((c0.size, 4), dtype=np.uint32)
    for lane, word in enumerate((c0, c1, c2, c3)):
        words[:, lane] = word
    return words


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
    first_block = start >> 2
    blocks = ((start + count + 3) >> 2) - first_block
    index = np.arange(blocks, dtype=np.uint64) + np.uint64(first_block)
    counter = np.empty((4, blocks), dtype=np.uint32)
    counter[0] = index & _LOW_32
    counter[1] = index >> _SHIFT_32
    counter[2] = offset & 0xFFFFFFFF
    counter[3] = offset >> 32
    words = philox4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1)
    return words[start & 3 :][:count]
