"""The mask contract in plain Python integers, one element at a time: slow, and independent of the library."""

from __future__ import annotations

import numpy as np

_WORD = 2**32


def philox4x32(counter: list[int], key: list[int], rounds: int = 10) -> list[int]:
    """Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, section 3.3 and figure 3."""
    left, right = counter, key
    for _ in range(rounds):
        high_0, low_0 = divmod(0xD2511F53 * left[0], _WORD)
        high_1, low_1 = divmod(0xCD9E8D57 * left[2], _WORD)
        left = [high_1 ^ left[1] ^ right[0], low_1, high_0 ^ left[3] ^ right[1], low_0]
        right = [(right[0] + 0x9E3779B9) % _WORD, (right[1] + 0xBB67AE85) % _WORD]
    return left


def word(seed: int, offset: int, g: int) -> int:
    """Random word of element g."""
    block = g // 4
    counter = [block % _WORD, block // _WORD, offset % _WORD, offset // _WORD]
    return philox4x32(counter, [seed % _WORD, seed // _WORD])[g % 4]


def kept(n: int, p: float, seed: int, offset: int, start: int = 0) -> np.ndarray:
    """Which of the elements ``start .. start + n - 1`` stay."""
    return np.array([word(seed, offset, g) >= round(p * 2**32) for g in range(start, start + n)], bool)


def sample_seed(seed: int, sample_id: int) -> int:
    """Seed of a sample's own mask."""
    low, high, _, _ = philox4x32([0, 0x80000000, 0, 0], [seed % _WORD, seed // _WORD])
    return (low + _WORD * high + 0x9E3779B97F4A7C15 * sample_id) % 2**64
